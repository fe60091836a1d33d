"""Records become no-ops whose CRC is right, wherever their header lies; nothing else changes."""

from __future__ import annotations

import struct
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.clone.partial_wal import _LINE, Patcher, WalFilter, crc_change, locator_of
from knockwood.errors import RecoveryFailedError, RefusedError
from knockwood.model import Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.repository.contents import Crc32c

SEGMENT = 1 << 20
HEADER = struct.Struct("<IIQBBxx")


def crc(data: bytes) -> int:
    digest = Crc32c()
    digest.update(data)
    return int.from_bytes(bytes.fromhex(digest.hexdigest()), "little")


def record(size: int, info: int, manager: int, body: bytes) -> tuple[bytes, int]:
    """A record's 24 bytes of header, and its CRC: of what follows the header, then of the header."""
    head = HEADER.pack(size, 700, 4711, info, manager)
    return head, crc(body + head)


@given(st.integers(0, 255), st.integers(0, 20), st.binary(max_size=300))
def test_the_crc_of_a_silenced_record_needs_only_the_two_bytes(info: int, manager: int, body: bytes) -> None:
    _, before = record(24 + len(body), info, manager, body)
    _, after = record(24 + len(body), 0x20, 0, body)
    assert before ^ crc_change(info ^ 0x20, manager) == after


@pytest.mark.parametrize(
    "offset", [40, 8192 - 24, 8192 - 16, 8192 - 8, 3 * 8192 - 8, SEGMENT - 16, SEGMENT - 8]
)
def test_a_header_is_found_across_pages_and_segments(tmp_path: Path, offset: int) -> None:
    numbers = (1, 2)
    for number in numbers:
        (tmp_path / WalSegment(Timeline(1), number, SEGMENT).name).write_bytes(b"\xaa" * SEGMENT)
    body = b"data of the record"
    head, checksum = record(24 + len(body), 0x40, 10, body)
    stored = head + checksum.to_bytes(4, "little")
    places = []
    position = SEGMENT + offset
    for _ in stored:
        if position % 8192 == 0:
            position += 40 if position % SEGMENT == 0 else 24
        places.append(position)
        position += 1
    whole = bytearray(b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir())))
    for place, byte in zip(places, stored, strict=True):
        whole[place - SEGMENT] = byte
    for path, start in zip(sorted(tmp_path.iterdir()), (0, SEGMENT), strict=True):
        path.write_bytes(whole[start : start + SEGMENT])
    with closing(Patcher(tmp_path, Timeline(1), SEGMENT)) as patcher:
        with pytest.raises(RecoveryFailedError, match="not the one"):
            patcher.silence(SEGMENT + offset, 24 + len(body) + 1, 10)
        with pytest.raises(RecoveryFailedError, match="not the one"):
            patcher.silence(SEGMENT + offset, 24 + len(body), 11)
        patcher.silence(SEGMENT + offset, 24 + len(body), 10)
    after = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
    head, checksum = record(24 + len(body), 0x20, 0, body)
    wanted = bytearray(whole)
    for place, byte in zip(places, head + checksum.to_bytes(4, "little"), strict=True):
        wanted[place - SEGMENT] = byte
    assert after == bytes(wanted)


def test_paths_are_told_apart() -> None:
    assert locator_of("base/5/16384.1") == (1663, 5, 16384)
    assert locator_of("base/5/16384_init") == (1663, 5, 16384)
    assert locator_of("base/5/INCREMENTAL.16384_vm") == (1663, 5, 16384)
    assert locator_of("global/1260") == (1664, 0, 1260)
    assert locator_of("pg_tblspc/16400/PG_18_202506291/5/16390") == (16400, 5, 16390)
    assert locator_of("base/5/PG_VERSION") is None
    assert locator_of("pg_xact/0000") is None


def a_filter() -> WalFilter:
    return WalFilter(
        Programs(18, 0, Path("/nowhere")),
        Path("/nowhere"),
        SEGMENT,
        frozenset({(1663, 5, 1)}),
        frozenset({(1663, 5, 2), (1663, 5, 3)}),
    )


