"""Take transactions back: their rows before and after from the archive, the rows of now from the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from knockwood.clone.registry import Registry
from knockwood.errors import KnockwoodError, ObjectMissingError, RefusedError, UsageError
from knockwood.history.index import ArchiveIndex
from knockwood.history.touched import ROW_LIMIT
from knockwood.history.transaction import Transaction
from knockwood.integrity.tables import open_pinned
from knockwood.model import Claim, Verdict
from knockwood.model.recovery import Plan, Recovery
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.operations.revert_changes import Gathered, changes_of, keys_of
from knockwood.recover import execute as execution
from knockwood.recover.execute import StepProgress, Unfinished
from knockwood.recover.plan.rows import Conflict, Mode
from knockwood.recover.revert_apply import LABEL, RevertHandler, request_of
from knockwood.recover.revert_examine import Examined, Request, examine
from knockwood.recover.revert_plan import KIND, Dependent, dependents, make_plan
from knockwood.recover.revert_spool import store

MAX_LOCK_WAIT: Final = 5.0
"""Seconds that a revert waits for a row or table that somebody holds."""

READS: Final = (
    "reads leave no trace in WAL: a transaction that only read these rows, and decided by them, is not among"
    " the dependents"
)
_ROUNDS: Final = 20
_CANDIDATES: Final = 50
_NAMED: Final = 150
"""Transactions whose numbers fit into the label that the index keeps (2,000 characters)."""

OnStep = Callable[[StepProgress], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for. `counters` are TABLE.COLUMN, `max_lock_wait` seconds; above `max_rows` it is refused."""

    xids: tuple[int, ...]
    mode: Mode = Mode.STRICT
    counters: tuple[str, ...] = ()
    max_lock_wait: float = MAX_LOCK_WAIT
    max_rows: int = ROW_LIMIT


