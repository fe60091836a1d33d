"""Let a shadow follow the archive step by step, and check it where it stands."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from knockwood.clone.shadow import Shadow
from knockwood.clone.shadow_server import Keeper
from knockwood.clone.shadow_state import Hold, ProofSoFar, ShadowRecord
from knockwood.clone.spawn import Report
from knockwood.errors import KnockwoodError, RecoveryFailedError, TargetUnreachableError
from knockwood.host import clock
from knockwood.integrity.check import Role, Subject, Weight
from knockwood.integrity.registry import all_checks, select
from knockwood.integrity.run import Report as CheckReport
from knockwood.integrity.run import run_checks
from knockwood.model import Finding, Lsn, Verdict
from knockwood.operations.bisect_question import database_of
from knockwood.operations.cluster import Cluster
from knockwood.operations.examination import ABOUT_THE_SERVER
from knockwood.operations.shadow import hold_for, open_shadow
from knockwood.postgres.connection import connect, server_facts
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Latest, RestorePlan, Target, ToLsn, ToTime, resolve


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did: `made`, `advanced`, `stood` (nothing newer), `held` (a hold is next) or `rebuilt`.

    `proof` is None where no check was due. `holds` were set by this step. `waits_for` says what keeps it.
    """

    did: str
    record: ShadowRecord
    proof: ProofSoFar | None
    holds: tuple[Hold, ...]
    waits_for: str
    seconds: float


def run(
    cluster: Cluster,
    stop: threading.Event,
    on_step: Callable[[Step], None],
    on_error: Callable[[KnockwoodError], None],
    progress: Report | None = None,
) -> None:
    """Step every `every` until `stop` is set. What goes wrong in a step is told, and tried again at the next.

    The shadow's server runs on between the steps, and is stopped at the end, once whoever borrowed it gave it back.
    """
    check_names(cluster)
    repository, keeper = cluster.repository(), Keeper()
    try:
        while not stop.is_set():
            try:
                on_step(step(cluster, repository, progress=progress, keeper=keeper))
            except KnockwoodError as error:
                on_error(error)
            stop.wait(cluster.settings.shadow.every.total_seconds())
    finally:
        _let_down(cluster, repository, keeper)


def _let_down(cluster: Cluster, repository: Repository, keeper: Keeper) -> None:
    """Stop the server that was kept, after any borrower, so that its next start replays little."""
    try:
        if keeper.server is not None and keeper.server.running:
            with open_shadow(cluster, repository, keeper, wait=math.inf) as shadow:
                shadow.settle()
    finally:
        keeper.end()


def step(
    cluster: Cluster,
    repository: Repository,
    *,
    check: bool | None = None,
    progress: Report | None = None,
    keeper: Keeper | None = None,
) -> Step:
    """Make the shadow, or let it go on as far as `behind` and the holds allow, and check it where it stands.

    `check` None checks when it is due. With `keeper` its server runs on. A shadow that is past a hold, or whose
    timeline was left, is made anew before it. Raises LockHeldError, NoSpaceError (nothing is written),
    TargetUnreachableError where no backup leads to an allowed point.
    """
    began = clock.monotonic()
    check_names(cluster)  # a name that is none is told before anything is made
    moment = clock.now() - cluster.settings.shadow.behind
    with open_shadow(cluster, repository, keeper) as shadow:
        did, waits_for = _go_on(cluster, shadow, moment, progress)
        assert shadow.record is not None
        proof: ProofSoFar | None = None
        holds: tuple[Hold, ...] = ()
        if check or (check is None and _due(cluster, shadow.record)):
            proof, holds = _prove(cluster, repository, shadow)
            if shadow.past_hold:
                # What was found came with the last step: back to before it, from the repository.
                shadow.remove()
                did, waits_for = _make(cluster, shadow, moment, progress, "rebuilt"), _held_by(shadow)
        if keeper is not None:
            shadow.standing()
        assert shadow.record is not None
        return Step(did, shadow.record, proof, holds, waits_for, clock.monotonic() - began)


def _go_on(cluster: Cluster, shadow: Shadow, moment: datetime, progress: Report | None) -> tuple[str, str]:
    if not shadow.ready:
        return _make(cluster, shadow, moment, progress, "made"), _held_by(shadow)
    if shadow.past_hold:
        shadow.remove()
        return _make(cluster, shadow, moment, progress, "rebuilt"), _held_by(shadow)
    try:
        plan, reach = shadow.next_plan(moment if cluster.settings.shadow.behind else None)
        if plan is None:
            return ("held" if shadow.holds.bound() else "stood"), _held_by(shadow) or reach.reason
        shadow.go(plan, progress)
    except (TargetUnreachableError, RecoveryFailedError) as error:
        if not _can_be_made(cluster, shadow, moment):
            raise
        shadow.remove()
        return _make(cluster, shadow, moment, progress, "rebuilt"), f"it could not go on: {error}"
    return "advanced", _held_by(shadow)