def concerns(known: WalFilter, rmgr: bytes, text: bytes, lsn: bytes = b"0/100") -> bool:
    return known._concerns_absent(rmgr, text, lsn, {})


def test_only_what_touches_absent_relations_alone_is_silenced() -> None:
    known = a_filter()
    assert concerns(known, b"Heap", b"INSERT off: 1, blkref #0: rel 1663/5/2 blk 0 FPW")
    assert not concerns(known, b"Heap", b"INSERT off: 1, blkref #0: rel 1663/5/1 blk 0")
    both = b"SPLIT, blkref #0: rel 1663/5/2 blk 0, blkref #1: rel 1663/5/1 blk 4"
    assert not concerns(known, b"Btree", both)
    assert not concerns(known, b"XLOG", b"CHECKPOINT_ONLINE redo 0/1; blkref #0: rel 1663/5/2 blk 0")
    assert concerns(known, b"XLOG", b"FPI_FOR_HINT , blkref #0: rel 1663/5/2 fork vm blk 0 FPW")
    assert not concerns(known, b"Heap2", b"NEW_CID rel: 1663/5/2, tid: 1/2")
    assert concerns(known, b"Standby", b"LOCK xid 12 db 5 rel 2")
    assert not concerns(known, b"Standby", b"RUNNING_XACTS nextXid 12")
    assert concerns(known, b"Storage", b"TRUNCATE base/5/2 to 0 blocks flags 7")
    assert not concerns(known, b"Storage", b"TRUNCATE base/5/1 to 0 blocks flags 7")


def test_what_the_wal_makes_is_whole_from_there_on() -> None:
    known = a_filter()
    assert concerns(known, b"Heap", b"INSERT blkref #0: rel 1663/5/2 blk 0", b"0/100")
    assert not concerns(known, b"Storage", b"CREATE base/5/2", b"0/200")
    assert concerns(known, b"Heap", b"INSERT blkref #0: rel 1663/5/2 blk 0", b"0/180")
    assert not concerns(known, b"Heap", b"INSERT blkref #0: rel 1663/5/2 blk 0", b"0/280")
    assert known.whole((1663, 5, 2))
    assert known.whole((1663, 5, 1))
    assert not known.whole((1663, 5, 3))


def test_relations_that_come_from_nowhere_are_noticed_unless_they_go_again() -> None:
    known = a_filter()
    for number in (7, 8, 9):
        assert not concerns(known, b"Heap", f"INSERT blkref #0: rel 1663/{number}/{number} blk 0".encode())
    known._learn(b"Transaction", b"COMMIT 2026-11-21 04:45:12 UTC; rels: base/7/7 base/7/70; inval msgs")
    known._learn(b"Database", b"DROP dir 1663/8")
    assert list(known.unexplained) == [(1663, 9, 9)]
    with pytest.raises(RefusedError, match="copies a whole database"):
        known._learn(b"Database", b"CREATE_FILE_COPY copy dir 1663/1 to 1663/16400")
    assert Lsn(known.unexplained[1663, 9, 9]) == Lsn.parse("0/100")


@pytest.mark.parametrize("length", [b"    54/    54", b"    54/100054", b"100054/1100054"])
def test_records_of_any_length_are_seen(length: bytes) -> None:
    """pg_waldump pads the length to six places; a longer one follows the slash at once."""
    line = (
        b"rmgr: Btree       len (rec/tot): " + length + b", tx:        764, lsn: 0/01755ED0,"
        b" prev 0/01755E98, desc: INSERT_LEAF off: 7, blkref #0: rel 1663/5/2 blk 2 FPW\n"
    )
    [(rmgr, size, lsn, text)] = _LINE.findall(line)
    assert (rmgr, int(size), lsn) == (b"Btree", int(length.split(b"/")[1]), b"0/01755ED0")
    assert concerns(a_filter(), rmgr, text, lsn)
