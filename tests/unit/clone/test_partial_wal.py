"""Records become no-ops whose CRC is right, wherever their header lies; nothing else changes."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import fix_wal
from fix_wal import BASE, Writer
from knockwood.clone.partial_wal import _LOCKS, Patcher, WalFilter, _silence, crc_change, locator_of
from knockwood.clone.pieces import Piece
from knockwood.errors import RecoveryFailedError, RefusedError
from knockwood.model import Lsn, Timeline, WalSegment
from knockwood.postgres.walrecords import HAS_IMAGE, WILL_INIT, Records, References
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


RELATIONS = {number: (1663, 5, number) for number in range(1, 10)}
HEAP, BTREE, XLOG, STORAGE, STANDBY, DATABASE, TRANSACTION, HEAP2 = 10, 11, 0, 2, 8, 4, 1, 9


@dataclass(frozen=True)
class Ref:
    relation: tuple[int, int, int]
    block: int = 0
    fork: int = 0
    flags: int = 0


def records(*entries: tuple[int, int, int, Sequence[Ref] | bytes]) -> Records:
    """Records as (lsn, manager, info, the blocks named or the main data)."""
    named = [
        (row, number, ref)
        for row, entry in enumerate(entries)
        if not isinstance(entry[3], bytes)
        for number, ref in enumerate(entry[3])
    ]
    content = [entry[3] if isinstance(entry[3], bytes) else b"" for entry in entries]
    starts = np.cumsum([0, *map(len, content)])[:-1] if content else []

    def words(values: Iterable[int]) -> NDArray[np.uint32]:
        return np.array(list(values), np.uint32)

    def ints(values: Iterable[int]) -> NDArray[np.int64]:
        return np.array(list(values), np.int64)

    def octets(values: Iterable[int]) -> NDArray[np.uint8]:
        return np.array(list(values), np.uint8)

    references = References(
        record=ints(row for row, _, _ in named),
        id=octets(number for _, number, _ in named),
        flags=octets(ref.flags | ref.fork for _, _, ref in named),
        tablespace=words(ref.relation[0] for _, _, ref in named),
        database=words(ref.relation[1] for _, _, ref in named),
        filenode=words(ref.relation[2] for _, _, ref in named),
        block=words(ref.block for _, _, ref in named),
    )
    lsn = ints(entry[0] for entry in entries)
    return Records(
        buffer=np.frombuffer(b"".join(content), np.uint8),
        start=lsn,
        lsn=lsn,
        end=lsn + 8,
        length=words(24 for _ in entries),
        xid=words(1 for _ in entries),
        info=octets(entry[2] for entry in entries),
        manager=octets(entry[1] for entry in entries),
        main=ints(starts),
        main_bytes=ints(map(len, content)),
        references=references,
        bad=None,
    )


def a_filter(pieces: dict[tuple[int, int, int], Piece] | None = None) -> WalFilter:
    return WalFilter(
        Path("/nowhere"),
        SEGMENT,
        frozenset({RELATIONS[1], *(pieces or {})}),
        frozenset({RELATIONS[2], RELATIONS[3]}),
        pieces or {},
    )


def silenced(
    known: WalFilter, *entries: tuple[int, int, int, Sequence[Ref] | bytes], since: int = 0
) -> list[int]:
    made = records(*entries)
    return [int(made.lsn[row]) for row in known.judge(made, Lsn(since), 18)]


def test_only_what_touches_absent_relations_alone_is_silenced() -> None:
    here, gone, other = Ref(RELATIONS[1]), Ref(RELATIONS[2]), Ref(RELATIONS[3], 7)
    found = silenced(
        a_filter(),
        (100, HEAP, 0, [gone]),
        (108, HEAP, 0, [here]),
        (116, BTREE, 0, [gone, Ref(RELATIONS[1], 4)]),
        (124, BTREE, 0, [gone, other]),
        (132, XLOG, 0x10, b"a checkpoint"),
        (140, XLOG, 0xA0, [Ref(RELATIONS[2], 0, 2, HAS_IMAGE)]),
        (148, XLOG, 0x20, [gone]),  # made a no-op before
        (156, HEAP2, 0x70, b"a new command id"),
        (164, STANDBY, 0x00, b"a lock"),
        (172, STANDBY, 0x10, b"running transactions"),
        (180, STORAGE, 0x20, struct.pack("<IIIII", 0, *RELATIONS[2], 7)),
        (188, STORAGE, 0x20, struct.pack("<IIIII", 0, *RELATIONS[1], 7)),
        (196, 130, 0, [gone]),  # an extension's own kind
    )
    assert found == [100, 124, 140, 164, 180]


def test_what_lies_before_the_start_is_neither_silenced_nor_learnt_from() -> None:
    known = a_filter()
    entries = [(100, HEAP, 0, [Ref(RELATIONS[2])]), (200, HEAP, 0, [Ref(RELATIONS[2])])]
    assert silenced(known, *entries, (300, HEAP, 0, [Ref(RELATIONS[7])]), since=150) == [200]
    assert known.reached == Lsn(300)
    assert known.scanned == 2
    assert known.unexplained == {RELATIONS[7]: 300}


def test_the_same_numbers_in_another_tablespace_are_another_relation() -> None:
    known = a_filter()
    assert silenced(known, (100, HEAP, 0, [Ref((1663, 5, 2))]), (108, HEAP, 0, [Ref((9999, 5, 2))])) == [100]
    assert list(known.unexplained) == [(9999, 5, 2)]


def test_what_the_wal_makes_is_whole_from_there_on() -> None:
    known = a_filter()
    create = struct.pack("<IIIi", *RELATIONS[2], 0)
    assert silenced(
        known,
        (100, HEAP, 0, [Ref(RELATIONS[2])]),
        (200, STORAGE, 0x10, create),
        (280, HEAP, 0, [Ref(RELATIONS[2])]),
        (288, STORAGE, 0x20, struct.pack("<IIIII", 0, *RELATIONS[2], 7)),
    ) == [100]
    assert silenced(known, (300, HEAP, 0, [Ref(RELATIONS[2])])) == []
    assert known.whole(RELATIONS[2])
    assert known.whole(RELATIONS[1])
    assert not known.whole(RELATIONS[3])


def test_relations_that_come_from_nowhere_are_noticed_unless_they_go_again() -> None:
    known = a_filter()
    nowhere = [(1663, number, number) for number in (7, 8, 9)]
    entries = [(0x100 + 8 * at, HEAP, 0, [Ref(one)]) for at, one in enumerate(nowhere)]
    assert silenced(known, *entries) == []
    dropped = struct.pack("<qIiIIIIII", 0, 1 << 2, 2, *nowhere[0], 1663, 7, 70)
    silenced(
        known, (0x200, TRANSACTION, 0x80, dropped), (0x208, DATABASE, 0x20, struct.pack("<III", 8, 1, 1663))
    )
    assert known.unexplained == {nowhere[2]: 0x110}
    with pytest.raises(RefusedError, match="copies a whole database"):
        silenced(known, (0x300, DATABASE, 0x00, struct.pack("<IIII", 16400, 1663, 1, 1663)))


def test_of_a_relation_in_pieces_what_names_a_block_that_is_here_is_replayed() -> None:
    piece = Piece("base/5/4", frozenset([10, 11]), 100)
    known = a_filter({RELATIONS[4]: piece})

    def ref(block: int, fork: int = 0, flags: int = 0) -> Ref:
        return Ref(RELATIONS[4], block, fork, flags)

    found = silenced(
        known,
        (100, HEAP, 0, [ref(10)]),
        (108, HEAP, 0, [ref(20)]),
        (116, HEAP, 0, [ref(20), ref(11)]),  # moved from 11 to 20
        (124, HEAP, 0, [ref(20)]),
        (132, HEAP, 0, [ref(21, flags=HAS_IMAGE), ref(10)]),  # 21 is whole from here on
        (140, HEAP, 0, [ref(21)]),
        (148, HEAP, 0, [ref(22, flags=WILL_INIT), ref(21)]),  # and so is 22
        (156, HEAP, 0, [ref(22), ref(23)]),
        (164, HEAP, 0, [ref(23)]),
        (172, HEAP2, 0, [ref(0, fork=2), ref(20)]),
        (180, HEAP2, 0, [ref(0, fork=2), ref(10)]),
    )
    assert found == [108, 124, 164, 172]
    assert piece.joined == {("", 21): 132, ("", 22): 148}
    assert piece.fenced == {("", 20), ("", 23), ("vm", 0)}
    with pytest.raises(RefusedError, match="truncates a table"):
        silenced(known, (200, STORAGE, 0x20, struct.pack("<IIIII", 5, *RELATIONS[4], 7)))


def test_records_are_made_no_ops_in_bulk_as_one_by_one(tmp_path: Path) -> None:
    segment = WalSegment(Timeline(1), 1, SEGMENT)
    chance = random.Random(3)
    content = bytearray(chance.randbytes(SEGMENT))
    places = [SEGMENT + at for at in (40, 96, 8192 - 24, 16384 - 16, 24600, 5 * 8192 - 8)]
    managers, infos = [10, 11, 9, 10, 2, 8], [0x40, 0x00, 0x70, 0xC0, 0x20, 0x00]
    paths = [tmp_path / "bulk", tmp_path / "single"]
    for path in paths:
        path.mkdir()
        (path / segment.name).write_bytes(content)
        with closing(Patcher(path, Timeline(1), SEGMENT)) as patcher:
            for place, manager, info in zip(places, managers, infos, strict=True):
                header = HEADER.pack(24, 700, 4711, info, manager) + bytes(4)
                for spot, byte in zip(patcher._places(place), header, strict=True):
                    patcher._segment(spot)[spot % SEGMENT] = byte
    rows = records(*((lsn, m, i, b"") for lsn, m, i in zip(places, managers, infos, strict=True)))
    raw = np.memmap(paths[0] / segment.name, np.uint8, "r+")
    with closing(Patcher(paths[0], Timeline(1), SEGMENT)) as patcher:
        _silence(raw, segment, rows, np.arange(len(places)), patcher)
    with closing(Patcher(paths[1], Timeline(1), SEGMENT)) as patcher:
        for place, manager in zip(places, managers, strict=True):
            patcher.silence(place, 24, manager)
    one, other = ((path / segment.name).read_bytes() for path in paths)
    assert one == other
    assert one != bytes(content)


@pytest.mark.parametrize("inside", [8, 16])
def test_a_record_that_crosses_into_a_segment_fetched_anew_is_silenced_there_again(
    tmp_path: Path, inside: int
) -> None:
    """The segment before is as it was; of the record's header the end, with its kind, lies in the new one."""
    writer = Writer()
    border = BASE + fix_wal.SIZE
    writer.record(20)
    while border - writer.position > 2000:
        writer.record(1000)
    # 24 bytes of header and 2 before the data of a record; the next one begins so far before the border.
    writer.record(border - inside - writer.position - 24 - 5)
    crossing = writer.record(40, manager=STANDBY)
    writer.record(40, manager=STANDBY)
    pairs = writer.segments()
    for segment, raw in pairs:
        (tmp_path / segment.name).write_bytes(raw.tobytes())
    assert crossing == border - inside
    known = WalFilter(tmp_path, fix_wal.SIZE, frozenset(), frozenset())
    both = [segment for segment, _ in pairs]
    known.apply(both, Lsn(BASE), None)
    last = tmp_path / both[1].name
    first = last.read_bytes()
    assert first != pairs[1][1].tobytes()
    last.write_bytes(pairs[1][1].tobytes())
    known.apply(both, both[1].start, None)
    assert last.read_bytes() == first


@pytest.mark.parametrize("length", [b"    54/    54", b"    54/100054", b"100054/1100054"])
def test_locks_of_any_length_are_seen(length: bytes) -> None:
    """pg_waldump pads the length to six places; a longer one follows the slash at once."""
    line = (
        b"rmgr: Standby     len (rec/tot): " + length + b", tx:        764, lsn: 0/01755ED0,"
        b" prev 0/01755E98, desc: LOCK xid 764 db 5 rel 2\n"
    )
    assert _LOCKS.findall(line) == [(length.split(b"/")[1].strip(), b"0/01755ED0")]
    assert _LOCKS.findall(line.replace(b"LOCK", b"RUNNING_XACTS")) == []
