"""What pg_waldump of 15, 17 and 18 prints, recorded, and what is taken from it."""

# The lines are as the program printed them.
# ruff: noqa: E501, W291

from __future__ import annotations

import pytest

from knockwood.errors import ProgramFailedError, RefusedError
from knockwood.history.chains import Net, place
from knockwood.history.touched import Decoder, ExclusiveLock, file_of
from knockwood.model import Lsn

_A = (1663, 5, 16384)

_FIFTEEN = b"""\
rmgr: Heap        len (rec/tot):     54/  1842, tx:        732, lsn: 0/01790598, prev 0/01790520, desc: INSERT off 49 flags 0x00, blkref #0: rel 1663/5/16384 blk 2 FPW
rmgr: Heap        len (rec/tot):     54/    54, tx:        733, lsn: 0/017937F0, prev 0/01790CD0, desc: LOCK off 1: xid 733: flags 0x00 LOCK_ONLY EXCL_LOCK , blkref #0: rel 1663/5/16384 blk 0
rmgr: Heap        len (rec/tot):     80/    80, tx:        733, lsn: 0/01793828, prev 0/017937F0, desc: UPDATE off 1 xmax 733 flags 0x00 ; new off 50 xmax 0, blkref #0: rel 1663/5/16384 blk 2, blkref #1: rel 1663/5/16384 blk 0
rmgr: Heap        len (rec/tot):     54/    54, tx:        734, lsn: 0/017955B0, prev 0/01793890, desc: DELETE off 2 flags 0x00 KEYS_UPDATED , blkref #0: rel 1663/5/16384 blk 0
rmgr: Heap        len (rec/tot):     69/    69, tx:        735, lsn: 0/01795610, prev 0/017955E8, desc: HOT_UPDATE off 50 xmax 735 flags 0x20 ; new off 51 xmax 0, blkref #0: rel 1663/5/16384 blk 2
rmgr: Heap        len (rec/tot):     54/    54, tx:        735, lsn: 0/01795658, prev 0/01795610, desc: DELETE off 49 flags 0x00 KEYS_UPDATED , blkref #0: rel 1663/5/16384 blk 2
rmgr: Heap        len (rec/tot):   1582/  1582, tx:        735, lsn: 0/017B04E8, prev 0/017B04B0, desc: UPDATE+INIT off 8 xmax 739 flags 0x00 ; new off 1 xmax 0, blkref #0: rel 1663/5/16384 blk 3, blkref #1: rel 1663/5/16384 blk 0
rmgr: Heap        len (rec/tot):     48/    48, tx:        735, lsn: 0/017B2F48, prev 0/017B2EC8, desc: HEAP_CONFIRM off 2, blkref #0: rel 1663/5/16384 blk 3
rmgr: Transaction len (rec/tot):     50/    50, tx:        732, lsn: 0/017B5690, prev 0/01795658, desc: COMMIT 2026-11-21 08:06:47.414944 UTC; subxacts: 733 735
"""

