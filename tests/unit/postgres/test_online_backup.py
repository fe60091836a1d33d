"""The control file on disk, and the texts that pg_backup_stop returns."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import HostError
from knockwood.host import clock
from knockwood.model import Lsn
from knockwood.postgres.control_file import CONTROL_FILE, read_control_file, whole
from knockwood.postgres.online_backup import parse_map
from knockwood.repository.contents import Crc32c


def control_file(body: bytes) -> bytes:
    crc = Crc32c()
    crc.update(body)
    return (body + bytes.fromhex(crc.hexdigest())).ljust(8192, b"\0")


def body_of(length: int = 292) -> bytes:
    start = struct.pack("<QIII", 7_000_000_000_000_000_001, 1800, 202506291, 6)
    return (start.ljust(40, b"\0") + struct.pack("<QI", 0x1_0200_0028, 4)).ljust(
        length - 32, b"\0"
    ) + b"n" * 32


def test_a_control_file_tells_whose_it_is(tmp_path: Path) -> None:
    (tmp_path / "global").mkdir()
    data = control_file(body_of())
    (tmp_path / CONTROL_FILE).write_bytes(data)
    found = read_control_file(tmp_path)
    assert (found.system_identifier, found.catalog_version) == (7_000_000_000_000_000_001, 202506291)
    assert (found.state, found.redo, found.timeline) == (6, Lsn.parse("1/2000028"), 4)
    assert found.data == data


@given(st.integers(33, 100), st.binary(min_size=32, max_size=32), st.integers(0, 291), st.integers(1, 255))
def test_a_torn_or_damaged_control_file_is_not_whole(words: int, nonce: bytes, at: int, flip: int) -> None:
    body = body_of(words * 4)[:-32] + nonce
    data = control_file(body)
    assert whole(data)
    at %= len(body)
    torn = bytearray(data)
    torn[at] ^= flip
    assert not whole(bytes(torn))
    assert not whole(data[:100])
    assert not whole(bytes(8192))


def test_a_control_file_that_stays_bad_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "global").mkdir()
    (tmp_path / CONTROL_FILE).write_bytes(bytes(8192))
    monkeypatch.setattr(clock, "sleep", lambda seconds: None)
    with pytest.raises(HostError, match="CRC"):
        read_control_file(tmp_path)
    with pytest.raises(HostError):
        read_control_file(tmp_path / "none")


def escaped(place: str) -> str:
    return "".join("\\" + letter if letter in "\n\r\\" else letter for letter in place)


@given(
    st.dictionaries(
        st.integers(16384, 1 << 32),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    )
)
def test_a_tablespace_map_is_read_as_the_server_wrote_it(spaces: dict[int, str]) -> None:
    text = "".join(f"{oid} {escaped('/' + place)}\n" for oid, place in spaces.items())
    assert parse_map(text) == {oid: "/" + place for oid, place in spaces.items()}
