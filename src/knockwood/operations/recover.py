"""From findings to a plan, and from an approved plan to a recovery that is verified and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from knockwood.clone.registry import Registry
from knockwood.errors import KnockwoodError, RefusedError
from knockwood.integrity.check import Budget, NotChecked, Subject, Weight
from knockwood.integrity.registry import select
from knockwood.integrity.run import CheckProgress, Report
from knockwood.model import Claim, Finding, Verdict, worst
from knockwood.model.recovery import Alternative, Outcome, Plan, Recovery
from knockwood.operations import recoveries
from knockwood.operations.beside import beside
from knockwood.operations.check import check
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date, require_complete
from knockwood.operations.recover_facts import Wish, situation, subject_of, whole_restore
from knockwood.recover import execute as execution
from knockwood.recover import statements
from knockwood.recover.execute import Handler, StepProgress, Unfinished
from knockwood.recover.journal import Journal, folders
from knockwood.recover.plan.decide import decide
from knockwood.recover.plan.offer import Offer
from knockwood.recover.plan.table import KIND as RESTORE_TABLE
from knockwood.repository.repository import Repository

IN_PLACE: Final = "restore-in-place"
_PAGE_STEPS: Final = frozenset({"repair-pages", "rebuild-maps", "replace-rows", "reindex"})
_PLANS_ANEW: Final = 2
"""How often a plan that the server outran is made anew, before somebody has to look."""

OnCheck = Callable[[CheckProgress], None]
OnStep = Callable[[StepProgress], None]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan, and what it was made from. `unfinished` are executions that have to be ended first.

    `repository` remembers the WAL that was read: what executes the plan need not read it again.
    """

    plan: Plan
    findings: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...]
    unfinished: tuple[Unfinished, ...] = ()
    repository: Repository | None = field(default=None, repr=False, compare=False)

    @property
    def verdict(self) -> Verdict:
        """Of the cluster now, before anything was done."""
        if self.findings or self.unfinished:
            return Verdict.BROKEN
        return Verdict.NOT_CHECKED if self.not_checked else Verdict.HELD


@dataclass(frozen=True, slots=True)
class Executed:
    """A recovery, and under which name the repository keeps it (None: it has not come to its end).

    `notes` say what to do next; `earlier` are executions of plans that the server outran, the oldest first.
    """

    plan: Plan
    recovery: Recovery
    folder: Path
    record: str | None
    notes: tuple[str, ...] = field(default=())
    earlier: tuple[Executed, ...] = ()
    left: tuple[str, ...] = ()
    """Why what an earlier plan was to mend is in no plan any more."""

    @property
    def verdict(self) -> Verdict:
        """Of all together: what an earlier one found broken counts unless it was asked again, and what was planned
        first and cannot be done any more is broken."""
        if self.left:
            return Verdict.BROKEN
        again = {claim.name for claim in self.recovery.claims}
        left = (claim for each in self.earlier for claim in each.recovery.claims if claim.name not in again)
        return worst([self.recovery.verdict, *(claim.verdict for claim in left)])


def propose(
    cluster: Cluster,
    *,
    names: Iterable[str] = (),
    findings: Iterable[Finding] | None = None,
    heavy: bool = False,
    here: bool = False,
    wish: Wish | None = None,
    progress: OnCheck | None = None,
) -> Proposal:
    """Look for damage (or take what was found before) and make the plan that heals it; nothing is changed.

    A server that does not answer is no error: what it cannot be asked is not checked.
    """
    asked = wish or Wish()
    repository, problem = _repository(cluster)
    # It takes long where much WAL is new, and only the decision needs it.
    with beside(partial(whole_restore, cluster, repository, asked)) as whole:
        subject, down = subject_of(cluster, repository)
        report: Report | None = None
        gaps: tuple[NotChecked, ...] = ()
        if problem:
            gaps += (NotChecked("repository", problem),)
        looking = not asked.in_place or bool(list(names))
        if subject is None:
            gaps += (NotChecked("server", down),)
        elif findings is None and not looking:
            gaps += (NotChecked("findings", "no check was asked for"),)
        elif findings is None:
            report = check(cluster, names, heavy=heavy, here=here, progress=progress)
            report = _with_lost_writes(cluster, report, progress)
            gaps += report.not_checked
        found = tuple(findings) if findings is not None else report.findings if report else ()
        known = situation(cluster, repository, subject, found, report, asked)
        offers: list[Offer] = []
        others: tuple[Alternative, ...] = ()
        if subject is not None and not asked.in_place:
            from knockwood.operations import recover_offers

            offers, others = recover_offers.page_offers(cluster, repository, found, known)
            rows, more = recover_offers.row_offers(cluster, found, known)
            offers, others = [*offers, *rows], (*others, *more)
        plan = decide(found, replace(known, whole=whole()), offers)
    if others:
        plan = replace(plan, alternatives=(*plan.alternatives, *others))
    open_ones = tuple(execution.unfinished(cluster.state, cluster.name))
    return Proposal(plan, found, gaps, open_ones, repository)