_EIGHTEEN = b"""\
rmgr: Heap        len (rec/tot):     54/  1842, tx:        732, lsn: 0/01750D68, prev 0/01750D28, desc: INSERT off: 49, flags: 0x00, blkref #0: rel 1663/5/16384 blk 2 FPW
rmgr: Heap        len (rec/tot):     54/    54, tx:        733, lsn: 0/01753FC0, prev 0/01751F90, desc: LOCK xmax: 733, off: 1, infobits: [LOCK_ONLY, EXCL_LOCK], flags: 0x00, blkref #0: rel 1663/5/16384 blk 0
rmgr: Heap        len (rec/tot):     80/    80, tx:        733, lsn: 0/01753FF8, prev 0/01753FC0, desc: UPDATE old_xmax: 733, old_off: 1, old_infobits: [], flags: 0x00, new_xmax: 0, new_off: 50, blkref #0: rel 1663/5/16384 blk 2, blkref #1: rel 1663/5/16384 blk 0
rmgr: Heap        len (rec/tot):     54/    54, tx:        734, lsn: 0/01755D80, prev 0/01754060, desc: DELETE xmax: 734, off: 2, infobits: [KEYS_UPDATED], flags: 0x00, blkref #0: rel 1663/5/16384 blk 0
rmgr: Heap        len (rec/tot):     69/    69, tx:        735, lsn: 0/01755DE0, prev 0/01755DB8, desc: HOT_UPDATE old_xmax: 735, old_off: 50, old_infobits: [], flags: 0x20, new_xmax: 0, new_off: 51, blkref #0: rel 1663/5/16384 blk 2
rmgr: Heap        len (rec/tot):     54/    54, tx:        735, lsn: 0/01755E28, prev 0/01755DE0, desc: DELETE xmax: 735, off: 49, infobits: [KEYS_UPDATED], flags: 0x00, blkref #0: rel 1663/5/16384 blk 2
rmgr: Heap        len (rec/tot):   1582/  1582, tx:        735, lsn: 0/0176F640, prev 0/0176D5F0, desc: UPDATE+INIT old_xmax: 735, old_off: 8, old_infobits: [], flags: 0x00, new_xmax: 0, new_off: 1, blkref #0: rel 1663/5/16384 blk 3, blkref #1: rel 1663/5/16384 blk 0
rmgr: Heap        len (rec/tot):     48/    48, tx:        735, lsn: 0/01772900, prev 0/017728C0, desc: HEAP_CONFIRM off: 2, blkref #0: rel 1663/5/16384 blk 3
"""


def decoded(text: bytes, xids: set[int], **options: int) -> Decoder:
    decoder = Decoder(frozenset(xids), **options)
    decoder.take(text)
    return decoder


@pytest.mark.parametrize("text", [_FIFTEEN, _EIGHTEEN, _EIGHTEEN.replace(b"01775", b"01715")])
def test_rows_of_a_transaction_with_savepoints(text: bytes) -> None:
    """732 with 733 and 735; 734 was rolled back. Row 1 was updated twice, the inserted one deleted again."""
    found = decoded(text, {732, 733, 735}).result
    assert list(found.files) == [_A]
    assert list(found.files[_A].chains.net()) == [
        Net(1, place(0, 1), place(2, 51)),
        Net(2, place(0, 8), place(3, 1)),
    ]
    assert not found.files[_A].vague


@pytest.mark.parametrize(
    ("text", "heads", "vague"),
    [
        (b"MULTI_INSERT 5 tuples flags 0x02, blkref #0: rel 1663/5/16384 blk 2", [], {2}),
        (b"MULTI_INSERT+INIT 3 tuples flags 0x02, blkref #0: rel 1663/5/16384 blk 2", [1, 2, 3], set()),
        (
            b"MULTI_INSERT ntuples: 2, flags: 0x02, offsets: [52, 56], blkref #0: rel 1663/5/16384 blk 2",
            [52, 56],
            set(),
        ),
        (b"MULTI_INSERT+INIT ntuples: 2, flags: 0x02, blkref #0: rel 1663/5/16384 blk 2", [1, 2], set()),
        # A full-page image stands in for the rows: no offsets on 18 either.
        (b"MULTI_INSERT ntuples: 1, flags: 0x02, blkref #0: rel 1663/5/16384 blk 2 FPW", [], {2}),
    ],
)
def test_rows_of_copy(text: bytes, heads: list[int], vague: set[int]) -> None:
    line = b"rmgr: Heap2       len (rec/tot):    130/   130, tx:        764, lsn: 0/01755ED0, prev 0/01755E98, desc: "
    file = decoded(line + text + b"\n", {764}).result.files[_A]
    assert [net.head for net in file.chains.net()] == [place(2, offset) for offset in heads]
    assert file.vague == vague


def test_a_record_of_100_kb_and_more() -> None:
    """pg_waldump pads the length to six places; a longer one follows the slash at once."""
    line = (
        b"rmgr: Heap        len (rec/tot):     54/1040054, tx:        764, lsn: 0/01755ED0, prev 0/01755E98,"
        b" desc: INSERT off: 7, flags: 0x00, blkref #0: rel 1663/5/16384 blk 2 FPW\n"
    )
    found = decoded(line, {764}).result
    assert [net.head for net in found.files[_A].chains.net()] == [place(2, 7)]


