"""Parts of transactions that end in a later segment, as transaction ids go round."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from knockwood.history.carried import Carried
from knockwood.history.store import Head, OpenTransaction
from knockwood.model.wal import Timeline, WalSegment

SIZE = 1 << 20
ROUND = 1 << 32


def head(
    number: int,
    opened: list[OpenTransaction],
    ended: list[int],
    highest: int | None,
    *,
    start: int | None = None,
    next_xid: int | None = None,
) -> Head:
    segment = WalSegment(Timeline(1), number, SIZE)
    return Head(
        segment=segment,
        source=segment.name,
        source_bytes=1,
        start=segment.start.value if start is None else start,
        end=segment.end.value,
        major=18,
        records=1,
        commits=len(ended),
        xids=(min(ended), max(ended)) if ended else None,
        times=None,
        relations=(),
        changed=frozenset(),
        opened=tuple(opened),
        messages=(),
        most=0,
        highest_xid=highest,
        next_xid=next_xid,
    )


@dataclass(frozen=True)
class Life:
    """A transaction: its 64-bit number, the segments that hold parts of it, and the one it ends in."""

    xid: int
    parts: tuple[int, ...]
    end: int | None


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[int], list[Life]]:
    """The highest number that each segment leads to, and transactions that were given one by then."""
    count = draw(st.integers(1, 12))
    steps = st.sampled_from([0, 1, 3, 1000, (1 << 31) - 1])
    highest = [draw(st.integers(ROUND + 3, ROUND + 50) | st.integers(2 * ROUND - 3, 2 * ROUND + 3))]
    for _ in range(count - 1):
        highest.append(highest[-1] + draw(steps))
    found: dict[int, Life] = {}
    for _ in range(draw(st.integers(0, 12))):
        begin = draw(st.integers(0, count - 1))
        xid = max(highest[begin] - draw(st.integers(0, 3)), highest[begin - 1] + 1 if begin else 0)
        if xid > highest[begin] or xid in found:
            continue
        end = draw(st.none() | st.integers(begin, count - 1))
        while end is not None and highest[end] - xid >= 1 << 31:
            end -= 1  # no transaction lives longer
        reach = count if end is None else end
        later = [number for number in range(begin, reach) if highest[number] - xid < 1 << 31]
        parts = draw(st.lists(st.sampled_from(later), unique=True)) if later else []
        found[xid] = Life(xid, tuple(sorted(parts)), end)
    return highest, list(found.values())


@given(lives())
def test_each_has_its_own_parts(given_lives: tuple[list[int], list[Life]]) -> None:
    highest, transactions = given_lives
    heads = [
        head(
            number,
            [
                OpenTransaction(one.xid % ROUND, number, one.xid >> 32)
                for one in transactions
                if number in one.parts
            ],
            sorted(one.xid % ROUND for one in transactions if one.end == number),
            top % ROUND,
        )
        for number, top in enumerate(highest)
    ]
    carried = Carried(heads)
    for one in transactions:
        if one.end is None:
            continue
        told = carried.of(one.end, one.xid % ROUND)
        assert [(part.first, part.bytes) for _, part in told] == [(n, one.xid >> 32) for n in one.parts]
        assert [base for base, _ in told] == [number * SIZE for number in one.parts]
        assert (one.xid % ROUND in carried.ending(one.end, heads[one.end])) == bool(one.parts)


def test_what_ends_is_asked_for_by_what_it_did() -> None:
    wanted = OpenTransaction(20, 0, 7)
    heads = [head(0, [OpenTransaction(10, 0, 5), wanted], [], 20), head(1, [], [10, 20], 21)]
    carried = Carried(heads)
    assert list(carried.ending(1, heads[1])) == [10, 20]
    assert list(carried.ending(1, heads[1], lambda part: part.bytes == 7)) == [20]
    assert list(carried.ending(0, heads[0])) == []


def test_after_a_hole_only_what_began_later_is_complete() -> None:
    heads = [
        head(0, [], [], 10, next_xid=8),
        head(1, [], [], 12),
        head(3, [], [], 30, next_xid=25),
        head(4, [], [], 31),
    ]
    carried = Carried(heads)
    assert [carried.complete(1, xid) for xid in (7, 8, 12)] == [False, True, True]
    assert [carried.complete(3, xid) for xid in (12, 24, 25)] == [False, False, True]
    assert not Carried([head(0, [], [], None)]).complete(0, 5)
