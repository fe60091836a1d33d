"""Targets as text, and the choice among backups and commits, on archives made of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fix_archive import a_backup
from knockwood.errors import ObjectMissingError, TargetUnreachableError, UsageError
from knockwood.model import Commit, Lsn, Timeline, Verdict
from knockwood.repository.backups.model import Backup
from knockwood.repository.choose import Choice, choose
from knockwood.repository.inventory import ArchiveInventory
from knockwood.repository.plans import BeforeXid, Latest, RestorePlan, Target, ToLsn, ToTime
from knockwood.repository.route import Route, WalFacts
from knockwood.repository.targets import parse_target

SIZE = 1 << 20
BEGUN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("latest", Latest()),
        (" Latest ", Latest()),
        ("16/B374D848", ToLsn(Lsn(0x16B374D848))),
        ("before-1234", BeforeXid(1234)),
        ("before-xid-1234", BeforeXid(1234)),
        ("before-4294968530", BeforeXid(1234)),
        ("2026-01-01T02:00:00+02:00", ToTime(BEGUN)),
        ("2026-01-01 00:00:00+00", ToTime(BEGUN)),
        ("2026-01-01T00:00:00Z", ToTime(BEGUN)),
        ("2026-01-01 00:00:00 UTC", ToTime(BEGUN)),
    ],
)
def test_targets_are_read(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("lastest", "latest"),
        ("1234", "before-1234"),
        ("16/XYZ", "16/B374D848"),
        ("2026-01-01T00:00:00", "Z (UTC)"),
        ("before-1", "begin at 3"),
        ("", "give latest"),
        ("yesterday", "give latest"),
    ],
)
def test_what_is_no_target_gets_a_suggestion(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_target(text)
    assert refused.value.hint is not None
    assert hint in refused.value.hint


@dataclass(frozen=True)
class Known:
    """A CommitLookup over a list."""

    commits: Sequence[Commit]
    facts: WalFacts = field(default_factory=WalFacts)

    def _in(self, start: Lsn, end: Lsn) -> list[Commit]:
        return [c for c in self.commits if start <= c.lsn < end]

    def read(self, route: Route, start: Lsn, end: Lsn) -> WalFacts:
        return self.facts

    def last(self, route: Route, start: Lsn, end: Lsn) -> Commit | None:
        return max(self._in(start, end), key=lambda c: c.lsn, default=None)

    def first_after(self, route: Route, moment: datetime, start: Lsn, end: Lsn) -> Commit | None:
        return next((c for c in self._in(start, end) if c.time > moment), None)

    def of(self, route: Route, xid: int, start: Lsn, end: Lsn) -> Commit | None:
        return next((c for c in self._in(start, end) if c.xid == xid), None)

    def count(self, route: Route, start: Lsn, end: Lsn) -> int:
        return len(self._in(start, end))


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Commit], int, list[int]]:
    """Commits in order of LSN whose times tie and swap; how many segments there are; where backups are."""
    count = draw(st.integers(1, 10))
    seconds = sorted(draw(st.lists(st.integers(0, 40), min_size=count, max_size=count)))
    for index in draw(st.lists(st.integers(0, count - 2), max_size=3)) if count > 1 else []:
        seconds[index], seconds[index + 1] = seconds[index + 1], seconds[index]
    commits = [
        Commit(100 + i, Lsn((3 + i) * SIZE // 2 + 64), BEGUN + timedelta(seconds=s))
        for i, s in enumerate(seconds)
    ]
    return commits, 10, sorted(draw(st.frozensets(st.integers(1, 7), min_size=1, max_size=3)))


targets = (
    st.just(Latest())
    | st.integers(SIZE, 9 * SIZE).map(lambda n: ToLsn(Lsn(n)))
    | st.integers(-2, 42).map(lambda s: ToTime(BEGUN + timedelta(seconds=s)))
    | st.integers(99, 111).map(BeforeXid)
)


@given(histories(), targets, st.none() | st.integers(1, 9))
def test_a_plan_ends_at_its_target_or_is_refused(
    made: tuple[list[Commit], int, list[int]], target: Target, lost: int | None
) -> None:
    commits, count, places = made
    present = tuple(n for n in range(count) if n != lost)
    backups = []
    for number in places:
        stop = Lsn(number * SIZE + 2048)
        ended = max([c.time for c in commits if c.lsn < stop], default=BEGUN - timedelta(seconds=1))
        backups.append(a_backup(f"b{number}", 1, Lsn(number * SIZE + 1024), stop, ended))
    choice = Choice(target, backups, ArchiveInventory(SIZE, {Timeline(1): present}))
    try:
        plan = choose(choice, lambda major: Known(commits))
    except TargetUnreachableError:
        assert lost is not None or _beyond(target, commits, min(b.stop_lsn for b in backups), backups)
        return
    assert plan.missing is None
    assert [p.segment.number for p in plan.wal] == list(
        range(plan.wal[0].segment.number, plan.wal[-1].segment.number + 1)
    )
    contained = [c for c in commits if c.lsn < plan.backup.stop_lsn or _reached(plan, c)]
    assert contained == _meant(target, commits, plan), (target, plan)


def _beyond(target: Target, commits: list[Commit], first: Lsn, backups: list[Backup]) -> bool:
    """Whether a target lies outside of a whole archive: before its first backup or after its end."""
    if isinstance(target, Latest):
        return False
    if isinstance(target, ToLsn):
        return target.lsn < first
    if isinstance(target, BeforeXid):
        return all(c.xid != target.xid or c.lsn < first for c in commits)
    after = [c for c in commits if c.lsn >= first]
    return min(b.finished_at for b in backups) > target.time or not any(c.time > target.time for c in after)


def _reached(plan: RestorePlan, commit: Commit) -> bool:
    if plan.target_lsn is None:
        return False
    return commit.lsn <= plan.target_lsn if plan.inclusive else commit.lsn < plan.target_lsn


def _meant(target: Target, commits: list[Commit], plan: RestorePlan) -> list[Commit]:
    """The commits that the target means, told by its definition."""
    if isinstance(target, Latest):
        return commits
    if isinstance(target, ToLsn):
        return [c for c in commits if c.lsn <= target.lsn]
    if isinstance(target, BeforeXid):
        (culprit,) = [c for c in commits if c.xid == target.xid]
        return [c for c in commits if c.lsn < culprit.lsn]
    later = [c for c in commits if c.time > target.time and c.lsn >= plan.backup.stop_lsn]
    return [c for c in commits if c.lsn < later[0].lsn] if later else commits


def _plain() -> tuple[list[Commit], ArchiveInventory]:
    commits = [Commit(100 + n, Lsn(n * SIZE + 5000), BEGUN + timedelta(seconds=n)) for n in range(2, 8)]
    return commits, ArchiveInventory(SIZE, {Timeline(1): tuple(range(1, 9))})


def test_a_backup_with_bad_pages_is_taken_only_if_no_better_one_leads_there() -> None:
    commits, inventory = _plain()
    good = a_backup("good", 1, Lsn(SIZE + 1024), Lsn(SIZE + 2048), BEGUN)
    bad = a_backup("bad", 1, Lsn(4 * SIZE + 1024), Lsn(4 * SIZE + 2048), BEGUN, health=Verdict.BROKEN)
    plan = choose(Choice(Latest(), [good, bad], inventory), lambda major: Known(commits))
    assert plan.backup == good
    assert plan.warnings == ()
    holed = ArchiveInventory(SIZE, {Timeline(1): (1, 2, 4, 5, 6, 7, 8)})
    plan = choose(Choice(Latest(), [good, bad], holed), lambda major: Known(commits))
    assert plan.backup == bad
    assert "bad pages" in plan.warnings[0]


def test_an_incremental_backup_is_taken_once_it_was_proved() -> None:
    """PostgreSQL may leave pages out of it: until then the full one below it, and more WAL."""
    commits, inventory = _plain()
    full = a_backup("full", 1, Lsn(SIZE + 1024), Lsn(SIZE + 2048), BEGUN)
    later = a_backup("later", 1, Lsn(4 * SIZE + 1024), Lsn(4 * SIZE + 2048), BEGUN, parent="full")

    def chosen(proved: frozenset[str] | None) -> tuple[Backup, tuple[str, ...]]:
        choice = Choice(Latest(), [full, later], inventory, proved=proved)
        plan = choose(choice, lambda major: Known(commits))
        return plan.backup, plan.warnings

    assert chosen(None) == (later, ())
    assert chosen(frozenset({"full"})) == (full, ())
    assert chosen(frozenset({"later"})) == (later, ())
    # Asked for, or where no other leads there, it is better than nothing.
    holed = ArchiveInventory(SIZE, {Timeline(1): (1, 2, 4, 5, 6, 7, 8)})
    for known, backup in ((inventory, "later"), (holed, None)):
        choice = Choice(Latest(), [full, later], known, backup=backup, proved=frozenset())
        plan = choose(choice, lambda major: Known(commits))
        assert plan.backup == later
        assert "never proved" in plan.warnings[0]


def test_a_loss_is_accepted_with_what_is_known_of_it() -> None:
    commits, _ = _plain()
    holed = ArchiveInventory(SIZE, {Timeline(1): (1, 2, 3, 5, 6, 7, 8)})
    backup = a_backup("b", 1, Lsn(SIZE + 1024), Lsn(SIZE + 2048), BEGUN)
    with pytest.raises(TargetUnreachableError, match="transaction 103 at"):
        choose(Choice(Latest(), [backup], holed), lambda major: Known(commits))
    plan = choose(Choice(Latest(), [backup], holed, accept_loss=True), lambda major: Known(commits))
    assert plan.last_commit == commits[1]
    assert plan.missing is not None
    assert (plan.missing.start, plan.missing.end) == (Lsn(4 * SIZE), Lsn(9 * SIZE))
    assert plan.missing.end_time == commits[-1].time
    assert plan.missing.start_time == commits[1].time


def test_no_backup_and_an_unknown_one_are_told() -> None:
    commits, inventory = _plain()
    with pytest.raises(TargetUnreachableError, match="no backup can be restored"):
        choose(Choice(Latest(), [], inventory), lambda major: Known(commits))
    with pytest.raises(ObjectMissingError):
        choose(Choice(Latest(), [], inventory, backup="x"), lambda major: Known(commits))
