"""WAL objects: what may go in, what comes out, and what is never overwritten."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyrage
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import (
    ObjectDamagedError,
    ObjectExistsError,
    ObjectMissingError,
    RepositoryError,
    WrongSystemError,
)
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.repository.archive import WalArchive
from knockwood.repository.inventory import Partial, partial_object, segment_object
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage
from knockwood.repository.storage.local import LocalStorage
from knockwood.repository.walfile import content_end, rounded_down, rounded_up, valid_end

MB = 1 << 20
PAGE = 8192
SYSTEM = 7_000_000_000_000_000_001
ONE = Timeline(1)
FIRST = WalSegment(ONE, 3, MB)


def wal_bytes(segment: WalSegment, filled: int = MB, system: int = SYSTEM, fill: bytes = b"\xab") -> bytes:
    """A segment whose first `filled` bytes are written, with page headers as PostgreSQL makes them."""
    data = bytearray(MB)
    data[:filled] = fill * filled
    for page in range(-(-filled // PAGE)):
        start = page * PAGE
        address = segment.start.value + start
        head = struct.pack("=HHIQII", 0xD118, 2 if page == 0 else 0, segment.timeline, address, 0, 0)
        if page == 0:
            head += struct.pack("=QII", system, MB, PAGE)
        data[start : start + len(head)] = head
    return bytes(data)


def wal_file(folder: Path, segment: WalSegment = FIRST, **options: object) -> Path:
    path = folder / segment.name
    path.write_bytes(wal_bytes(segment, **options))  # type: ignore[arg-type]
    return path


@pytest.fixture
def archive(tmp_path: Path) -> WalArchive:
    storage = open_storage(str(tmp_path / "repository"))
    return WalArchive(Repository.create(storage, cluster="shop", system_identifier=SYSTEM, segment_bytes=MB))


def test_a_segment_goes_in_once(archive: WalArchive, tmp_path: Path) -> None:
    path = wal_file(tmp_path)
    assert archive.put_segment(FIRST, path)
    assert not archive.put_segment(FIRST, path)
    archive.fetch(FIRST, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == path.read_bytes()
    path.write_bytes(wal_bytes(FIRST, fill=b"\xac"))
    with pytest.raises(ObjectExistsError):
        archive.put_segment(FIRST, path)


def test_a_host_that_cannot_decrypt_still_knows_its_own_content(archive: WalArchive, tmp_path: Path) -> None:
    identity = pyrage.x25519.Identity.generate()
    blind = WalArchive(replace(archive.repository, recipients=(str(identity.to_public()),)))
    path = wal_file(tmp_path)
    assert blind.put_segment(FIRST, path)
    assert not blind.put_segment(FIRST, path)
    assert blind.put_history(Timeline(2), "1\t0/400000\treason\n")
    assert blind.inventory().histories[Timeline(2)].switches == ((ONE, Lsn(0x400000)),)
    path.write_bytes(wal_bytes(FIRST, fill=b"\xac"))
    with pytest.raises(ObjectExistsError):
        blind.put_segment(FIRST, path)
    # The refused content left no mark that would let it pass the next time.
    with pytest.raises(ObjectExistsError):
        blind.put_segment(FIRST, path)
    sighted = WalArchive(replace(blind.repository, identities=(str(identity),)))
    sighted.fetch(FIRST, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == wal_bytes(FIRST)


def test_wal_of_another_cluster_is_refused(archive: WalArchive, tmp_path: Path) -> None:
    with pytest.raises(WrongSystemError):
        archive.put_segment(FIRST, wal_file(tmp_path, system=8))


def test_wal_that_is_not_what_it_is_called_is_refused(archive: WalArchive, tmp_path: Path) -> None:
    path = wal_file(tmp_path)
    with pytest.raises(ObjectDamagedError):
        archive.put_segment(FIRST.next(), path)
    path.write_bytes(bytes(MB))
    with pytest.raises(ObjectDamagedError):
        archive.put_segment(FIRST, path)
    path.write_bytes(wal_bytes(FIRST)[:-1])
    with pytest.raises(ObjectDamagedError):
        archive.put_segment(FIRST, path)
    assert archive.inventory().segments == {}


def test_a_childs_first_segment_begins_with_its_parents_pages(archive: WalArchive, tmp_path: Path) -> None:
    child = WalSegment(Timeline(2), 3, MB)
    path = tmp_path / child.name
    path.write_bytes(wal_bytes(FIRST))
    assert archive.put_segment(child, path)


def test_partials_are_replaced_only_by_more(archive: WalArchive, tmp_path: Path) -> None:
    path = wal_file(tmp_path, filled=3 * PAGE + 100)
    ends = [FIRST.start + size for size in (PAGE, 2 * PAGE, 3 * PAGE + 100)]
    for end in ends:
        archive.put_partial(FIRST, path, end)
    assert archive.drop_partials(FIRST, below=FIRST.end) == 0
    assert archive.drop_partials(FIRST) == 0
    assert archive.drop_partials(FIRST, below=ends[1]) == 1
    assert [partial.end for partial in archive.inventory().partials] == ends[1:]
    archive.fetch_partial(partial_object(FIRST, ends[2]), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == path.read_bytes()
    # One that was replaced since it was listed comes from its replacement, with the same bytes.
    archive.fetch_partial(partial_object(FIRST, ends[0]), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == path.read_bytes()[:PAGE] + bytes(MB - PAGE)
    whole = wal_file(tmp_path)
    archive.put_segment(FIRST, whole)
    assert archive.drop_partials(FIRST) == 2
    archive.fetch_partial(partial_object(FIRST, ends[2]), tmp_path / "out")
    kept = 3 * PAGE + 100
    assert (tmp_path / "out").read_bytes() == whole.read_bytes()[:kept] + bytes(MB - kept)


class ReplacedMeanwhile(LocalStorage):
    """A receiver replaces each partial just when somebody is about to read it, while there are `longer` ones."""

    longer: list[Callable[[], object]]

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        if name.startswith("wal/partial/") and self.longer:
            self.longer.pop(0)()
        yield from super().read(name, start, end)


def test_a_partial_that_is_replaced_while_it_is_opened_is_read(archive: WalArchive, tmp_path: Path) -> None:
    path = wal_file(tmp_path, filled=3 * PAGE)
    ends = [FIRST.start + size for size in (PAGE, 2 * PAGE, 3 * PAGE)]

    def store(end: Lsn) -> None:
        archive.put_partial(FIRST, path, end)
        archive.drop_partials(FIRST, below=end)

    store(ends[0])
    storage = ReplacedMeanwhile(tmp_path / "repository")
    storage.longer = [partial(store, end) for end in ends[1:]]
    moving = WalArchive(replace(archive.repository, storage=storage))
    moving.fetch_partial(partial_object(FIRST, ends[0]), tmp_path / "out")
    assert storage.longer == []
    assert (tmp_path / "out").read_bytes() == path.read_bytes()[:PAGE] + bytes(MB - PAGE)


def test_a_partial_beyond_its_segment_is_refused(archive: WalArchive, tmp_path: Path) -> None:
    path = wal_file(tmp_path)
    for end in (FIRST.start, FIRST.end + 8):
        with pytest.raises(RepositoryError):
            archive.put_partial(FIRST, path, end)


def test_what_is_damaged_or_missing_does_not_come_out(archive: WalArchive, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ObjectMissingError):
        archive.fetch(FIRST, out)
    with pytest.raises(ObjectMissingError):
        archive.fetch_partial(partial_object(FIRST, FIRST.start + 8), out)
    with pytest.raises(ObjectMissingError):
        archive.fetch_partial("wal/partial/nonsense", out)
    archive.put_segment(FIRST, wal_file(tmp_path))
    stored = tmp_path / "repository" / f"{segment_object(FIRST)}.zst"
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 1
    stored.chmod(0o600)
    stored.write_bytes(data)
    with pytest.raises(ObjectDamagedError):
        archive.fetch(FIRST, out)
    assert not out.exists()
    assert list(tmp_path.glob("out*")) == []


def test_a_segment_of_another_size_does_not_come_out(archive: WalArchive, tmp_path: Path) -> None:
    archive.repository.put(segment_object(FIRST), [wal_bytes(FIRST)[:PAGE]])
    with pytest.raises(ObjectDamagedError):
        archive.fetch(FIRST, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["nonsense", "3\t0/400000\tx\n", "2\t0/400000\tx\n1\t0/500000\tx\n"])
def test_no_history_is_refused(archive: WalArchive, text: str) -> None:
    with pytest.raises(ObjectDamagedError):
        archive.put_history(Timeline(2), text)


@given(st.integers(0, MB))
def test_the_end_of_what_is_written(tmp_path_factory: pytest.TempPathFactory, filled: int) -> None:
    path = tmp_path_factory.getbasetemp() / "segment"
    path.write_bytes(wal_bytes(FIRST, filled))
    end = content_end(path, FIRST)
    # A page is written with its header at least; inside a header the trailing zeros are not seen.
    inside = filled % PAGE
    if inside == 0 or inside > 40:
        assert end == FIRST.start + filled
    assert end <= valid_end(path, FIRST) <= FIRST.end
    assert rounded_down(end) <= end <= rounded_up(end)


def test_older_pages_of_a_recycled_file_do_not_count(tmp_path: Path) -> None:
    path = wal_file(tmp_path, filled=2 * PAGE + 100)
    data = bytearray(path.read_bytes())
    old = wal_bytes(WalSegment(ONE, 1, MB))
    data[3 * PAGE :] = old[3 * PAGE :]
    path.write_bytes(data)
    assert content_end(path, FIRST) == FIRST.start + (2 * PAGE + 100)


def test_names_of_partials() -> None:
    end = FIRST.start + 64
    name = partial_object(FIRST, end)
    for suffix in ("", ".zst", ".zst.age"):
        assert Partial.parse(name + suffix, MB) == Partial(FIRST, end, name)
    assert Partial.parse("wal/partial/x", MB) is None
