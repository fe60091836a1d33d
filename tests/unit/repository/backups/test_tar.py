"""Tar streams, cut anywhere."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import ObjectDamagedError, RefusedError
from knockwood.repository.backups.tar import TERMINATOR, Member, read_tar

NAMES = st.lists(
    st.text("abcdef0123456789_.", min_size=1, max_size=30).filter(lambda t: t.strip(".") == t),
    min_size=1, max_size=5,
).map("/".join)  # fmt: skip
FILES = st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=6)


def archive_of(files: list[tuple[str, bytes]]) -> bytes:
    out = b""
    for name, content in files:
        member = Member(name, len(content))
        out += member.header() + content + bytes(member.padding)
    return out


def pieces(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = 0
    for size in sizes:
        yield data[at : at + size]
        at += size
    yield data[at:]


def read_all(chunks: Iterator[bytes], *, terminated: bool = False) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in read_tar(chunks, terminated=terminated):
        if isinstance(entry, Member):
            found.append((entry.path, b""))
        else:
            found[-1] = (found[-1][0], found[-1][1] + bytes(entry))
    return found


@given(FILES, st.lists(st.integers(0, 700), max_size=20))
def test_what_is_written_is_read_however_it_is_cut(files: list[tuple[str, bytes]], sizes: list[int]) -> None:
    data = archive_of(files)
    assert read_all(pieces(data, sizes)) == files
    assert read_all(pieces(data + TERMINATOR, sizes), terminated=True) == files


@given(FILES.filter(bool))
def test_other_tools_read_it(files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive_of(files) + TERMINATOR)) as archive:
        found = []
        for info in archive:
            content = archive.extractfile(info)
            assert content is not None
            found.append((info.name, content.read()))
    assert found == files


@given(FILES.filter(bool), st.data())
def test_a_cut_is_always_noticed(files: list[tuple[str, bytes]], data: st.DataObject) -> None:
    whole = archive_of(files)
    size = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ObjectDamagedError):
        read_all(iter([whole[:size]]), terminated=True)


@given(FILES.filter(bool), st.integers(0, 511), st.integers(1, 255))
def test_a_changed_header_is_noticed(files: list[tuple[str, bytes]], at: int, change: int) -> None:
    data = bytearray(archive_of(files) + TERMINATOR)
    data[at] ^= change
    try:
        found = read_all(iter([bytes(data)]), terminated=True)
    except ObjectDamagedError:
        return
    # The checksum's own field has spare characters.
    assert 148 <= at < 156
    assert found == files


def test_folders_and_links_are_told() -> None:
    folder = Member("base/5", kind="folder", mode=0o700)
    link = Member("pg_tblspc/1", kind="link", target="/somewhere")
    assert list(read_tar([folder.header() + link.header()])) == [
        Member("base/5", kind="folder", mode=0o700),
        Member("pg_tblspc/1", kind="link", target="/somewhere"),
    ]


def test_sizes_beyond_eight_gigabytes_fit() -> None:
    big = Member("x", 1 << 34)
    chunks = [big.header()]
    with pytest.raises(ObjectDamagedError):
        assert list(read_tar(chunks)) == [big]


def test_a_path_that_tar_cannot_hold_is_refused() -> None:
    with pytest.raises(RefusedError):
        Member("x" * 300).header()
    long = "/".join(["folder" * 10, "y" * 90])
    assert [entry.path for entry in read_tar([Member(long).header()]) if isinstance(entry, Member)] == [long]
