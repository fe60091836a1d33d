"""Which references of a stretch of WAL are kept, on made-up lines of pg_waldump."""

from __future__ import annotations

from knockwood.postgres.walrefs import _Taker

FORK = (1663, 5, 16384, "main")


def line(lsn: int, manager: str, what: str, *blocks: str) -> bytes:
    named = ", ".join(f"blkref #{number}: rel 1663/5/16384 {block}" for number, block in enumerate(blocks))
    return (
        f"rmgr: {manager:<11} len (rec/tot):     54/    54, tx:        700, lsn: 0/{lsn:08X}, prev 0/00000000,"
        f" desc: {what} off 4, {named}"
    ).encode()


def taken(*lines: bytes) -> list[tuple[int, int, int, int]]:
    taker = _Taker(lambda kind, fork: int(kind[1] == "FPI_FOR_HINT"), (b"rmgr: XLOG ",))
    return [(r.lsn, r.block, r.touch, r.image) for r in taker.take(list(lines), len(lines))]


def test_only_the_last_reference_to_a_block_is_kept() -> None:
    found = taken(
        line(100, "Heap", "INSERT", "blk 7"),
        line(200, "Heap", "INSERT", "blk 8"),
        line(300, "Heap", "INSERT", "blk 7"),
    )
    assert found == [(200, 8, 0, -1), (300, 7, 0, -1)]


def test_images_are_kept_and_what_came_before_each() -> None:
    """Whatever the number of the reference was, and whatever follows it in the record."""
    found = taken(
        line(100, "Heap", "UPDATE", "blk 9", "blk 7"),
        line(200, "Heap", "INSERT", "blk 7"),
        line(300, "Heap", "UPDATE", "blk 9", "blk 7 FPW", "blk 3"),
        line(400, "Heap", "INSERT", "blk 7"),
        line(500, "XLOG", "FPI_FOR_HINT", "blk 7 FPW"),
        line(600, "Heap", "UPDATE", "blk 9", "blk 7 FPW"),
        line(700, "Heap", "INSERT", "blk 7"),
    )
    of_seven = [each for each in found if each[1] == 7]
    assert of_seven == [
        (100, 7, 0, -1),
        (200, 7, 0, -1),
        (300, 7, 0, 1),
        (400, 7, 0, -1),
        (500, 7, 1, 0),
        (600, 7, 0, 1),
        (700, 7, 0, -1),
    ]


def test_other_forks_are_other_blocks() -> None:
    taker = _Taker(lambda kind, fork: 0, ())
    found = taker.take([line(100, "Heap", "INSERT", "blk 7", "fork vm blk 7 FPW")], 1)
    assert [(r.fork, r.block, r.image) for r in found] == [(FORK, 7, -1), ((*FORK[:3], "vm"), 7, 1)]
