"""What can be restored, against a model that looks at every position by itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fix_archive import a_backup
from knockwood.model import Lsn, Timeline, TimelineHistory, WalSegment
from knockwood.repository.backups.model import Backup
from knockwood.repository.inventory import ArchiveInventory
from knockwood.repository.route import Break, Route, WalFacts, record_floor
from knockwood.repository.windows import survey

SIZE = 1 << 20
LAST = 12
BEGUN = datetime(2026, 1, 1, tzinfo=UTC)

numbers = st.frozensets(st.integers(1, LAST), min_size=1)


def _at(number: int, part: float = 0.0) -> Lsn:
    return Lsn(int((number + part) * SIZE))


@st.composite
def archives(draw: st.DrawFn) -> tuple[ArchiveInventory, list[Backup], WalFacts, Lsn | None]:
    """Two timelines at most, the second leaving the first a quarter into some segment."""
    first = draw(numbers | st.just(frozenset(range(1, LAST + 1))))
    switch = draw(st.none() | st.integers(2, LAST - 1))
    segments = {Timeline(1): tuple(sorted(first))}
    histories = {}
    if switch is not None:
        second = draw(numbers | st.just(frozenset(range(1, LAST + 1))))
        segments[Timeline(2)] = tuple(sorted(n for n in second if n >= switch))
        segments = {t: found for t, found in segments.items() if found}
        histories = {Timeline(2): TimelineHistory(Timeline(2), ((Timeline(1), _at(switch, 0.25)),))}
    backups = []
    for index, number in enumerate(sorted(draw(st.frozensets(st.integers(1, LAST - 1), max_size=3)))):
        length = draw(st.integers(0, 2))
        timeline = 2 if switch is not None and number > switch else 1
        moment = BEGUN + timedelta(minutes=number)
        backups.append(a_backup(f"b{index}", timeline, _at(number, 0.1), _at(number + length, 0.2), moment))
    breaks = []
    for number in draw(st.frozensets(st.integers(1, LAST), max_size=2)):
        segment = WalSegment(Timeline(draw(st.sampled_from([1, 2]))), number, SIZE)
        breaks.append(Break(segment.timeline, _at(number, 0.3), None, segment, segment.name, "damaged"))
    inventory = ArchiveInventory(SIZE, segments, (), histories)
    return inventory, backups, WalFacts({}, tuple(breaks)), _at(switch, 0.25) if switch else None


def _readable(
    inventory: ArchiveInventory, facts: WalFacts, switch: Lsn | None, start: Lsn, position: Lsn
) -> bool:
    """Whether every byte from `start` up to `position` is there and whole, looked at file by file."""
    for number in range(start.value // SIZE, position.value // SIZE + 1):
        low, high = max(start, _at(number)), min(position, _at(number + 1))
        if low >= high:
            continue
        child = switch is not None and number >= switch.value // SIZE
        held = [t for t in (2, 1) if number in inventory.segments.get(Timeline(t), ())]
        if not child:
            held = [t for t in held if t == 1]
        if not held or (child and held[0] == 1 and switch is not None and high > switch):
            return False
        for damage in facts.breaks:
            if (damage.timeline, damage.segment.number) == (held[0], number) and (
                (low <= damage.at < high) or damage.at < low
            ):
                return False
    return True


def _usable(
    inventory: ArchiveInventory, backups: Sequence[Backup], facts: WalFacts, switch: Lsn | None
) -> list[Backup]:
    return [
        b
        for b in backups
        if (b.timeline == 2 or switch is None or b.stop_lsn <= switch)
        and _readable(inventory, facts, switch, b.start_lsn, b.stop_lsn)
    ]


@given(archives())
def test_windows_hold_exactly_what_can_be_restored(
    made: tuple[ArchiveInventory, list[Backup], WalFacts, Lsn | None],
) -> None:
    inventory, backups, facts, switch = made
    newest = 2 if switch is not None else 1
    found = survey(backups, inventory, facts)
    windows = [w for w in found.windows if w.timeline == newest]
    gaps = [g for g in found.gaps if g.timeline == newest or g.end_time is not None or not windows]
    usable = [b for b in _usable(inventory, backups, facts, switch) if b.id not in _ids(found.unusable)]
    on_route = [b for b in backups if b.timeline == 2 or switch is None or b.stop_lsn <= switch]
    end = Route(inventory, Timeline(newest)).archive_end()
    for number in range(1, LAST + 1):
        for part in (0.22, 0.5, 0.9):
            position = _at(number, part)
            can = any(
                b.stop_lsn <= position and _readable(inventory, facts, switch, b.start_lsn, position)
                for b in usable
            )
            inside = any(w.start <= position <= w.end for w in windows)
            assert inside == can, (position, found)
            lost = on_route and min(b.start_lsn for b in on_route) <= position < end and not can
            begun = min((b.start_lsn for b in usable), default=end)
            warming = usable and begun <= position < min(b.stop_lsn for b in usable)
            if lost and not warming:
                assert any(g.start <= position < g.end for g in gaps), (position, found)


def _ids(unusable: Sequence[object]) -> set[str]:
    return {str(getattr(one, "backup", "")) for one in unusable}


@given(archives())
def test_windows_do_not_overlap_and_gaps_touch_none(
    made: tuple[ArchiveInventory, list[Backup], WalFacts, Lsn | None],
) -> None:
    found = survey(made[1], made[0], made[2])
    for timeline in {w.timeline for w in found.windows}:
        ranges = sorted((w.start, w.end) for w in found.windows if w.timeline == timeline)
        assert all(a[1] < b[0] for a, b in pairwise(ranges))
        for gap in (g for g in found.gaps if g.timeline == timeline):
            assert all(gap.end <= start or end <= gap.start for start, end in ranges)


def test_a_healthy_archive_is_one_window_and_no_gap() -> None:
    inventory = ArchiveInventory(SIZE, {Timeline(1): tuple(range(1, 10))})
    backups = [a_backup(f"b{n}", 1, _at(n, 0.1), _at(n, 0.2), BEGUN) for n in (2, 5)]
    found = survey(backups, inventory, WalFacts())
    assert [(w.start, w.end, w.backup) for w in found.windows] == [(_at(2, 0.2), _at(10), "b2")]
    assert found.gaps == ()
    assert found.unusable == ()


def test_the_abandoned_end_of_a_timeline_is_a_window_of_its_own() -> None:
    history = TimelineHistory(Timeline(2), ((Timeline(1), _at(5, 0.5)),))
    inventory = ArchiveInventory(
        SIZE, {Timeline(1): tuple(range(1, 8)), Timeline(2): (5, 6, 7, 8)}, (), {Timeline(2): history}
    )
    found = survey([a_backup("b", 1, _at(2, 0.1), _at(2, 0.2), BEGUN)], inventory, WalFacts())
    assert [(w.timeline, w.start, w.end) for w in found.windows] == [
        (2, _at(2, 0.2), _at(9)),
        (1, _at(5, 0.5), _at(8)),
    ]
    assert found.gaps == ()


def test_an_incremental_backup_without_its_parent_is_unusable() -> None:
    inventory = ArchiveInventory(SIZE, {Timeline(1): tuple(range(1, 8))})
    lonely = a_backup("b", 1, _at(2, 0.1), _at(2, 0.2), BEGUN, parent="gone")
    found = survey([lonely], inventory, WalFacts())
    assert found.windows == ()
    assert "gone" in found.unusable[0].reason
    assert (found.gaps[0].start, found.gaps[0].end) == (lonely.start_lsn, _at(8))


def test_a_position_after_a_page_header_is_the_pages_begin() -> None:
    assert record_floor(_at(5) + 40, SIZE) == _at(5)
    assert record_floor(_at(5) + 8192 + 24, SIZE) == _at(5) + 8192
    assert record_floor(_at(5) + 8192 + 32, SIZE) == _at(5) + 8192 + 32
