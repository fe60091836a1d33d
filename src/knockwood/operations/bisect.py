"""Find the commit that turned an invariant, a check or any SQL bad: over backups first, then inside the WAL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from knockwood.clone.registry import Registry
from knockwood.errors import KnockwoodError, ObjectMissingError, TargetUnreachableError, UsageError
from knockwood.history import marks
from knockwood.history.bisect import Costs, Outcome, Restorable, Result, Search
from knockwood.history.index import ArchiveIndex
from knockwood.history.log import LogEntry, read_log
from knockwood.history.log import Question as LogQuestion
from knockwood.history.names import RelationNames
from knockwood.history.states import States, open_states
from knockwood.host import clock
from knockwood.model import Commit, Lsn, Verdict
from knockwood.operations.bisect_bench import Bench, Tally
from knockwood.operations.bisect_question import Question, Seen, ask
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.backups.model import Backup, chain
from knockwood.repository.backups.proofs import read_proofs, trusted
from knockwood.repository.repository import Repository
from knockwood.repository.route import Route
from knockwood.repository.targets import Latest, RestorePlan, Target, resolve

Progress = Callable[[str], None]

SUSPECTS_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Probe:
    """One state looked at: its commit (None: no commit of the range yet), what was seen, and what it took."""

    index: int
    lsn: Lsn
    commit: Commit | None
    seen: Seen
    source: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "lsn": str(self.lsn),
            "xid": self.commit.xid if self.commit else None,
            "commit_time": self.commit.time.isoformat() if self.commit else None,
            "verdict": str(self.seen.verdict),
            "rows": self.seen.count,
            "reason": self.seen.reason,
            "source": self.source,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class Bisection:
    """The answer. `commits` are those of the range; `last_good` is the state before `first_bad` if FOUND.

    `culprit` is what the log tells of `first_bad` (its tables, its label); None where it cannot, with a
    note. `suspects` are the commits among which the first bad one is (NARROWED; the first of
    `suspect_count`).
    """

    question: Question
    outcome: Outcome
    verdict: Verdict
    first_bad: Commit | None
    culprit: LogEntry | None
    last_good: Probe | None
    suspects: tuple[Commit, ...]
    suspect_count: int
    examples: tuple[dict[str, Any], ...]
    probes: tuple[Probe, ...]
    commits: int
    backups: int
    promised: int
    start: Lsn
    end: Lsn
    seconds: float
    tally: Tally
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Range:
    """Whole WAL between two states that can be restored; `low` and `high` bound its commit records."""

    start: RestorePlan
    end: RestorePlan
    low: Lsn
    high: Lsn
    backups: tuple[Backup, ...]
    links: dict[str, tuple[Backup, ...]] = field(default_factory=dict)


def bisect(
    cluster: Cluster,
    asked: Question,
    *,
    since: Target | None = None,
    until: Target | None = None,
    confirm: int = 0,
    wait: float = 10,
    progress: Progress | None = None,
) -> Bisection:
    """Find the first bad commit between two points (the oldest backup that leads there, and latest).

    Nothing is written but clones, which are removed. The SQL runs read-only on them, under its time limit.
    `confirm` looks at so many further states, since a bisection alone cannot see a rule that was broken,
    mended and broken again. To `latest` the archive gets `wait` seconds to hold what the live server has
    promised. Raises TargetUnreachableError where no whole WAL leads to the end,
    NoSpaceError, RecoveryFailedError.
    """
    if confirm < 0:
        raise UsageError("a negative number of further states to look at", hint="--confirm 5")
    began = clock.monotonic()
    tell = progress or (lambda _: None)
    repository = cluster.repository()
    notes: list[str] = []
    if wait > 0 and (until is None or isinstance(until, Latest)):
        freshness = bring_up_to_date(cluster, repository, timeout=wait)
        if not freshness.complete:
            notes.append(freshness.detail)
    tell("reading the archive")
    span = _range(cluster, repository, since, until or Latest(), notes, tell)
    programs = cluster.programs(span.start.backup.major)
    with open_states(repository, span.end.timeline, span.low, span.high, programs) as states:
        run = _Run(cluster, repository, asked, span, states, confirm, tell)
        try:
            run.probe_all()
        finally:
            run.bench.close()
        found = run.answer()
    if found.first_bad is not None:
        tell("naming the tables")
        culprit, problems = _culprit(cluster, repository, found.first_bad)
        found = replace(found, culprit=culprit, notes=(*found.notes, *problems))
    return replace(found, seconds=clock.monotonic() - began, notes=(*notes, *found.notes))


def _culprit(
    cluster: Cluster, repository: Repository, commit: Commit
) -> tuple[LogEntry | None, tuple[str, ...]]:
    """The first bad transaction as the log shows it; what hinders that is a note and no failure."""
    try:
        index = ArchiveIndex.open(repository, programs_for=cluster.programs)
        names = RelationNames(repository, cluster.dsn)
        asked = LogQuestion(since=commit.lsn, until=commit.lsn + 1)
        log = read_log(index, names, asked, marks.read_all(repository), ())
    except KnockwoodError as error:
        return None, (f"which tables it changed could not be told: {error}",)
    if not log.entries:
        return None, ("which tables it changed is not in the log of the archive",)
    return log.entries[0], ()


class _Run:
    """One bisection over states that are known by number."""

    def __init__(
        self,
        cluster: Cluster,
        repository: Repository,
        asked: Question,
        span: _Range,
        states: States,
        confirm: int,
        tell: Progress,
    ) -> None:
        self.cluster = cluster
        self.asked = asked
        self.span = span
        self.states = states
        self.tell = tell
        self.registry = Registry(cluster.settings.proof.clones or cluster.state)
        self.sources = {0: span.start.backup} | {
            states.index_at(backup.stop_lsn): backup for backup in span.backups
        }
        costs = Costs(states.position, tuple(self._restorable(index) for index in sorted(self.sources)))
        self.search = Search(states.last, costs, confirm=confirm)
        programs = cluster.programs(span.start.backup.major)
        self.bench = Bench(repository, self._plan, costs, programs, self.registry, self._beside)
        self._line = ""
        self.probes: list[Probe] = []

    def _restorable(self, index: int) -> Restorable:
        backup = self.sources[index]
        size = sum(link.raw_bytes for link in self.span.links[backup.id])
        return Restorable(index, backup.start_lsn.value, size)

    def _plan(self, index: int, source: Restorable | None) -> RestorePlan:
        """The plan to a state. All WAL up to the end of the range was read and is whole."""
        if index == 0:
            return self.span.start
        plan = self.span.end
        backup = self.sources[source.index] if source is not None else self.span.start.backup
        plan = replace(plan, chain=self.span.links[backup.id], missing=None)
        commit = self.states.commit(index)
        if source is not None and source.index == index:
            # The commit lies before the backup's end, where nothing can be read: its own state is this one.
            plan = replace(plan, target_lsn=None, inclusive=True, last_commit=commit)
            until = backup.stop_lsn
        else:
            plan = replace(plan, target_lsn=commit.lsn, inclusive=True, last_commit=commit)
            # The record may go on into the next segment.
            until = commit.lsn + backup.segment_bytes
        wal = (p for p in plan.wal if p.segment.end > backup.start_lsn and p.segment.start < until)
        return replace(plan, wal=tuple(wal))

    def probe_all(self) -> None:
        """Look at states until the search is at its end."""
        while (index := self.search.next(self.bench.held)) is not None:
            number = len(self.probes)
            left = self.search.seconds_left(self.bench.held)
            self._line = f"probe {number + 1} of about {number + self.search.likely()}, {left:.0f} s left"
            self.tell(self._line)
            began = clock.monotonic()
            clone, source = self.bench.bring(index, last_probe=self.search.remaining() <= 1)
            brought = clock.monotonic()
            seen = ask(self.asked, clone, self.cluster, self.registry)
            ended = clock.monotonic()
            self.search.costs.rates = self.search.costs.rates.checked(ended - brought)
            self.search.tell(index, seen.verdict)
            self.bench.done(seen.verdict)
            commit = self._commit(index)
            lsn = commit.lsn if commit is not None else self.span.low
            self.probes.append(Probe(index, lsn, commit, seen, source, ended - began))

    def _beside(self, text: str) -> None:
        self.tell(f"{self._line}: {text}")

    def _commit(self, index: int) -> Commit | None:
        return self.states.commit(index) if index else self.span.start.last_commit

    def answer(self) -> Bisection:
        result = self.search.result()
        newest = self.search.seen.get(self.states.last, Verdict.NOT_CHECKED)
        by_index = {probe.index: probe for probe in self.probes}
        first = result.first_bad if result.outcome is Outcome.FOUND else None
        bad = by_index.get(result.first_bad) if result.first_bad is not None else None
        suspects, count = self._suspects(result)
        return Bisection(
            question=self.asked,
            outcome=result.outcome,
            verdict=newest,
            first_bad=self.states.commit(first) if first is not None else None,
            culprit=None,
            last_good=by_index.get(result.last_good) if result.last_good is not None else None,
            suspects=suspects,
            suspect_count=count,
            examples=bad.seen.examples if bad is not None else (),
            probes=tuple(self.probes),
            commits=self.states.last,
            backups=len(self.sources),
            promised=self.search.promised,
            start=self.span.low,
            end=self.span.high,
            seconds=0.0,
            tally=self.bench.tally,
            notes=(*self.bench.tally.notes, *_notes(result, by_index)),
        )

    def _suspects(self, result: Result) -> tuple[tuple[Commit, ...], int]:
        if result.outcome is not Outcome.NARROWED or result.first_bad is None:
            return (), 0
        before = result.last_good if result.last_good is not None else 0
        numbers = range(before + 1, result.first_bad + 1)
        return tuple(self.states.commit(number) for number in numbers[-SUSPECTS_SHOWN:]), len(numbers)


def _notes(result: Result, probes: dict[int, Probe]) -> list[str]:
    """What the outcome means, where that needs words."""
    if result.outcome is Outcome.NOT_CHECKABLE:
        reasons = [probe.seen.reason for probe in probes.values() if probe.seen.reason]
        return [
            f"the newest state could not be checked: {reasons[0] if reasons else 'nothing was looked at'}"
        ]
    if result.outcome is Outcome.NARROWED:
        reasons = [probe.seen.reason for probe in probes.values() if probe.seen.reason]
        why = f"states in between could not be checked: {reasons[-1]}"
        return [why] if result.last_good is not None else [why, "no state was seen at which it was good"]
    if result.outcome is Outcome.BAD_FROM_START:
        return ["it was bad already at the first state of the range: what made it so lies before"]
    if result.outcome is Outcome.NOT_MONOTONE and result.again is not None:
        where = f"{probes[result.again].seen.verdict} at {probes[result.again].lsn}"
        return [f"it turned more than once ({where}): narrow the range to one turn with --from and --to"]
    if result.outcome is Outcome.NEVER_BAD and len(probes) == 1:
        return [
            "good at the newest state; whether it was ever bad before was not looked at (--confirm N does)"
        ]
    return []


# --- the range ----------------------------------------------------------------------------------------------


def _range(
    cluster: Cluster,
    repository: Repository,
    since: Target | None,
    until: Target,
    notes: list[str],
    tell: Progress,
) -> _Range:
    backups = list_backups(repository)
    # A state that lacks a change would put the blame on another commit.
    sure = trusted(backups, read_proofs(repository))

    def plan(target: Target, backup: str | None) -> RestorePlan:
        return resolve(
            repository,
            target,
            backup=backup,
            programs_for=cluster.programs,
            progress=lambda done, total: tell(f"reading the archive, {done >> 20} of {total >> 20} MB"),
        )

    if since is not None:
        start = plan(since, None)
        end = plan(until, start.backup.id)
    else:
        start, end = _oldest(sure, until, notes, plan)
    low = _after(start)
    high = max(_after(end), low) if since is None else _after(end)
    if high < low:
        raise UsageError(
            f"the range ends at {high}, before it begins at {low}", hint="is --from earlier than --to?"
        )
    inside = _inside(repository, backups, sure, end, low, high)
    links = {start.backup.id: start.chain} | {each.id: chain(backups, each.id) for each in inside}
    return _Range(start, end, low, high, inside, links)


def _after(plan: RestorePlan) -> Lsn:
    """The first position of which a commit record is not part of the plan's state."""
    if plan.target_lsn is None:
        return plan.backup.stop_lsn
    return plan.target_lsn + 1 if plan.inclusive else plan.target_lsn