def execute(
    cluster: Cluster,
    plan: Plan,
    *,
    approve: str,
    here: bool = False,
    repository: Repository | None = None,
    on_step: OnStep | None = None,
    on_check: OnCheck | None = None,
) -> Executed:
    """Execute an approved plan; verify with the checks that found the damage, and keep the outcome.

    `repository` is the proposal's, where it was just made. Raises RefusedError when the plan is another than the
    approved one or has no steps.
    """
    with _Run(cluster, plan, here, on_check, repository) as run:
        recovery = execution.execute(
            plan,
            run.handlers,
            cluster.state,
            approve=approve,
            verify=run.verify,
            keep=run.keep,
            progress=on_step,
        )
        return run.executed(recovery)


def carry_out(
    cluster: Cluster,
    proposal: Proposal,
    *,
    here: bool = False,
    on_step: OnStep | None = None,
    on_check: OnCheck | None = None,
) -> Executed:
    """Execute the proposal's plan; where damaged pages had changed by then, so that steps were refused, plan anew.

    Readers and writers go on while pages are mended, and one touch can make another class of damage of a page.
    """
    from knockwood.operations.recover_offers import SOUND

    words: dict[str, Any] = {"here": here, "on_step": on_step, "on_check": on_check}
    plan = proposal.plan
    done = execute(cluster, plan, approve=plan.id, repository=proposal.repository, **words)
    for _ in range(_PLANS_ANEW):
        kinds = {each.kind for each in done.recovery.results if each.outcome is Outcome.REFUSED}
        if not kinds or not kinds <= _PAGE_STEPS:
            break
        anew = propose(cluster, findings=proposal.findings)
        if not anew.plan.steps or anew.plan.id == done.plan.id:
            break
        again = execute(cluster, anew.plan, approve=anew.plan.id, repository=anew.repository, **words)
        left = tuple(
            reason
            for reason in anew.plan.refused
            if reason not in plan.refused and not reason.endswith(SOUND)
        )
        done = replace(again, earlier=(*done.earlier, replace(done, earlier=(), left=())), left=left)
    return done


def resume(
    cluster: Cluster,
    *,
    back: bool = False,
    here: bool = False,
    on_step: OnStep | None = None,
    on_check: OnCheck | None = None,
) -> Executed:
    """Go on with the execution that was killed or has failed, or with `back` take back what it did.

    Raises RefusedError when there is none.
    """
    entries = execution.unfinished(cluster.state, cluster.name)
    if not entries:
        raise RefusedError("no recovery of this cluster is unfinished", where=cluster.name)
    folder = entries[0].folder
    # Those of the run that was killed: this one may need none, and would leave them.
    _clones(cluster).sweep()
    with _Run(cluster, entries[0].plan, here, on_check) as run:
        if back:
            recovery = execution.roll_back(folder, run.handlers, keep=run.keep, progress=on_step)
        else:
            recovery = execution.resume(
                folder, run.handlers, verify=run.verify, keep=run.keep, progress=on_step
            )
        return run.executed(recovery)


class _Run:
    """What the handlers, the verification and the record of one execution share."""

    def __init__(
        self,
        cluster: Cluster,
        plan: Plan,
        here: bool,
        progress: OnCheck | None,
        repository: Repository | None = None,
    ) -> None:
        self.cluster = cluster
        self.plan = plan
        self.record: str | None = None
        self._here = here
        self._progress = progress
        self._opened = repository
        self._closing: list[Callable[[], None]] = []
        self._subject: Subject | None = None

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for close in reversed(self._closing):
            close()

    @property
    def repository(self) -> Repository:
        if self._opened is None:
            self._opened = self.cluster.repository()
        return self._opened

    def subject(self) -> Subject:
        """The running server, asked once: its facts do not change while it is mended."""
        if self._subject is None:
            self._subject = self.cluster.subject(Budget(), repository=_repository(self.cluster)[0])
        return self._subject

    @property
    def handlers(self) -> tuple[Handler, ...]:
        """Those of the kinds of step that the plan has; what needs clones is made only then."""
        kinds = {step.kind for step in self.plan.steps}
        found: list[Handler] = list(statements.handlers(self.subject))
        if kinds & _PAGE_STEPS:
            from knockwood.operations.page_repair import PageRepairs

            pages = PageRepairs(self.cluster, self.repository, plan=self.plan)
            self._closing.append(pages.close)
            found += pages.handlers
        if RESTORE_TABLE in kinds:
            from knockwood.operations.restore_table_in_place import table_handler

            found.append(
                table_handler(
                    self.repository,
                    self.cluster.dsn,
                    programs_for=self.cluster.programs,
                    registry=_clones(self.cluster),
                )
            )
        if "revert" in kinds:
            from knockwood.operations import revert

            found.append(revert.handler(self.cluster))
        if IN_PLACE in kinds:
            from knockwood.operations.recover_whole import in_place

            found.append(in_place(self.cluster, self.repository, self.plan))
        return tuple(found)

    def verify(self) -> tuple[Claim, ...]:
        """The checks that found the damage, and the invariants, asked again."""
        if any(step.kind == IN_PLACE for step in self.plan.steps):
            from knockwood.operations.recover_whole import claims_offline

            return claims_offline(self.cluster, self.plan)
        claims = list(_checked_again(self.cluster, self.plan, self._here, self._progress))
        if any(step.kind in _PAGE_STEPS for step in self.plan.steps):
            from knockwood.operations.page_repair import verify_pages

            claims += _attempt("pages again", lambda: verify_pages(self.cluster, self.repository, self.plan))
        if any(step.kind == "revert" for step in self.plan.steps):
            from knockwood.operations import revert

            claims += _attempt("rows again", lambda: revert.verify(self.cluster, self.plan))
        return tuple(claims)

    def keep(self, name: str, recovery: Recovery) -> None:
        """Store the outcome in the repository."""
        recoveries.keep(self.repository, name, self.plan, recovery)
        self.record = name

    def executed(self, recovery: Recovery) -> Executed:
        return Executed(
            self.plan, recovery, self._folder(), self.record, tuple(_notes(self.plan, recovery, self.record))
        )

    def _folder(self) -> Path:
        mine = [each for each in folders(self.cluster.state) if Journal.open(each).plan.id == self.plan.id]
        return mine[-1]


