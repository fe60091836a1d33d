"""Files appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import HostError, LockHeldError, NoSpaceError, ObjectExistsError
from knockwood.host import files
from knockwood.host.locks import file_lock


def test_a_new_file_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert files.write_new(path, [b"one", bytearray(b"two")]) == 6
    with pytest.raises(ObjectExistsError):
        files.write_new(path, [b"three"])
    assert path.read_bytes() == b"onetwo"


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"some"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        files.write_new(tmp_path / "x", broken())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with (
        pytest.raises(NoSpaceError, match="disk is full"),
        files.translated(tmp_path),
        Path("/dev/full").open("wb", 0) as full,
    ):
        full.write(b"x")


def test_too_little_room_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match="a restore needs"):
        files.require_space(tmp_path / "not" / "there", 1 << 60, "a restore")


def test_a_folder_where_a_file_should_be_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError):
        files.write_new(tmp_path / "file" / "below", [b""])


@given(st.binary(max_size=300), st.integers(0, 300), st.integers(0, 300), st.integers(1, 50))
def test_chunks_are_the_part_asked_for(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: int, length: int, size: int
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "f"
    path.write_bytes(data)
    assert b"".join(files.read_chunks(path, size, start, start + length)) == data[start : start + length]


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock(path, "backup"), pytest.raises(LockHeldError, match="another"), file_lock(path, "backup"):
        pass
    with file_lock(path, "backup"):
        assert path.exists()