def test_a_move_to_another_partition() -> None:
    text = b"""\
rmgr: Heap        len (rec/tot):     54/    54, tx:        768, lsn: 0/01772610, prev 0/01772578, desc: DELETE xmax: 768, off: 1, infobits: [KEYS_UPDATED], flags: 0x10, blkref #0: rel 1663/5/16399 blk 0
rmgr: Heap        len (rec/tot):     63/    63, tx:        768, lsn: 0/01772648, prev 0/01772610, desc: INSERT+INIT off: 1, flags: 0x00, blkref #0: rel 1663/5/16406 blk 0
"""
    for lines in (
        text,
        text.replace(
            b"xmax: 768, off: 1, infobits: [KEYS_UPDATED], flags: 0x10", b"off 1 flags 0x10 KEYS_UPDATED "
        ),
    ):
        found = decoded(lines, {768}).result
        (move,) = found.files[1663, 5, 16399].chains.moves
        assert (move.lsn, move.xid, move.chain) == (0x01772610, 768, 0)
        assert [xid for _, xid, _ in found.files[1663, 5, 16406].chains.arrivals()] == [768]


def test_files_locks_and_what_ends_behind_the_border() -> None:
    text = b"""\
rmgr: Standby     len (rec/tot):     42/    42, tx:        773, lsn: 0/01773E70, prev 0/01773E30, desc: LOCK xid 773 db 5 rel 16413 
rmgr: Storage     len (rec/tot):     42/    42, tx:        773, lsn: 0/01773EA0, prev 0/01773E70, desc: CREATE base/5/16420
rmgr: Heap        len (rec/tot):     59/    59, tx:        773, lsn: 0/01774028, prev 0/01773FD0, desc: INSERT+INIT off: 1, flags: 0x00, blkref #0: rel 1663/5/16420 blk 0
rmgr: Standby     len (rec/tot):     58/    58, tx:          0, lsn: 0/01774040, prev 0/01774028, desc: LOCK xid 773 db 5 rel 16413 xid 900 db 5 rel 17000 
rmgr: Storage     len (rec/tot):     46/    46, tx:        773, lsn: 0/01774068, prev 0/01774028, desc: TRUNCATE base/5/16420 to 0 blocks flags 7
rmgr: Heap        len (rec/tot):     59/    59, tx:        773, lsn: 0/01774098, prev 0/01774068, desc: INSERT+INIT off: 2, flags: 0x00, blkref #0: rel 1663/5/16420 blk 0
rmgr: Heap        len (rec/tot):     59/    59, tx:        773, lsn: 0/01774100, prev 0/01774098, desc: INSERT off: 3, flags: 0x00, blkref #0: rel 1663/5/16420 blk 0
"""
    decoder = Decoder(frozenset({773}))
    decoder.take(text, until=0x01774100)
    found = decoder.result
    assert found.created == {(1663, 5, 16420)}
    assert [net.head for net in found.files[1663, 5, 16420].chains.net()] == [place(0, 2)]
    assert found.locks[0] == ExclusiveLock(Lsn(0x01773E70), 5, 16413)
    assert {lock.oid for lock in found.locks} == {16413}


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("base/5/16384", (1663, 5, 16384)),
        ("global/1262", (1664, 0, 1262)),
        ("pg_tblspc/20000/PG_18_202506291/5/777", (20000, 5, 777)),
        ("base/5/t3_16384", None),
        ("nonsense", None),
    ],
)
def test_paths(path: str, file: tuple[int, int, int] | None) -> None:
    assert file_of(path) == file


def test_too_much_and_unreadable() -> None:
    with pytest.raises(RefusedError, match="more than 1 rows"):
        decoded(_EIGHTEEN, {732, 733, 735}, limit=1)
    strange = _EIGHTEEN.replace(b"INSERT off: 49,", b"INSERT place: 49,")
    with pytest.raises(ProgramFailedError, match="cannot be read"):
        decoded(strange, {732})
