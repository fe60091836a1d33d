"""Gaps: recorded and computed ones, told once, until filled."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import UsageError
from knockwood.model import Severity
from knockwood.model.wal import Lsn, Timeline, WalRange
from knockwood.repository import gaps
from knockwood.repository.gaps import Gap, combine
from knockwood.repository.inventory import ArchiveInventory
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage

MB = 1 << 20
ONE = Timeline(1)
MOMENT = datetime(2026, 11, 21, tzinfo=UTC)


def stretch(start: int, end: int) -> WalRange:
    return WalRange(ONE, Lsn(start * MB), Lsn(end * MB))


def repository(folder: Path) -> Repository:
    return Repository.create(open_storage(str(folder)), cluster="shop", system_identifier=7, segment_bytes=MB)


@given(
    st.sets(st.integers(0, 9), min_size=1),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=3),
)
def test_every_hole_is_told_once(numbers: set[int], recorded: list[tuple[int, int]]) -> None:
    stock = ArchiveInventory(MB, {ONE: tuple(sorted(numbers))})
    known = [Gap(stretch(a, a + n), "recorded", MOMENT) for a, n in dict(recorded).items()]
    told = combine(stock, known)
    holes = {n for n in range(min(numbers), max(numbers)) if n not in numbers}
    inside = {n for gap in told for n in range(gap.range.start.value // MB, gap.range.end.value // MB)}
    assert holes <= inside
    computed = [gap for gap in told if gap.detected_at is None]
    for gap in computed:
        assert not any(
            k.range.start < gap.range.end and gap.range.start < k.range.end
            for k in told
            if k.detected_at is not None
        )
    # A recorded gap goes only when it is filled.
    for gap in known:
        assert (gap in told) == (not stock.covers(gap.range))


def test_recorded_acknowledged_filled(tmp_path: Path) -> None:
    where = repository(tmp_path)
    gap = stretch(3, 5)
    assert gaps.record(where, gap, "removed")
    assert not gaps.record(where, gap, "removed")
    (found,) = gaps.list_gaps(where)
    assert found.range == gap
    assert found.acknowledged is None
    assert found.finding("shop").severity == Severity.CRITICAL
    with pytest.raises(UsageError):
        gaps.acknowledge(where, stretch(3, 6), "ann", "")
    gaps.acknowledge(where, gap, "ann", "old data")
    gaps.acknowledge(where, gap, "bob", "again")
    (seen,) = gaps.list_gaps(where)
    assert seen.acknowledged is not None
    assert (seen.acknowledged.by, seen.acknowledged.note) == ("ann", "old data")
    assert seen.finding("shop").severity == Severity.LOW
    assert gaps.list_gaps(where, ArchiveInventory(MB, {ONE: (2, 3, 4)})) == ()


def test_a_computed_gap_is_written_down_when_it_is_acknowledged(tmp_path: Path) -> None:
    where = repository(tmp_path)
    for number in (1, 4):
        name = f"wal/00000001/0000000100000000/0000000100000000{number:08X}"
        where.put(name, [b"x"])
    (gap,) = gaps.list_gaps(where)
    assert gap.range == stretch(2, 4)
    assert gap.detected_at is None
    gaps.acknowledge(where, gap.range, "ann", "")
    (seen,) = gaps.list_gaps(where)
    assert seen.acknowledged is not None
    assert seen.detected_at is not None