@dataclass(frozen=True, slots=True)
class Known:
    """A dependent, and its commit where the archive's index knows it."""

    dependent: Dependent
    transaction: Transaction | None

    def as_json(self) -> dict[str, Any]:
        found = self.transaction
        named = {
            "xid": found.xid if found else self.dependent.xid,
            "commit_lsn": str(found.commit_lsn) if found else None,
            "commit_time": found.commit_time.isoformat() if found else None,
            "label": found.label if found else None,
        }
        return self.dependent.as_json() | named


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan to take transactions back, the newest first, and what stands against it.

    `waived` are conflicts that the mode passes over. `nothing` tells that every row is as it was before.
    """

    plan: Plan
    transactions: tuple[Transaction, ...]
    conflicts: tuple[Conflict, ...] = ()
    waived: tuple[Conflict, ...] = ()
    dependents: tuple[Known, ...] = ()
    already: int = 0
    nothing: bool = False
    notes: tuple[str, ...] = ()
    request: Request | None = field(default=None, repr=False)
    examined: Examined | None = field(default=None, repr=False)

    @property
    def refused(self) -> bool:
        return not self.plan.steps and not self.nothing


@dataclass(frozen=True, slots=True)
class Executed:
    """A revert that was carried out; `xid` is that of its own transaction, None where nothing was committed."""

    plan: Plan
    recovery: Recovery
    xid: int | None


def propose(
    cluster: Cluster,
    wish: Wish,
    *,
    registry: Registry | None = None,
    progress: Callable[[str], None] | None = None,
    gathered: Gathered | None = None,
) -> Proposal:
    """Plan the revert of committed transactions; production is read in one read-only snapshot, not changed.

    `gathered` is what was read of some transactions before: only for the others a clone is made. Conflicts and
    reasons to refuse come as data. Raises ObjectMissingError for a transaction that the archive does not know,
    and what restoring a clone raises.
    """
    if not wish.xids:
        raise UsageError("no transaction is named", hint="knockwood revert XID...")
    if wish.max_rows < 1:
        raise UsageError("a limit below one", hint="--max-rows 5000000")
    tell = progress or (lambda _: None)
    repository = cluster.repository()
    tell("bringing the archive up to date")
    freshness = bring_up_to_date(cluster, repository)
    notes = [READS] if freshness.complete else [READS, freshness.detail]
    tell("reading the archive's index")
    index = ArchiveIndex.open(repository, programs_for=cluster.programs)
    work = _Proposing(cluster, index, wish, registry or _clones(cluster), tell, notes, freshness.complete)
    return work.propose(_named(index, wish.xids), gathered or Gathered())


def execute(
    cluster: Cluster,
    proposal: Proposal,
    *,
    approve: str | None = None,
    on_step: OnStep | None = None,
) -> Executed:
    """Carry an approved plan out in one transaction, and hold the rows against it once more afterwards."""
    foreseen = (proposal.request, proposal.examined) if proposal.request and proposal.examined else None
    recovery = execution.execute(
        proposal.plan,
        [handler(cluster, foreseen)],
        cluster.state,
        approve=approve or proposal.plan.id,
        verify=lambda: verify(cluster, proposal.plan, proposal.request),
        progress=on_step,
    )
    return _executed(proposal.plan, recovery)


def unfinished(cluster: Cluster, xids: Sequence[int]) -> Unfinished | None:
    """A revert of just these transactions that was killed or has failed."""
    for entry in execution.unfinished(cluster.state, cluster.name):
        steps = entry.plan.steps
        if len(steps) == 1 and steps[0].kind == KIND and set(steps[0].arguments["xids"]) == set(xids):
            return entry
    return None


def resume(cluster: Cluster, entry: Unfinished, on_step: OnStep | None = None) -> Executed:
    """Go on with an execution that was killed: it finds out by itself whether it had committed."""
    # Of the run that was killed: this one needs none.
    _clones(cluster).sweep()
    recovery = execution.resume(
        entry.folder,
        [handler(cluster)],
        verify=lambda: verify(cluster, entry.plan),
        progress=on_step,
    )
    return _executed(entry.plan, recovery)


def _clones(cluster: Cluster) -> Registry:
    return Registry(cluster.settings.proof.clones or cluster.state)


def handler(cluster: Cluster, foreseen: tuple[Request, Examined] | None = None) -> RevertHandler:
    """What executes steps of the kind `revert`; `foreseen` is what the plan was just made from."""

    def adjusted_before(xids: Sequence[int]) -> str | None:
        """Why counters must not be adjusted: another run may have done it since the plan was made."""
        repository = cluster.repository()
        if not bring_up_to_date(cluster, repository).complete:
            return "the archive is not up to date"
        index = ArchiveIndex.open(repository, programs_for=cluster.programs)
        return "; ".join(reverted_before(index, _named(index, xids))) or None

    return RevertHandler(
        cluster.dsn, cluster.invariants(), adjusted_before=adjusted_before, foreseen=foreseen
    )


def reverted_before(index: ArchiveIndex, transactions: Sequence[Transaction]) -> list[str]:
    """Which of the transactions (newest first) a revert names that has not been reverted itself."""
    active: dict[int, int] = {}
    for one in index.transactions(since=transactions[-1].commit_lsn):
        if one.label and one.label.startswith(LABEL):
            for word in one.label.removeprefix(LABEL).split(","):
                if word.strip().isdigit():
                    active[int(word)] = one.xid
                    # A revert of a revert makes the first one count no more.
                    active = {xid: by for xid, by in active.items() if by != int(word)}
    return [f"{one.xid} was reverted by {active[one.xid]}" for one in transactions if one.xid in active]


def verify(cluster: Cluster, plan: Plan, request: Request | None = None) -> tuple[Claim, ...]:
    """The rows held against the transactions again, and the invariants; never an error, never green by default.

    `request` is what the plan was made from, where it is still at hand.
    """
    claims: list[Claim] = []
    for step in plan.steps:
        if step.kind != KIND:
            continue
        name = f"rows of {', '.join(map(str, step.arguments['xids']))} are as before"
        try:
            claims.append(_rows_back(cluster, name, request or request_of(step.arguments)))
        except KnockwoodError as error:
            claims.append(Claim(name, Verdict.NOT_CHECKED, str(error)))
    return tuple(claims)


def _rows_back(cluster: Cluster, name: str, request: Request) -> Claim:
    """Whether nothing is left to be written. Counters are left out: their sum cannot tell."""
    examined = _examined(cluster, request)
    left = [
        each for each in examined.operations if set(each.columns) - set(each.deltas) or each.kind != "set"
    ]
    if left:
        return Claim(name, Verdict.BROKEN, f"{len(left)} row(s) are not, such as one of {left[0].table}")
    counted = len(examined.operations)
    detail = f"{examined.merged.already} change(s) taken back"
    return Claim(
        name, Verdict.HELD, detail + (f", {counted} row(s) with counters adjusted" if counted else "")
    )


def _examined(cluster: Cluster, request: Request) -> Examined:
    with open_pinned(cluster.dsn, request.database) as connection:
        # One snapshot: what is shown belongs together.
        connection.execute("begin isolation level repeatable read, read only")
        return examine(connection, request)


def _executed(plan: Plan, recovery: Recovery) -> Executed:
    xids = [result.values.get("xid") for result in recovery.results if result.kind == KIND]
    known = [int(str(xid)) & 0xFFFF_FFFF for xid in xids if xid is not None]
    return Executed(plan, recovery, known[0] if known else None)


def _named(index: ArchiveIndex, xids: Sequence[int]) -> list[Transaction]:
    """The transactions, each once, the newest first; a subtransaction's number means its whole transaction."""
    found = {each.commit_lsn: each for each in (index.transaction(xid) for xid in xids)}
    return [found[lsn] for lsn in sorted(found, reverse=True)]


