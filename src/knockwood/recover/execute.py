"""Execute an approved plan step by step, such that a kill at any point can be resumed or rolled back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

from knockwood.errors import InternalError, KnockwoodError, RefusedError
from knockwood.host import clock
from knockwood.model.proof import Claim
from knockwood.model.recovery import Outcome, Plan, Recovery, Step, StepResult
from knockwood.recover.journal import (
    Journal,
    StepJournal,
    cluster_lock,
    folders,
    holder,
    new_folder,
)
from knockwood.recover.plan.parse import parse_claim, parse_result

_DONE = (Outcome.DONE, Outcome.ALREADY_DONE)
_UNDONE = (Outcome.ROLLED_BACK, Outcome.ALREADY_DONE)


class Handler(Protocol):
    """Carries out one kind of step.

    `run` checks the step's preconditions again, under the lock it takes. It is idempotent: after a kill it is
    called again with the same journal and finds out what is done already. Raising RefusedError (or returning
    `REFUSED`) says that nothing was changed; any other error leaves the step open. `roll_back` is as
    idempotent, is also called for a step that was killed half-way, and returns `ROLLED_BACK` (also where there
    is nothing to take back, with a detail that says so).

    A handler may have a method `independent(step, refused)` that tells whether its step is safe although an
    earlier one was refused: then the execution goes on with it. Without one it ends there.
    """

    @property
    def kind(self) -> str: ...

    def run(self, step: Step, journal: StepJournal) -> StepResult: ...

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class StepProgress:
    """Said before each step (`result` is None) and after it."""

    step: Step
    position: int
    total: int
    result: StepResult | None = None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An execution that was killed or has failed: to be resumed or rolled back. `reason` None: it was killed."""

    folder: Path
    plan: Plan
    started_at: datetime
    steps_done: int
    rolling_back: bool
    reason: str | None


Progress = Callable[[StepProgress], None]
Verify = Callable[[], tuple[Claim, ...]]
Keep = Callable[[str, Recovery], None]
"""Stores an outcome under a name that no other outcome has."""


