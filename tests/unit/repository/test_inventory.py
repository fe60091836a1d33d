"""The inventory against a model that knows, byte range by byte range, what the archive holds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalRange, WalSegment
from knockwood.repository.inventory import (
    ArchiveInventory,
    Partial,
    history_object,
    merged,
    partial_object,
    segment_object,
    split,
    subtracted,
)

MB = 1 << 20
# The model's unit: a segment has four quarters, each there or not.
QUARTER = MB // 4
ONE, TWO = Timeline(1), Timeline(2)


def inventory(
    numbers: Mapping[int, set[int]], partials: Mapping[tuple[int, int], int], switch: int | None
) -> ArchiveInventory:
    names = [
        segment_object(WalSegment(Timeline(t), n, MB)) + ".zst" for t, found in numbers.items() for n in found
    ]
    for (timeline, number), quarters in partials.items():
        segment = WalSegment(Timeline(timeline), number, MB)
        names.append(partial_object(segment, segment.start + quarters * QUARTER) + ".zst.age")
    histories = {TWO: TimelineHistory(TWO, ((ONE, Lsn(switch * QUARTER)),))} if switch is not None else {}
    return ArchiveInventory.of_names(MB, names, histories)


segments = st.sets(st.integers(0, 9), max_size=10)
partials = st.dictionaries(st.tuples(st.just(1), st.integers(0, 9)), st.integers(1, 4), max_size=3)


@given(segments, partials)
def test_one_timeline_matches_the_model(numbers: set[int], parts: dict[tuple[int, int], int]) -> None:
    stock = inventory({1: numbers}, parts, None)
    held = {n * 4 + q for n in numbers for q in range(4)}
    held |= {number * 4 + q for (_, number), count in parts.items() for q in range(count)}
    for start in range(41):
        end = start
        while end in held:
            end += 1
        assert stock.end_from(ONE, Lsn(start * QUARTER)) == Lsn(end * QUARTER)
        for stop in (start, start + 1, end, end + 1):
            covered = all(q in held for q in range(start, stop))
            if stop >= start:
                assert stock.covers(WalRange(ONE, Lsn(start * QUARTER), Lsn(stop * QUARTER))) == covered
    holes = {q for q in range(min(held, default=0), max(held, default=0)) if q not in held}
    told = [q for gap in stock.gaps() for q in range(gap.start.value // QUARTER, gap.end.value // QUARTER)]
    assert set(told) == holes
    assert len(told) == len(holes)


@given(segments, segments, st.integers(1, 36))
def test_two_timelines_match_the_model(first: set[int], second: set[int], switch: int) -> None:
    second = {n for n in second if n >= switch // 4}
    stock = inventory({1: first, 2: second}, {}, switch)
    # The child's first segment begins with the parent's bytes.
    held = {n * 4 + q for n in second for q in range(4)}
    held |= {n * 4 + q for n in first for q in range(4) if n * 4 + q < switch}
    for start in range(41):
        end = start
        while end in held:
            end += 1
        assert stock.end_from(TWO, Lsn(start * QUARTER)) == Lsn(end * QUARTER)
    holes = {q for q in range(min(held, default=0), max(held, default=0)) if q not in held}
    told = {
        (gap.timeline, q)
        for gap in stock.gaps()
        for q in range(gap.start.value // QUARTER, gap.end.value // QUARTER)
    }
    if second:
        assert {q for t, q in told if t == 2} == {q for q in holes if q >= switch}
        assert {q for q in holes if q < switch} <= {q for t, q in told if t == 1}


@given(segments, partials)
def test_source_is_the_whole_else_the_longest_partial(
    numbers: set[int], parts: dict[tuple[int, int], int]
) -> None:
    stock = inventory({1: numbers}, parts, None)
    for number in range(10):
        segment = WalSegment(ONE, number, MB)
        source = stock.source(segment)
        if number in numbers:
            assert source == "segment"
        elif (1, number) in parts:
            assert isinstance(source, Partial)
            assert source.end == segment.start + parts[1, number] * QUARTER
        else:
            assert source is None


def test_the_longest_of_several_partials() -> None:
    segment = WalSegment(ONE, 3, MB)
    names = [partial_object(segment, segment.start + size) + ".zst" for size in (8, 4096, 512)]
    stock = ArchiveInventory.of_names(MB, names)
    assert stock.end_from(ONE, segment.start) == segment.start + 4096


def test_foreign_names_are_passed_over() -> None:
    segment = WalSegment(ONE, 3, MB)
    names = [
        "wal/00000001/0000000100000000/nonsense.zst",
        "wal/00000001/0000000100000000/000000010000000000001000.zst",  # no such number with 1 MB
        partial_object(segment, segment.start),  # holds nothing
        partial_object(segment, segment.end + 8),  # more than a segment
        history_object(TWO) + ".zst",
        "wal/sums/00000001/x.json",
    ]
    assert ArchiveInventory.of_names(MB, names) == ArchiveInventory(MB)


def test_a_timeline_without_its_history_is_told() -> None:
    stock = inventory({1: {1}, 2: {2}}, {}, None)
    assert stock.without_history == (TWO,)
    assert stock.end_from(TWO, Lsn(MB)) == Lsn(MB)


def test_what_was_expired_is_no_gap() -> None:
    """After expiry the archive begins on the second timeline, long after the switch."""
    assert inventory({2: {7, 8}}, {}, 4).gaps() == ()


def test_a_hole_across_a_switch_is_told_on_both_timelines() -> None:
    stock = inventory({1: {0}, 2: {3}}, {}, 6)
    middle = Lsn(6 * QUARTER)
    assert stock.gaps() == (WalRange(ONE, Lsn(MB), middle), WalRange(TWO, middle, Lsn(3 * MB)))


pieces = st.builds(
    lambda t, a, n: WalRange(Timeline(t), Lsn(a), Lsn(a + n)),
    st.integers(1, 2),
    st.integers(0, 40),
    st.integers(0, 10),
)


def points(ranges: tuple[WalRange, ...] | list[WalRange]) -> set[tuple[int, int]]:
    return {(r.timeline, p) for r in ranges for p in range(r.start.value, r.end.value)}


@given(st.lists(pieces, max_size=8))
def test_merged_holds_the_same_positions(ranges: list[WalRange]) -> None:
    result = merged(ranges)
    assert points(result) == points(ranges)
    for left, right in pairwise(result):
        assert left.timeline < right.timeline or left.end < right.start


@given(pieces, st.lists(pieces, max_size=6))
def test_subtracted_holds_the_rest(piece: WalRange, others: list[WalRange]) -> None:
    assert points(subtracted(piece, others)) == points([piece]) - points(others)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_split_cuts_at_the_switches(a: int, b: int, c: int, d: int) -> None:
    first, second = sorted((a, b))
    start, end = sorted((c, d))
    path = TimelineHistory(Timeline(3), ((ONE, Lsn(first)), (TWO, Lsn(second)))).path()
    told = points(list(split(path, Lsn(start), Lsn(end))))
    assert told == {(1 if p < first else 2 if p < second else 3, p) for p in range(start, end)}