@dataclass(slots=True)
class _Proposing:
    cluster: Cluster
    index: ArchiveIndex
    wish: Wish
    registry: Registry | None
    tell: Callable[[str], None]
    notes: list[str]
    complete: bool

    def propose(self, transactions: list[Transaction], gathered: Gathered) -> Proposal:
        for _ in range(_ROUNDS):
            reasons = self._gather(transactions, gathered)
            if reasons:
                return self._refused(transactions, reasons)
            culprits = tuple(gathered.culprits[each.commit_lsn] for each in transactions)
            if not any(culprit.changes for culprit in culprits):
                return self._nothing(transactions)
            request = Request(culprits, self.wish.mode, self.wish.counters)
            self.tell("comparing with the rows of now")
            examined = _examined(self.cluster, request)
            reasons = gathered.drift(examined.catalog)
            if reasons:
                return self._refused(transactions, reasons)
            more = self._more(examined, transactions, gathered) if self.wish.mode is Mode.CASCADE else []
            if not more:
                return self._proposal(request, examined, transactions)
            transactions = sorted([*transactions, *more], key=lambda one: one.commit_lsn, reverse=True)
        raise RefusedError(
            f"more than {_ROUNDS} rounds of dependents: this is no longer a revert",
            hint="restore beside, and compare",
        )

    def _gather(self, transactions: Sequence[Transaction], gathered: Gathered) -> list[str]:
        missing = [each for each in transactions if each.commit_lsn not in gathered.culprits]
        if missing:
            self.tell(f"reading what {', '.join(str(each.xid) for each in missing)} changed, from a clone")
            changes_of(
                self.cluster,
                self.index.repository,
                missing,
                gathered,
                self.registry,
                limit=self.wish.max_rows,
            )
        return gathered.reasons

    def _more(
        self, examined: Examined, transactions: Sequence[Transaction], gathered: Gathered
    ) -> list[Transaction]:
        """The dependents that stand against it: to be taken back first."""
        known = {each.commit_lsn for each in transactions}
        found: dict[Any, Transaction] = {}
        for conflict in examined.conflicts:
            for xid in conflict.writers:
                try:
                    one = self.index.transaction(xid)
                except ObjectMissingError:
                    continue
                if one.commit_lsn not in known and one.commit_lsn > transactions[-1].commit_lsn:
                    found[one.commit_lsn] = one
        if not found and examined.conflicts:
            return self._between(examined, transactions, gathered)
        return list(found.values())

    def _between(
        self, examined: Examined, transactions: Sequence[Transaction], gathered: Gathered
    ) -> list[Transaction]:
        """Earlier writers of the rows in conflict: a row names only its last one, their changes name the rest."""
        known = {each.commit_lsn for each in transactions}
        files = {(each.database, each.filenode) for one in transactions for each in one.relations}
        near = self.index.transactions(since=transactions[-1].commit_lsn, filenodes=files)
        candidates = [one for one in near if one.commit_lsn not in known]
        if not candidates or len(candidates) > _CANDIDATES:
            if candidates:
                self.notes.append(f"{len(candidates)} transactions lie between: too many to look through")
            return []
        apart = Gathered()
        changes_of(
            self.cluster, self.index.repository, candidates, apart, self.registry, limit=self.wish.max_rows
        )
        if apart.reasons:
            self.notes += apart.reasons
            return []
        in_conflict = {(each.table, frozenset(each.key.items())) for each in examined.conflicts}
        found = [
            one
            for one in candidates
            if in_conflict & set(keys_of(apart.culprits[one.commit_lsn], examined.catalog))
        ]
        gathered.culprits |= {one.commit_lsn: apart.culprits[one.commit_lsn] for one in found}
        gathered.shapes |= {
            table: shape for table, shape in apart.shapes.items() if table not in gathered.shapes
        }
        return found

    def _proposal(self, request: Request, examined: Examined, transactions: list[Transaction]) -> Proposal:
        reasons = reverted_before(self.index, transactions) if examined.operations else []
        if any(each.deltas for each in examined.operations):
            doubts = [f"{each}: its counters would be adjusted twice" for each in reasons]
            if not self.complete:
                doubts.append(
                    "the archive is not up to date: whether the counters were adjusted before is unknown"
                )
            if len(transactions) > _NAMED:
                doubts.append(f"a revert names at most {_NAMED} transactions: take back fewer at a time")
            if doubts:
                return self._refused(transactions, doubts)
        self.notes += reasons
        folder = self.cluster.state / self.cluster.name / "reverts"
        plan = make_plan(
            self.cluster.name, request, examined, store(folder, request.culprits), self.wish.max_lock_wait
        )
        return Proposal(
            plan,
            tuple(transactions),
            examined.conflicts,
            examined.waived,
            tuple(self._known(each) for each in dependents(examined)),
            examined.merged.already,
            nothing=not examined.operations and not examined.conflicts and not examined.waived,
            notes=tuple(self.notes),
            request=request,
            examined=examined,
        )

    def _known(self, dependent: Dependent) -> Known:
        try:
            return Known(dependent, self.index.transaction(dependent.xid))
        except ObjectMissingError:
            return Known(dependent, None)

    def _refused(self, transactions: Sequence[Transaction], reasons: Sequence[str]) -> Proposal:
        purpose = f"revert of {', '.join(str(each.xid) for each in transactions)}"
        plan = Plan(self.cluster.name, purpose, refused=tuple(reasons))
        return Proposal(plan, tuple(transactions), notes=tuple(self.notes))

    def _nothing(self, transactions: Sequence[Transaction]) -> Proposal:
        purpose = f"revert of {', '.join(str(each.xid) for each in transactions)}"
        plan = Plan(self.cluster.name, purpose, refused=("no row was changed",))
        return Proposal(plan, tuple(transactions), nothing=True, notes=tuple(self.notes))