def execute(
    plan: Plan,
    handlers: Iterable[Handler],
    state: Path,
    *,
    approve: str,
    verify: Verify | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Execute a plan whose id was approved; its journal goes to a new folder under `state`.

    After the last step `verify` asks the checks again, and `keep` stores the outcome (it may be called twice
    with the same one). A step that fails ends the run; what is then half-done is found by `unfinished`.
    Raises RefusedError for another plan than the approved one, one without steps or with steps nobody can
    carry out, and while an earlier execution on the cluster is unfinished; LockHeldError while one runs.
    """
    if plan.id != approve:
        raise RefusedError(
            f"the plan is {plan.id}, approved was {approve}",
            where=plan.cluster,
            hint="the damage or the cluster has changed since it was shown: look at the plan again",
        )
    if not plan.steps:
        reasons = "; ".join(plan.refused) or "nothing is to be done"
        raise RefusedError("the plan has no steps", where=plan.cluster, hint=reasons)
    known = _by_kind(plan, handlers)
    with cluster_lock(state, plan.cluster):
        _require_none_open(state, plan.cluster)
        journal = Journal.create(new_folder(state, plan), plan)
        try:
            journal.append("begun", plan=plan.id, holder=holder())
            return _forward(journal, known, verify, keep, progress)
        finally:
            journal.close()


def resume(
    folder: Path,
    handlers: Iterable[Handler],
    *,
    verify: Verify | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Go on with an execution that was killed or has failed, from its first step that is not done.

    Raises RefusedError when it is finished or is being rolled back.
    """
    with cluster_lock(_state_of(folder), Journal.open(folder).plan.cluster):
        journal = Journal.open(folder, write=True)
        try:
            _require_open(journal)
            if _rolling_back(journal):
                raise RefusedError(
                    "it is being rolled back", where=str(folder), hint="go on with --roll-back"
                )
            known = _by_kind(journal.plan, handlers)
            journal.append("resumed", holder=holder())
            return _forward(journal, known, verify, keep, progress)
        finally:
            journal.close()


def roll_back(
    folder: Path,
    handlers: Iterable[Handler],
    *,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Take back what an unfinished execution has done, the last step first.

    Resumes a roll-back that was killed. Where a step refuses before any is undone (others may have built on
    it), all stays as it was, and `resume` is open again. Raises RefusedError when the execution is finished.
    """
    with cluster_lock(_state_of(folder), Journal.open(folder).plan.cluster):
        journal = Journal.open(folder, write=True)
        try:
            _require_open(journal)
            known = _by_kind(journal.plan, handlers)
            journal.append("rolling_back", holder=holder())
            return _backward(journal, known, keep, progress)
        finally:
            journal.close()


def unfinished(state: Path, cluster: str | None = None) -> list[Unfinished]:
    """The executions that began and came to no end, oldest first. One that runs right now is among them.

    Raises HostError for a journal that is damaged: whether it ended is then unknown.
    """
    found = []
    for folder in folders(state):
        journal = Journal.open(folder)
        if journal.finished or cluster not in (None, journal.plan.cluster):
            continue
        failures = [event for event in journal.events if event["event"] in ("stopped", "failed", "resumed")]
        stopped = failures and failures[-1]["event"] != "resumed"
        found.append(
            Unfinished(
                folder,
                journal.plan,
                _began(journal),
                len(_results(journal)),
                _rolling_back(journal),
                str(failures[-1]["reason"]) if stopped else None,
            )
        )
    return found


def _forward(
    journal: Journal,
    handlers: Mapping[str, Handler],
    verify: Verify | None,
    keep: Keep | None,
    progress: Progress | None,
) -> Recovery:
    steps = journal.plan.steps
    refused: dict[int, StepResult] = {}
    for position, step in enumerate(steps):
        if position in _results(journal):
            continue
        before = [steps[number] for number in refused]
        if not _independent(step, before, handlers):
            why = f"it rests on what was refused: {before[0].title}"
            refused[position] = StepResult(step.kind, step.title, Outcome.REFUSED, why)
            continue
        if progress:
            progress(StepProgress(step, position + 1, len(steps)))
        if not any(event["event"] == "started" for event in journal.of_step(position)):
            journal.append("started", step=position, kind=step.kind)
        result = _run(journal, position, handlers[step.kind].run)
        if progress:
            progress(StepProgress(step, position + 1, len(steps), result))
        left_open = StepJournal(journal, position).notes
        if result.outcome is Outcome.REFUSED and not left_open and _others_go_on(steps[position:], handlers):
            journal.append("stopped", step=position, reason=result.detail, result=result.as_json())
            refused[position] = result
            continue
        if result.outcome not in _DONE:
            return _stop(journal, position, result, verify, keep)
        journal.append("done", step=position, result=result.as_json())
    results = dict(sorted((_results(journal) | refused).items()))
    return _finish(journal, "refused" if refused else "done", tuple(results.values()), verify, keep)


def _others_go_on(steps: Sequence[Step], handlers: Mapping[str, Handler]) -> bool:
    """Whether any step after the first, which was refused, is safe all the same."""
    refused, *others = steps
    return any(_independent(step, [refused], handlers) for step in others)


def _independent(step: Step, refused: Iterable[Step], handlers: Mapping[str, Handler]) -> bool:
    ask = getattr(handlers[step.kind], "independent", None)
    return all(ask is not None and ask(step, other) for other in refused)


def _backward(
    journal: Journal, handlers: Mapping[str, Handler], keep: Keep | None, progress: Progress | None
) -> Recovery:
    steps = journal.plan.steps
    started = sorted({e["step"] for e in journal.events if e["event"] == "started"}, reverse=True)
    for position in started:
        if position in _undone(journal):
            continue
        step = steps[position]
        if progress:
            progress(StepProgress(step, position + 1, len(steps)))
        result = _run(journal, position, handlers[step.kind].roll_back)
        if progress:
            progress(StepProgress(step, position + 1, len(steps), result))
        if result.outcome not in _UNDONE:
            journal.append("failed", step=position, reason=result.detail, result=result.as_json())
            if result.outcome is Outcome.REFUSED and not _undone(journal):
                journal.append("stays", step=position)
            return _recovery(journal, (*_undone(journal).values(), result), clock.now())
        journal.append("undone", step=position, result=result.as_json())
    return _finish(journal, "rolled back", tuple(_undone(journal).values()), None, keep)


def _run(journal: Journal, position: int, act: Callable[[Step, StepJournal], StepResult]) -> StepResult:
    """Call a handler; an error that it foresaw is a result. Anything else is a defect, and is raised."""
    step = journal.plan.steps[position]
    began = clock.monotonic()
    try:
        result = act(step, StepJournal(journal, position))
    except RefusedError as error:
        result = StepResult(step.kind, step.title, Outcome.REFUSED, _reason(error))
    except KnockwoodError as error:
        result = StepResult(step.kind, step.title, Outcome.FAILED, _reason(error))
    except BaseException as error:
        journal.append("failed", step=position, reason=f"{type(error).__name__}: {error}")
        raise
    if result.kind != step.kind:
        raise InternalError(f"the handler of {step.kind!r} answered for {result.kind!r}")
    if not result.seconds:
        result = replace(result, seconds=round(clock.monotonic() - began, 3))
    return result


def _stop(
    journal: Journal, position: int, result: StepResult, verify: Verify | None, keep: Keep | None
) -> Recovery:
    """End at a step that was not done. Refused with nothing noted, it has changed nothing: then this is over."""
    journal.append("stopped", step=position, reason=result.detail, result=result.as_json())
    if result.outcome is Outcome.REFUSED and not StepJournal(journal, position).notes:
        results = (*_results(journal).values(), result)
        return _finish(journal, "refused", results, verify if len(results) > 1 else None, keep)
    return _recovery(journal, (*_results(journal).values(), result), clock.now())


def _finish(
    journal: Journal,
    how: str,
    results: tuple[StepResult, ...],
    verify: Verify | None,
    keep: Keep | None,
) -> Recovery:
    """Verify, keep the outcome, and close the journal. A run killed in between goes on with what it verified."""
    before = [
        e
        for e in journal.events
        if e["event"] not in ("resumed", "rolling_back", "stopped", "started", "stays")
    ]
    if before and before[-1]["event"] == "verified" and before[-1]["how"] == how:
        verified = before[-1]
    else:
        claims = verify() if verify else ()
        journal.append("verified", how=how, claims=[claim.as_json() for claim in claims])
        verified = journal.events[-1]
    recovery = _recovery(
        journal,
        results,
        datetime.fromisoformat(verified["time"]),
        tuple(parse_claim(claim) for claim in verified["claims"]),
    )
    if keep:
        outcomes = sum(event["event"] == "verified" for event in journal.events)
        keep(journal.folder.name if outcomes == 1 else f"{journal.folder.name}.{outcomes}", recovery)
    journal.append("finished", how=how)
    return recovery


def _recovery(
    journal: Journal, results: tuple[StepResult, ...], end: datetime, claims: tuple[Claim, ...] = ()
) -> Recovery:
    return Recovery(journal.plan.id, journal.plan.cluster, _began(journal), end, results, claims)


def _results(journal: Journal) -> dict[int, StepResult]:
    """The steps that are done, by position."""
    done = {e["step"]: parse_result(e["result"]) for e in journal.events if e["event"] == "done"}
    return dict(sorted(done.items()))


def _undone(journal: Journal) -> dict[int, StepResult]:
    return {e["step"]: parse_result(e["result"]) for e in journal.events if e["event"] == "undone"}


def _began(journal: Journal) -> datetime:
    if not journal.events:
        # Killed between the plan and the first line: the folder's name holds the time.
        return datetime.strptime(journal.folder.name[:16] + "+0000", "%Y%m%dT%H%M%SZ%z")
    return datetime.fromisoformat(journal.events[0]["time"])


def _rolling_back(journal: Journal) -> bool:
    said = [event["event"] for event in journal.events if event["event"] in ("rolling_back", "stays")]
    return bool(said) and said[-1] == "rolling_back"


def _by_kind(plan: Plan, handlers: Iterable[Handler]) -> dict[str, Handler]:
    known = {handler.kind: handler for handler in handlers}
    missing = sorted({step.kind for step in plan.steps} - set(known))
    if missing:
        raise RefusedError(
            f"nothing here can carry out a step of the kind {missing[0]!r}", where=plan.cluster
        )
    return known


def _require_none_open(state: Path, cluster: str) -> None:
    for entry in unfinished(state, cluster):
        raise RefusedError(
            f"an earlier recovery of {cluster} is unfinished: {entry.steps_done} of"
            f" {len(entry.plan.steps)} steps are done",
            where=str(entry.folder),
            hint="end it first, with --resume or --roll-back",
        )


def _require_open(journal: Journal) -> None:
    if journal.finished:
        raise RefusedError("this recovery has come to its end", where=str(journal.folder))


def _state_of(folder: Path) -> Path:
    return folder.parent.parent


def _reason(error: KnockwoodError) -> str:
    return f"{error}; {error.hint}" if error.hint else str(error)