def _oldest(
    backups: Sequence[Backup],
    until: Target,
    notes: list[str],
    plan: Callable[[Target, str | None], RestorePlan],
) -> tuple[RestorePlan, RestorePlan]:
    """The state of the oldest backup from which whole WAL leads to the end, and the plan to the end."""
    refused: TargetUnreachableError | None = None
    for backup in backups:
        if backup.health.verdict is Verdict.BROKEN:
            notes.append(f"backup {backup.id} has bad pages and was left out")
            continue
        try:
            end = plan(until, backup.id)
        except (TargetUnreachableError, ObjectMissingError) as error:
            notes.append(f"backup {backup.id} does not lead to the end: {error.what}")
            refused = error if isinstance(error, TargetUnreachableError) else refused
            continue
        # Only the backup's own state; a plan never ends there while there are commits after it.
        until_stop = tuple(p for p in end.wal if p.segment.start < backup.stop_lsn)
        start = replace(end, target_lsn=None, inclusive=True, wal=until_stop, last_commit=None)
        return start, end
    if refused is not None:
        raise refused
    raise TargetUnreachableError(
        "there is no backup to begin from", hint="take a base backup now: `knockwood backup`"
    )


def _inside(
    repository: Repository,
    backups: Sequence[Backup],
    sure: Sequence[Backup],
    end: RestorePlan,
    low: Lsn,
    high: Lsn,
) -> tuple[Backup, ...]:
    """Sound ones of the backups `sure` on the way, whose states lie within the range."""
    route = Route(WalArchive(repository).inventory(), end.timeline)
    found = []
    for backup in sure:
        if not low < backup.stop_lsn < high or not route.holds(backup.timeline, backup.stop_lsn):
            continue
        if backup.start_lsn < end.backup.start_lsn:
            continue  # its WAL was not read
        try:
            links = chain(backups, backup.id)
        except TargetUnreachableError:
            continue
        if all(link.health.verdict is not Verdict.BROKEN for link in links):
            found.append(backup)
    return tuple(found)
