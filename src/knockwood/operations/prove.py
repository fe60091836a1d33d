"""Restore a backup to the last commit that the primary knows, check what came out, and write the proof.

The primary is asked over its own connection, not over the archive: the archive must not be the only
witness of what it should hold.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone, spawn
from knockwood.errors import (
    AuthenticationError,
    KnockwoodError,
    ObjectDamagedError,
    ObjectMissingError,
    PostgresError,
    RecoveryFailedError,
    ServerDownError,
    TargetUnreachableError,
)
from knockwood.host import clock
from knockwood.integrity.check import Invariant
from knockwood.integrity.compare import Comparison, compare
from knockwood.integrity.primary_state import PrimaryState, primary_state
from knockwood.integrity.run import Report
from knockwood.model import Claim, Commit, Lsn, Proof, Timeline, Verdict
from knockwood.operations.examination import examine, names_for_a_clone
from knockwood.operations.lag import POLL, ArchiveWatch, commits_of
from knockwood.operations.proof_claims import backup_health, some, verified
from knockwood.operations.proof_pages import COMPARED, store
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import ServerFacts, connect, server_facts
from knockwood.postgres.walmessages import commit_nothing
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.backups.model import Backup
from knockwood.repository.repository import Repository
from knockwood.repository.route import newest_holding
from knockwood.repository.targets import Latest, RestorePlan, Target, ToLsn, resolve

_ATTEMPTS: Final = 8


@dataclass(frozen=True, slots=True)
class Step:
    """Said as the proof goes on: the phase, what is done of it, of how much (0: unknown), and on what."""

    phase: str
    done: int = 0
    total: int = 0
    current: str = ""


Progress = Callable[[Step], None]

RESTORABLE: Final = "the backup can be restored"
RESTORED: Final = "restored to the last commit"


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of the restore: `seconds` until the clone stood, None where none ever did."""

    backup: Backup
    timeline: Timeline
    reached: Lsn
    last_commit: Commit | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Options:
    """How to prove. `archive_timeout` is how long the archive may take to receive the primary's last commit;
    `data_directory` (local reach) lets missing commits be counted in the primary's own WAL."""

    backup: str | None = None
    target: Target = field(default_factory=Latest)
    invariants: tuple[Invariant, ...] = ()
    checks: tuple[str, ...] | None = None
    valid_for: timedelta = timedelta(days=7)
    archive_timeout: timedelta = timedelta(seconds=60)
    workers: int = 2
    data_directory: Path | None = None
    clones: Path | None = None
    programs_for: Callable[[int], Programs] = find_programs


