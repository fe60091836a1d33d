"""Retention as a pure plan, for any mixture of backups."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fix_archive import a_backup
from knockwood.model import Lsn, Timeline, Verdict, WalSegment
from knockwood.repository.backups.expire import ExpiryPlan, plan_expiry
from knockwood.repository.backups.model import Backup
from knockwood.repository.inventory import ArchiveInventory, Partial

NOW = datetime(2026, 6, 1, tzinfo=UTC)
SEGMENT = 1 << 20


@st.composite
def histories(draw: st.DrawFn) -> list[Backup]:
    """Backups of one cluster in order of time, incremental ones upon any earlier one."""
    made: list[Backup] = []
    count = draw(st.integers(0, 9))
    for number in range(count):
        day = NOW - timedelta(days=3 * (count - number), hours=draw(st.integers(0, 5)))
        parent = draw(st.sampled_from(made)).id if made and draw(st.booleans()) else None
        start = Lsn((10 * number + draw(st.integers(1, 5))) * SEGMENT + 40)
        backup = a_backup(
            f"b{number}", 1, start, start + 1000, day,
            health=draw(st.sampled_from(list(Verdict))), parent=parent,
        )  # fmt: skip
        made.append(backup)
    return made


INVENTORY = ArchiveInventory(
    SEGMENT,
    {Timeline(1): tuple(range(100)), Timeline(2): tuple(range(3, 60))},
    tuple(Partial(WalSegment(Timeline(1), n, SEGMENT), Lsn(n * SEGMENT + 9), f"p{n}") for n in (2, 50, 99)),
    {},
)
PROOFS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "backup": st.sampled_from([f"b{n}" for n in range(9)]),
                "verdict": st.sampled_from(["held", "broken", "not_checked"]),
            }
        ),
        st.sampled_from([None, 3, "held", [], {}, {"verdict": "held"}, {"backup": [], "verdict": "held"}]),
    ),
    max_size=6,
)
TIMES = st.none() | st.integers(0, 40).map(lambda days: timedelta(days=days))
COUNTS = st.none() | st.integers(0, 5)


def plan(
    backups: list[Backup], proofs: list[Any], time: timedelta | None, count: int | None
) -> tuple[ExpiryPlan, list[Backup]]:
    made = plan_expiry(backups, proofs, INVENTORY, keep_time=time, keep_count=count, now=NOW)
    gone = {backup.id for backup in made.remove}
    left = [backup for backup in backups if backup.id not in gone]
    assert {backup.id for backup in left} == set(made.kept)
    return made, left


@given(histories(), PROOFS, TIMES, COUNTS)
def test_no_chain_is_ever_broken_at_any_step(
    backups: list[Backup], proofs: list[Any], time: timedelta | None, count: int | None
) -> None:
    made, _ = plan(backups, proofs, time, count)
    present = {backup.id for backup in backups}
    for step in made.remove:
        present.discard(step.id)
        assert all(b.parent in present for b in backups if b.id in present and b.parent is not None)


@given(histories(), PROOFS, TIMES, COUNTS)
def test_the_newest_and_the_newest_proved_clean_stay(
    backups: list[Backup], proofs: list[Any], time: timedelta | None, count: int | None
) -> None:
    _, left = plan(backups, proofs, time, count)
    ids = {backup.id for backup in left}
    clean = {
        proof["backup"]
        for proof in proofs
        if isinstance(proof, dict) and proof.get("verdict") == "held" and isinstance(proof.get("backup"), str)
    }
    if backups:
        assert backups[-1].id in ids
    if proved := [backup.id for backup in backups if backup.id in clean]:
        assert proved[-1] in ids
    if sound := [backup.id for backup in backups if backup.health.verdict != Verdict.BROKEN]:
        assert sound[-1] in ids


@given(histories(), PROOFS, TIMES, COUNTS)
def test_no_wal_that_a_kept_backup_needs_goes(
    backups: list[Backup], proofs: list[Any], time: timedelta | None, count: int | None
) -> None:
    made, left = plan(backups, proofs, time, count)
    gone = set(made.remove_wal)
    for backup in left:
        first = WalSegment.containing(backup.timeline, backup.start_lsn, SEGMENT)
        for timeline, numbers in INVENTORY.segments.items():
            needed = {WalSegment(timeline, n, SEGMENT) for n in numbers if n >= first.number}
            assert not needed & gone
        assert not [
            p for p in INVENTORY.partials if p.name in made.remove_partials and p.end > backup.start_lsn
        ]
    if not left:
        assert not gone


@given(histories(), PROOFS, st.integers(0, 40))
def test_every_moment_of_the_time_to_keep_stays_restorable(
    backups: list[Backup], proofs: list[Any], days: int
) -> None:
    _, left = plan(backups, proofs, timedelta(days=days), None)
    since = NOW - timedelta(days=days)
    ids = {backup.id for backup in left}
    before = [backup.id for backup in backups if backup.finished_at < since]
    assert not before or before[-1] in ids
    assert all(backup.id in ids for backup in backups if backup.finished_at >= since)


@given(histories(), PROOFS, st.integers(1, 5))
def test_so_many_full_backups_stay(backups: list[Backup], proofs: list[Any], count: int) -> None:
    _, left = plan(backups, proofs, None, count)
    full = [backup for backup in backups if backup.kind == "full"]
    sound = [backup for backup in full if backup.health.verdict != Verdict.BROKEN]
    ids = {backup.id for backup in left}
    assert all(backup.id in ids for backup in sound[-count:])
    if len(sound) < count:
        assert all(backup.id in ids for backup in full)


@given(histories(), PROOFS)
def test_without_retention_nothing_goes(backups: list[Backup], proofs: list[Any]) -> None:
    made, left = plan(backups, proofs, None, None)
    assert (left, made.remove_wal, made.remove_partials) == (backups, (), ())


@given(histories(), PROOFS, TIMES, COUNTS)
def test_a_second_run_finds_nothing_more_to_remove(
    backups: list[Backup], proofs: list[Any], time: timedelta | None, count: int | None
) -> None:
    _, left = plan(backups, proofs, time, count)
    again, _ = plan(left, proofs, time, count)
    assert again.remove == ()


def test_old_backups_and_their_wal_go() -> None:
    backups = [
        a_backup(f"b{n}", 1, Lsn(10 * n * SEGMENT), Lsn((10 * n + 1) * SEGMENT), NOW - timedelta(days=10 - n))
        for n in range(1, 6)
    ]
    made, left = plan(backups, [], None, 2)
    assert [backup.id for backup in left] == ["b4", "b5"]
    assert [backup.id for backup in made.remove] == ["b3", "b2", "b1"]
    assert [(r.timeline, str(r.end)) for r in made.wal_ranges] == [(1, "0/02800000"), (2, "0/02800000")]
    assert made.remove_partials == ("p2",)
    assert made.kept["b5"] == "it is the newest"
    again = plan([replace(backup, parent=None) for backup in left], [], None, 2)[0]
    assert again.remove == ()


def test_a_clock_that_jumped_does_not_cost_the_newest_backup() -> None:
    future = a_backup("future", 1, Lsn(10 * SEGMENT), Lsn(11 * SEGMENT), NOW + timedelta(days=900))
    true = a_backup("true", 1, Lsn(30 * SEGMENT), Lsn(31 * SEGMENT), NOW)
    for time, count in ((None, 1), (timedelta(days=1), None), (timedelta(0), 0)):
        _, left = plan([future, true], [], time, count)
        assert "true" in {backup.id for backup in left}


def test_a_newer_timeline_is_newer_whatever_its_lsn() -> None:
    dead = a_backup("dead", 1, Lsn(90 * SEGMENT), Lsn(91 * SEGMENT), NOW - timedelta(days=2))
    live = a_backup("live", 2, Lsn(50 * SEGMENT), Lsn(51 * SEGMENT), NOW)
    made, left = plan([dead, live], [], None, 1)
    assert [backup.id for backup in left] == ["live"]
    assert made.kept == {"live": "it is the newest"}
