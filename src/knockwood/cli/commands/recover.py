"""`knockwood recover`: the smallest safe repair of what was found, shown first, then carried out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from knockwood.cli.answer import Answer, coloured, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import check_progress, spinner
from knockwood.errors import UsageError
from knockwood.model import Finding
from knockwood.model.recovery import ExpectedLoss, Plan, StepResult
from knockwood.operations import recover as operation
from knockwood.operations.recover import Executed, Proposal, Wish
from knockwood.recover.execute import StepProgress, Unfinished
from knockwood.recover.plan.parse import parse_findings
from knockwood.repository.targets import parse_target


def recover(
    *,
    check: Annotated[
        tuple[str, ...], Parameter(negative="", help="Look with these checks; otherwise with the light ones.")
    ] = (),
    finding: Annotated[
        Path | None, Parameter(help="Take what `check --json` printed into this file; - is standard input.")
    ] = None,
    heavy: Annotated[bool, Parameter(negative="", help="Look with the heavy checks too.")] = False,
    here: Annotated[bool, Parameter(negative="", help="Run heavy checks on the server itself.")] = False,
    xid: Annotated[
        tuple[int, ...], Parameter(negative="", help="A transaction that wrote wrong rows: undo it.")
    ] = (),
    in_place: Annotated[
        bool, Parameter(negative="", help="Restore the whole cluster in place: the last resort.")
    ] = False,
    to: Annotated[str, Parameter(help="For --in-place: latest, an LSN, a time, or before-XID.")] = "latest",
    apply: Annotated[
        bool, Parameter(negative="", help="Carry the plan out; otherwise it is only shown.")
    ] = False,
    approve: Annotated[
        str | None, Parameter(help="Carry it out only if it is the plan with this id.")
    ] = None,
    resume: Annotated[bool, Parameter(negative="", help="Go on with what was killed or has failed.")] = False,
    roll_back: Annotated[
        bool, Parameter(negative="", help="Take back what was killed or has failed.")
    ] = False,
    role: Annotated[
        str | None, Parameter(help="Connect as this superuser; otherwise as the dsn says.")
    ] = None,
    common: Common = DEFAULT,
) -> Answer:
    """Plan the smallest safe repair of what the checks find, show it, and with --apply carry it out.

    A run that was killed goes on with --resume, or is taken back with --roll-back.
    """
    _require_one(apply or approve is not None, resume, roll_back)
    if to != "latest" and not in_place:
        raise UsageError("--to belongs to --in-place", hint="knockwood recover --in-place --to TARGET")
    cluster = common.open_cluster().as_role(role)
    if resume or roll_back:
        with _progress(common.json) as told:
            done = operation.resume(cluster, back=roll_back, here=here, on_step=told)
        return _executed(done)
    wish = Wish(xid, in_place, parse_target(to), to)
    with check_progress(quiet=common.json) as on_check:
        proposal = operation.propose(
            cluster,
            names=check,
            findings=_given(finding),
            heavy=heavy,
            here=here,
            wish=wish,
            progress=on_check,
        )
    nothing = not (proposal.findings or proposal.plan.steps or proposal.plan.refused)
    if nothing or not (apply or approve is not None):
        return Answer(_proposal_values(proposal), lambda c: _show_proposal(c, proposal), proposal.verdict)
    with _progress(common.json) as told:
        if approve is None:
            return _executed(operation.carry_out(cluster, proposal, here=here, on_step=told))
        repository = proposal.repository
        done = operation.execute(
            cluster, proposal.plan, approve=approve, here=here, repository=repository, on_step=told
        )
    return _executed(done)


def _require_one(*given: bool) -> None:
    if sum(given) > 1:
        raise UsageError("say one of --apply (or --approve), --resume and --roll-back")


def _given(path: Path | None) -> tuple[Finding, ...] | None:
    if path is None:
        return None
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        return parse_findings(json.loads(text))
    except OSError as error:
        raise UsageError("the findings cannot be read", where=str(path), hint=error.strerror) from error
    except ValueError as error:
        raise UsageError(
            f"not JSON: {error}", where=str(path), hint="give what check --json prints"
        ) from error


class _progress:  # noqa: N801 -- used as a statement
    """Says which step is at work."""

    def __init__(self, quiet: bool) -> None:
        self._spinner = spinner("recover", quiet=quiet)

    def __enter__(self) -> Any:
        say = self._spinner.__enter__()

        def told(progress: StepProgress) -> None:
            if progress.result is None:
                say(f"[{progress.position}/{progress.total}] {progress.step.title}")

        return told

    def __exit__(self, *error: Any) -> None:
        self._spinner.__exit__(*error)


# --- a plan ----------------------------------------------------------------------------------------


def _proposal_values(proposal: Proposal) -> dict[str, Any]:
    return {
        "plan": proposal.plan.as_json(),
        "findings": [each.as_json() for each in proposal.findings],
        "not_checked": [each.as_json() for each in proposal.not_checked],
        "unfinished": [_unfinished_values(each) for each in proposal.unfinished],
    }


def _unfinished_values(entry: Unfinished) -> dict[str, Any]:
    return {
        "folder": str(entry.folder),
        "plan": entry.plan.id,
        "started_at": entry.started_at.isoformat(),
        "steps_done": entry.steps_done,
        "steps": len(entry.plan.steps),
        "rolling_back": entry.rolling_back,
        "reason": entry.reason,
    }


def _show_proposal(console: Console, proposal: Proposal) -> None:
    plan = proposal.plan
    for entry in proposal.unfinished:
        why = entry.reason or "it was killed"
        console.print(
            f"[bold red]unfinished[/] a recovery of {entry.started_at:%Y-%m-%d %H:%M:%S} UTC,"
            f" {entry.steps_done} of {len(entry.plan.steps)} steps done: {escape(why)}",
            soft_wrap=True,
        )
        console.print("  end it first: knockwood recover --resume, or --roll-back")
    if not proposal.findings and not plan.steps and not plan.refused:
        console.print("nothing was found that could be repaired")
    if plan.steps:
        _show_plan(console, plan)
    for reason in plan.refused:
        console.print(f"[yellow]not done[/] {escape(reason)}", soft_wrap=True)
    for gap in proposal.not_checked:
        console.print(f"[yellow]not checked[/] {gap.check}: {escape(gap.reason)}", soft_wrap=True)
    if plan.steps:
        console.print(f"\ncarry it out with --apply, or exactly this one with --approve {plan.id}")


def _show_plan(console: Console, plan: Plan) -> None:
    console.print(f"plan [bold]{plan.id}[/]: {escape(plan.purpose)}")
    table = Table("", "step", "locks", "writers wait", "lasts", "taken back by", box=None)
    for number, step in enumerate(plan.steps, 1):
        table.add_row(
            f"{number}.",
            escape(step.title),
            escape(step.locks),
            seconds(step.blocked_seconds),
            seconds(step.seconds),
            escape(step.undo),
        )
    console.print(table)
    for number, step in enumerate(plan.steps, 1):
        for condition in step.preconditions:
            detail = f": {condition.detail}" if condition.detail else ""
            console.print(f"  {number}. only if {escape(condition.name)}{escape(detail)}", soft_wrap=True)
    console.print(f"lost for good: {escape(_loss(plan.expected_loss))}")
    for finding in plan.heals:
        console.print(
            f"heals {escape(finding.summary)} [dim]{escape(str(finding.location))}[/]", soft_wrap=True
        )
    for other in plan.alternatives:
        console.print(
            f"[dim]instead[/] {escape(other.title)}: {escape(other.why_not)}"
            f" [dim](lost: {escape(_loss(other.expected_loss))}; locks: {escape(other.locks)};"
            f" lasts: {seconds(other.seconds)})[/]",
            soft_wrap=True,
        )


def _loss(loss: ExpectedLoss) -> str:
    if loss.nothing:
        return "nothing"
    counted = [
        f"{'unknown how many' if count is None else count} {what}"
        for count, what in ((loss.transactions, "transactions"), (loss.rows, "rows"))
        if count != 0
    ]
    return ", ".join(counted) + (f" ({loss.detail})" if loss.detail else "")


# --- a recovery ------------------------------------------------------------------------------------


def _executed(done: Executed) -> Answer:
    values = _executed_values(done)
    values["notes"] = list(done.notes)
    values["earlier"] = [_executed_values(each) for each in done.earlier]
    return Answer(values, lambda console: _show_executed(console, done), done.verdict)


def _executed_values(done: Executed) -> dict[str, Any]:
    return {
        "plan": done.plan.as_json(),
        "recovery": done.recovery.as_json(),
        "record": done.record,
        "journal": str(done.folder),
    }


def _show_executed(console: Console, done: Executed) -> None:
    for each in done.earlier:
        _show_recovery(console, each)
        console.print("pages had changed since it was planned, so a new plan was made and carried out")
    _show_recovery(console, done)
    for note in done.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    console.print(f"recovery: {coloured(done.verdict)}")


def _show_recovery(console: Console, done: Executed) -> None:
    for result in done.recovery.results:
        _show_result(console, result)
    for claim in done.recovery.claims:
        detail = f": {claim.detail}" if claim.detail else ""
        console.print(f"{coloured(claim.verdict):>28}  {escape(claim.name + detail)}", soft_wrap=True)
    refused = done.plan.refused if done.recovery.complete else ()
    for reason in refused:
        console.print(f"[yellow]not done[/] {escape(reason)}", soft_wrap=True)
    if done.record:
        console.print(f"kept in the repository as recoveries/{done.record}.json.zst")


def _show_result(console: Console, result: StepResult) -> None:
    detail = f": {result.detail}" if result.detail else ""
    words = str(result.outcome).replace("_", " ")
    waited = f", writers waited {seconds(result.blocked_seconds)}" if result.blocked_seconds else ""
    console.print(
        f"[bold]{words}[/] {escape(result.title + detail)} [dim]{seconds(result.seconds)}{waited}[/]",
        soft_wrap=True,
    )
    for path in result.evidence:
        console.print(f"  [dim]kept {escape(path)}[/]", soft_wrap=True)