def _held_by(shadow: Shadow) -> str:
    bound = shadow.holds.bound()
    return f"hold {bound.id} at {bound.lsn}: {bound.reason}" if bound is not None else ""


def _can_be_made(cluster: Cluster, shadow: Shadow, moment: datetime) -> bool:
    try:
        _plan(cluster, shadow, moment)
    except KnockwoodError:
        return False
    return True


def _make(cluster: Cluster, shadow: Shadow, moment: datetime, progress: Report | None, did: str) -> str:
    shadow.make(cluster.name, _plan(cluster, shadow, moment), progress)
    return did


def _plan(cluster: Cluster, shadow: Shadow, moment: datetime) -> RestorePlan:
    """Where a new shadow begins: as new as `behind` allows, before every hold."""
    repository, bound = shadow.repository, shadow.holds.bound()
    target: Target = ToTime(moment) if cluster.settings.shadow.behind else Latest()
    plan: RestorePlan | None
    try:
        plan = resolve(repository, target, accept_loss=True, programs_for=cluster.programs)
    except TargetUnreachableError:
        # Every backup is younger than that: the newest one as it is, then it waits there.
        newest = max(list_backups(repository), key=lambda b: (b.timeline, b.stop_lsn), default=None)
        if newest is None:
            raise
        plan = resolve(repository, ToLsn(newest.stop_lsn), backup=newest.id, programs_for=cluster.programs)
    end = plan.target_lsn if plan.target_lsn is not None else plan.backup.stop_lsn
    if bound is not None and end >= bound.lsn:
        before = ToLsn(Lsn(max(bound.lsn.value - 1, 0)))
        plan = resolve(repository, before, programs_for=cluster.programs)
    return replace(plan, missing=None)


def check_names(cluster: Cluster) -> list[str]:
    """The checks that a shadow gets, in the registry's order."""
    wanted = cluster.settings.shadow.checks
    if wanted is not None:
        return [check.name for check in select(wanted) if check.name not in ABOUT_THE_SERVER]
    light = [check for check in all_checks() if check.weight is Weight.LIGHT]
    return [check.name for check in light if check.name not in ABOUT_THE_SERVER]


def _due(cluster: Cluster, record: ShadowRecord) -> bool:
    if record.proof is None:
        return True
    return clock.now() - record.proof.checked_at >= cluster.settings.shadow.check_every


def _prove(cluster: Cluster, repository: Repository, shadow: Shadow) -> tuple[ProofSoFar, tuple[Hold, ...]]:
    """Check the shadow where it stands, write down what was said, and set holds for what was found."""
    assert shadow.record is not None
    assert shadow.record.stand is not None
    stand, clean = shadow.record.stand, shadow.record.good
    report = _examine(cluster, repository, shadow)
    checks = tuple(
        (result.name, result.verdict, _detail(result.findings, [gap.reason for gap in result.not_checked]))
        for result in report.results
    )
    proof = ProofSoFar(stand.reached, report.verdict, clock.now(), checks)
    shadow.holds.forget(frozenset(r.name for r in report.results if r.verdict is Verdict.HELD))
    at = clean.reached if clean is not None else stand.reached
    holds = hold_for(shadow.holds, report.findings, at)
    shadow.proved(proof)
    return proof, holds


def _detail(findings: Iterable[Finding], reasons: Iterable[str]) -> str:
    return "; ".join([*(found.summary for found in findings), *reasons][:3])


def _examine(cluster: Cluster, repository: Repository, shadow: Shadow) -> CheckReport:
    clone = shadow.standing()
    with connect(clone.dsn("template1")) as connection:
        facts = server_facts(connection)
    home = database_of(cluster.dsn)
    invariants = tuple(replace(each, database=each.database or home) for each in cluster.invariants())
    subject = Subject(
        cluster=cluster.name,
        dsn=clone.dsn(),
        facts=facts,
        role=Role.CLONE,
        data_directory=clone.data_directory,
        repository=repository,
        programs=clone.programs,
        invariants=invariants,
    )
    return run_checks(subject, check_names(cluster))