def _checked_again(cluster: Cluster, plan: Plan, here: bool, progress: OnCheck | None) -> Iterator[Claim]:
    from knockwood.operations.page_repair_verify import asks_again

    # Pages that were mended are asked again one by one: that does not grow with the cluster.
    names = {finding.check for finding in plan.heals if not asks_again(plan, finding)}
    if cluster.invariants():
        names.add("invariants")
    if not names:
        return
    try:
        if not here and any(each.weight is Weight.HEAVY for each in select(names)):
            # They look at a clone, which has to hold what was just mended.
            require_complete(bring_up_to_date(cluster, cluster.repository()))
        report = check(cluster, sorted(names), here=here, progress=progress)
    except KnockwoodError as error:
        yield Claim(f"checks again: {', '.join(sorted(names))}", Verdict.NOT_CHECKED, str(error))
        return
    for result in report.results:
        told = [f"{finding.summary} ({finding.location})" for finding in result.findings]
        told += [gap.reason for gap in result.not_checked]
        more = f"; and {len(told) - 5} more" if len(told) > 5 else ""
        yield Claim(f"check {result.name}", result.verdict, "; ".join(told[:5]) + more)


def _attempt(name: str, ask: Callable[[], tuple[Claim, ...]]) -> tuple[Claim, ...]:
    """The claims, or that they could not be made: never an error, never green."""
    try:
        return ask()
    except KnockwoodError as error:
        return (Claim(name, Verdict.NOT_CHECKED, str(error)),)


def _notes(plan: Plan, recovery: Recovery, record: str | None) -> Iterator[str]:
    if record is None:
        yield "it has not come to its end: knockwood recover --resume, or --roll-back"
        return
    kinds = {result.kind for result in recovery.results}
    if IN_PLACE in kinds and recovery.complete:
        yield "start the server as you always do, then look again: knockwood check"
        yield "replication slots are gone with the old cluster: standbys and receivers need theirs anew"
        yield "once all is well, remove the old cluster's folder yourself"
    if any(result.values.get("new_full_backup_needed") for result in recovery.results):
        yield "take a new full backup now: knockwood backup (the WAL does not hold all pages as they were mended)"
    elif IN_PLACE in kinds:
        yield "take a new full backup now: knockwood backup"
    elif recovery.complete:
        yield "a new full backup shortens the next recovery: knockwood backup"
    for result in recovery.results:
        standbys = result.values.get("standbys_not_checked")
        if standbys:
            yield f"standbys were not checked: {', '.join(map(str, standbys))}"


def _with_lost_writes(cluster: Cluster, report: Report, progress: OnCheck | None) -> Report:
    """Whether a table lost a write has to be known before an index is built from it."""
    unknown = not any(result.name == "lost_writes" for result in report.results)
    doubt = any(finding.location.index is not None for finding in report.findings)
    if not (unknown and doubt) or cluster.settings.data_directory is None:
        return report
    more = check(cluster, ["lost_writes"], progress=progress)
    return Report((*report.results, *more.results))


def _clones(cluster: Cluster) -> Registry:
    return Registry(cluster.settings.proof.clones or cluster.state)


def _repository(cluster: Cluster) -> tuple[Repository | None, str]:
    try:
        return cluster.repository(), ""
    except KnockwoodError as error:
        return None, str(error)


__all__ = ["Executed", "Proposal", "Wish", "carry_out", "execute", "propose", "resume"]