def prove(
    repository: Repository,
    dsn: str | None,
    *,
    cluster: str,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Proof:
    """Restore, check, compare, and store the proof as `proofs/<id>.json`, `.html` and `.xml`.

    With the primary down, or a `target` other than latest, the comparison is not checked. A restore that
    fails because of what is in the repository is a broken proof, and so are backups of which none can be
    restored; what fails for other reasons (no space, no programs, storage away, no backup at all, a target
    that never was) is raised and proves nothing. WrongSystemError if `dsn` is another cluster.
    The clone is always destroyed.
    """
    chosen = options or Options()
    return _Run(repository, dsn, cluster, chosen, progress or (lambda step: None)).run()


class _Run:
    """One proof."""

    def __init__(
        self, repository: Repository, dsn: str | None, cluster: str, options: Options, progress: Progress
    ) -> None:
        self.repository = repository
        self.dsn = dsn
        self.cluster = cluster
        self.options = options
        self.tell = progress
        self.claims: list[Claim] = []
        self.report: Report | None = None
        self.comparison: Comparison | None = None
        self.missing_commits: int | None = None
        self.rpo: float | None = None
        self.why_no_primary = ""
        self.facts: ServerFacts | None = None
        self.arrived: float | None = None
        """Seconds until the archive held the primary's last commit; None if it never did."""

    def run(self) -> Proof:
        taken_at = clock.now()
        if not self._backups():
            self._plan_once(None)  # says why at once, before the primary is read for nothing
        state = self._primary()
        started = clock.monotonic()
        try:
            plan = self._plan(state)
        except TargetUnreachableError as error:
            outcome = self._nothing_restorable(error)
        else:
            outcome = self._restored(plan, state, started)
        self.tell(Step("verify the repository"))
        self.claims.append(verified(self.repository, self.options.programs_for))
        proof = self._proof(outcome, clock.monotonic() - started, taken_at)
        store(self.repository, proof, self.report, self.comparison)
        return proof

    def _restored(self, plan: RestorePlan, state: PrimaryState | None, started: float) -> _Outcome:
        self._measure_loss(plan, state)
        clone: Clone | None = None
        seconds: float | None = None
        try:
            clone = self._restore(plan)
            seconds = clock.monotonic() - started
            self._claim_reached(clone, plan, state)
            self._compare(clone, plan, state)
            self._check(clone)
        finally:
            if clone is not None:
                clone.destroy()
        self.claims.append(backup_health(plan.chain))
        reached = clone.reached_lsn if clone else Lsn(0)
        return _Outcome(plan.backup, plan.timeline, reached, plan.last_commit if clone else None, seconds)

    def _nothing_restorable(self, error: TargetUnreachableError) -> _Outcome:
        """Claims about a repository whose backups cannot be restored at all. Raises the error where that is
        not the repository's fault: there is no backup yet, or a point was asked for that never was."""
        chosen = self._backups()
        if not chosen or not isinstance(self.options.target, Latest):
            raise error
        self._claim_not_restored(error)
        self._claim(RESTORED, Verdict.BROKEN, "nothing was restored")
        self._compare(None, None, None)
        self._check(None)
        self.claims.append(backup_health(chosen[-1:]))
        return _Outcome(chosen[-1], chosen[-1].timeline, Lsn(0), None, None)

    # --- the primary ---------------------------------------------------------------------------------

    def _primary(self) -> PrimaryState | None:
        """The primary's state, once the archive holds it (or has had its time to)."""
        if self.dsn is None:
            self.why_no_primary = "no primary was named"
            return None
        try:
            with connect(self.dsn) as connection:
                facts = server_facts(connection, self.repository.header.system_identifier)
        except (ServerDownError, AuthenticationError) as error:
            self.why_no_primary = f"the primary does not answer: {error}"
            return None
        if not isinstance(self.options.target, Latest):
            self.why_no_primary = f"the target is {self.options.target}, not the primary's last commit"
            return None
        return self._fingerprint(self.dsn, facts)

    def _fingerprint(self, dsn: str, facts: ServerFacts) -> PrimaryState | None:
        archive = ArchiveWatch(
            self.repository, facts.timeline, self._start(), self.options.archive_timeout.total_seconds()
        )
        self.tell(Step("read the primary"))
        try:
            state = primary_state(
                dsn,
                workers=self.options.workers,
                progress=lambda table, done, total: self.tell(Step("read the primary", done, total, table)),
                on_mark=lambda lsn: self._marked(dsn, archive, lsn),
            )
        except PostgresError as error:
            archive.give_up()
            self.why_no_primary = f"the primary cannot be read: {error}"
            return None
        if state.timeline != facts.timeline:
            archive.give_up()
            self.why_no_primary = "another server became the primary meanwhile"
            return None
        self.tell(Step("wait for the archive", current=str(state.lsn)))
        archive.wait()
        self.facts, self.arrived = facts, archive.seconds
        return state

    def _marked(self, dsn: str, archive: ArchiveWatch, lsn: Lsn) -> None:
        archive.begin(lsn)
        # The position may lie in WAL that an idle server has not flushed yet, and only what is flushed is
        # sent: a commit flushes all before it.
        with contextlib.suppress(KnockwoodError), connect(dsn) as connection:
            commit_nothing(connection, "flush")

    def _start(self) -> Lsn:
        """Where the WAL must begin that the newest backup, or the one asked for, needs."""
        return max((backup.start_lsn for backup in self._backups()), default=Lsn(0))

    def _backups(self) -> list[Backup]:
        return [b for b in list_backups(self.repository) if self.options.backup in (None, b.id)]

    def _measure_loss(self, plan: RestorePlan, state: PrimaryState | None) -> None:
        """Commits and seconds that a restore would lose. What the archive lists may be unreadable: only a plan
        that reaches the primary's last commit loses nothing."""
        if state is None:
            return
        if plan.missing is None:
            self.missing_commits, self.rpo = 0, self.arrived
            return
        last = plan.last_commit
        if last is not None:
            self.rpo = max(0.0, (state.taken_at - last.time).total_seconds())
        after = Lsn(last.lsn.value + 1) if last is not None else plan.backup.stop_lsn
        if self.dsn is not None and self.facts is not None:
            programs, folder = self.options.programs_for(self.facts.major), self.options.data_directory
            self.missing_commits = commits_of(self.dsn, programs, folder, self.facts, after, state.lsn)

    # --- the restore ---------------------------------------------------------------------------------

    def _plan(self, state: PrimaryState | None) -> RestorePlan:
        """The plan. Where the archive lists all WAL and yet the plan falls short, it is made again: a partial
        segment that was listed may have been replaced by a longer one before it was read."""
        self.tell(Step("plan"))
        plan = self._plan_once(state)
        for _ in range(_ATTEMPTS):
            if state is None or (self.arrived is None and plan.missing is not None):
                return plan
            if plan.missing is None and not _too_short(plan, state):
                return plan
            clock.sleep(POLL)
            plan = self._plan_once(state)
        if plan.missing is not None:
            return plan
        raise TargetUnreachableError(
            "the archive covers the primary's last commit, but no plan reaches it",
            where=self.repository.storage.url,
            hint="knockwood verify",
        )

    def _plan_once(self, state: PrimaryState | None) -> RestorePlan:
        # A commit record that begins at the position itself is not part of it.
        target = ToLsn(Lsn(state.lsn.value - 1)) if state else self.options.target
        # A timeline that was forked before the position holds other rows there.
        stock = WalArchive(self.repository).inventory() if state else None
        return resolve(
            self.repository,
            target,
            backup=self.options.backup,
            timeline=newest_holding(stock, state.timeline, state.lsn) if state and stock else None,
            accept_loss=True,
            prefer_proved=False,
            programs_for=self.options.programs_for,
        )

    def _restore(self, plan: RestorePlan) -> Clone | None:
        try:
            return spawn(
                self.repository,
                plan,
                programs=self.options.programs_for(plan.backup.major),
                purpose="prove",
                progress=lambda at: self.tell(Step("restore", at.done, at.total, at.current)),
                registry=Registry(self.options.clones) if self.options.clones else None,
            )
        except (RecoveryFailedError, ObjectDamagedError, ObjectMissingError, TargetUnreachableError) as error:
            self._claim_not_restored(error)
            return None

    def _claim_not_restored(self, error: KnockwoodError) -> None:
        hint = f"; {error.hint}" if error.hint else ""
        self._claim(RESTORABLE, Verdict.BROKEN, f"{error}{hint}")

    def _claim(self, name: str, verdict: Verdict, detail: str = "") -> None:
        self.claims.append(Claim(name, verdict, detail))

    def _claim_reached(self, clone: Clone | None, plan: RestorePlan, state: PrimaryState | None) -> None:
        name = RESTORED
        if clone is None:
            self._claim(name, Verdict.BROKEN, "nothing was restored")
            return
        self._claim(RESTORABLE, Verdict.HELD, f"backup {plan.backup.id}")
        last = plan.last_commit
        shown = f"transaction {last.xid} at {last.lsn}, {last.time.isoformat()}" if last else "none since it"
        if plan.missing is not None:
            known = self.missing_commits
            count = f"{known} commit(s)" if known is not None else "an unknown number of commits"
            self._claim(name, Verdict.BROKEN, f"ends with {shown}; {count} missing: {plan.missing.reason}")
        elif state is None:
            self._claim(name, Verdict.NOT_CHECKED, f"ends with {shown}; {self.why_no_primary}")
        else:
            self._claim(name, Verdict.HELD, f"ends with {shown}, the primary's last before {state.lsn}")

    # --- what came out ---------------------------------------------------------------------------------

    def _check(self, clone: Clone | None) -> None:
        names = [
            name for name in names_for_a_clone() if self.options.checks is None or name in self.options.checks
        ]
        if clone is None:
            for name in names:
                self._claim(f"check {name}", Verdict.NOT_CHECKED, "there is no clone")
            return
        self.report = examine(
            clone,
            names,
            cluster=self.cluster,
            repository=self.repository,
            invariants=self.options.invariants,
            progress=lambda at: self.tell(Step("check the clone", at.position - 1, at.total, at.check.name)),
        )
        for result in self.report.results:
            reasons = [found.summary for found in result.findings] + [
                gap.reason for gap in result.not_checked
            ]
            self._claim(f"check {result.name}", result.verdict, some(reasons))

    def _compare(self, clone: Clone | None, plan: RestorePlan | None, state: PrimaryState | None) -> None:
        name = COMPARED
        if clone is None or plan is None or state is None:
            self._claim(name, Verdict.NOT_CHECKED, self.why_no_primary or "there is no clone")
            return
        if plan.missing is not None:
            self._claim(name, Verdict.NOT_CHECKED, "the clone ends before the position of the comparison")
            return
        self.comparison = compare(
            state,
            clone.dsn(),
            primary_dsn=self.dsn,
            workers=self.options.workers,
            progress=lambda table, done, total: self.tell(Step("compare", done, total, table)),
        )
        outside = [table.table for table in self.comparison.tables if table.outside]
        reasons = [finding.summary for finding in self.comparison.findings]
        reasons += [
            f"{table.table}: {table.reason}"
            for table in self.comparison.tables
            if table.verdict is Verdict.NOT_CHECKED and not table.outside
        ]
        text = (
            f"{len(self.comparison.tables)} tables and sequences, {self.comparison.rows} rows at {state.lsn}"
        )
        if outside:
            text += f"; no physical backup holds {', '.join(outside)}"
        self._claim(name, self.comparison.verdict, some([*reasons, text]))

    def _proof(self, outcome: _Outcome, elapsed: float, taken_at: datetime) -> Proof:
        seconds = elapsed if outcome.seconds is None else outcome.seconds
        return Proof(
            id=f"{clock.stamp(taken_at)}-{secrets.token_hex(2)}",
            cluster=self.cluster,
            backup=outcome.backup.id,
            system_identifier=self.repository.header.system_identifier,
            timeline=outcome.timeline,
            reached_lsn=outcome.reached,
            last_commit=outcome.last_commit,
            missing_commits=self.missing_commits,
            claims=tuple(self.claims),
            rto_seconds=round(seconds, 3),
            rpo_seconds=round(self.rpo, 3) if self.rpo is not None else None,
            taken_at=taken_at,
            valid_until=taken_at + self.options.valid_for,
        )


def _too_short(plan: RestorePlan, state: PrimaryState | None) -> bool:
    """Whether the plan ends before a commit that we made ourselves on the primary."""
    if state is None or state.mark is None:
        return False
    return plan.last_commit is None or plan.last_commit.lsn < state.mark
