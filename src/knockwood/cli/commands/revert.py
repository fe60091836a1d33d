"""`knockwood revert`: take transactions back and keep what came after them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from knockwood.cli.answer import Answer, coloured, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import spinner
from knockwood.history.touched import ROW_LIMIT
from knockwood.history.transaction import Transaction
from knockwood.operations import revert as operation
from knockwood.operations.revert import MAX_LOCK_WAIT, Executed, Proposal, Wish
from knockwood.recover.plan.rows import Conflict, Mode

SHOWN = 20


def revert(
    *xids: Annotated[int, Parameter(help="Transactions to take back; log and blame name them.")],
    mode: Annotated[
        Literal["strict", "skip-conflicts", "cascade", "force"],
        Parameter(
            help="What is done about conflicts: refuse, leave those rows, dependents too, or overwrite."
        ),
    ] = "strict",
    counter: Annotated[
        tuple[str, ...],
        Parameter(
            negative="", help="TABLE.COLUMN whose number only ever adds up: C + (B - A) is no conflict."
        ),
    ] = (),
    apply: Annotated[
        bool, Parameter(negative="", help="Carry the plan out; otherwise it is only shown.")
    ] = False,
    approve: Annotated[
        str | None, Parameter(help="Carry it out only if it is the plan with this id.")
    ] = None,
    max_lock_wait: Annotated[
        float, Parameter(help="Seconds to wait for a row that somebody holds.")
    ] = MAX_LOCK_WAIT,
    max_rows: Annotated[int, Parameter(help="Refuse more changed rows than this.")] = ROW_LIMIT,
    common: Common = DEFAULT,
) -> Answer:
    """Undo what transactions changed, row by row and column by column, and nothing else.

    Later edits of the same rows are kept where they are of other columns; where they are of the same, that is
    a conflict, shown and refused unless the mode says otherwise.
    """
    cluster = common.open_cluster()
    wish = Wish(xids, Mode(mode), counter, max_lock_wait, max_rows)
    with spinner("revert", quiet=common.json) as tell:
        going = apply or approve is not None
        entry = operation.unfinished(cluster, xids) if going and xids else None
        if entry is not None:
            tell("going on with the run that was killed")
            return _executed(operation.resume(cluster, entry), None)
        proposal = operation.propose(cluster, wish, progress=tell)
        if not going or not proposal.plan.steps:
            return _proposed(proposal)
        tell("writing")
        return _executed(operation.execute(cluster, proposal, approve=approve), proposal)


def _proposed(proposal: Proposal) -> Answer:
    return Answer(
        _values(proposal, None),
        lambda console: _show(console, proposal, None),
        refused=proposal.refused,
    )


def _executed(done: Executed, proposal: Proposal | None) -> Answer:
    return Answer(
        _values(proposal, done),
        lambda console: _show(console, proposal, done),
        done.recovery.verdict,
        refused=any(result.outcome == "refused" for result in done.recovery.results),
    )


# --- JSON --------------------------------------------------------------------------------------------


def _values(proposal: Proposal | None, done: Executed | None) -> dict[str, Any]:
    plan = done.plan if done else proposal.plan if proposal else None
    complete = done is not None and done.recovery.complete
    return {
        "reverted": list(plan.steps[0].arguments["xids"]) if plan and complete else [],
        "transactions": [_transaction(each) for each in proposal.transactions] if proposal else [],
        "conflicts": [each.as_json() for each in proposal.conflicts] if proposal else [],
        "waived": [each.as_json() for each in proposal.waived] if proposal else [],
        "dependents": [each.as_json() for each in proposal.dependents] if proposal else [],
        "already": proposal.already if proposal else None,
        "plan": plan.as_json() if plan else None,
        "recovery": done.recovery.as_json() if done else None,
        "xid": done.xid if done else None,
        "notes": list(proposal.notes) if proposal else [],
    }


def _transaction(one: Transaction) -> dict[str, Any]:
    return {
        "xid": one.xid,
        "commit_lsn": str(one.commit_lsn),
        "commit_time": one.commit_time.isoformat(),
        "label": one.label,
    }


# --- for people --------------------------------------------------------------------------------------


def _show(console: Console, proposal: Proposal | None, done: Executed | None) -> None:
    if proposal is not None and (done is None or not done.recovery.complete):
        _show_proposal(console, proposal)
    if done is not None:
        _show_done(console, done)


def _show_proposal(console: Console, proposal: Proposal) -> None:
    for one in proposal.transactions:
        label = f", {escape(one.label)}" if one.label else ""
        console.print(
            f"transaction [bold]{one.xid}[/], committed {one.commit_time.isoformat()} at {one.commit_lsn}{label}"
        )
    plan = proposal.plan
    for step in plan.steps:
        console.print(f"[bold]{escape(step.title)}[/]", soft_wrap=True)
        console.print(
            f"  locks      {escape(step.locks)}, about {seconds(step.blocked_seconds)}", soft_wrap=True
        )
        for each in step.preconditions:
            console.print(f"  requires   {escape(each.name)}: {escape(each.detail)}", soft_wrap=True)
        if step.arguments["replica_role"]:
            reasons = escape("; ".join(step.arguments["reasons"]))
            console.print(f"  [yellow]under the replication role[/], because {reasons}", soft_wrap=True)
        console.print(f"  undo       {escape(step.undo)}", soft_wrap=True)
    if plan.steps:
        loss = plan.expected_loss
        lost = (
            "nothing" if loss.nothing else f"{loss.rows} later edit(s) of {loss.transactions} transaction(s)"
        )
        console.print(
            f"  loses      {lost}{': ' + escape(loss.detail) if loss.detail else ''}", soft_wrap=True
        )
    _show_conflicts(console, "conflict", proposal.conflicts)
    _show_conflicts(console, "passed over", proposal.waived)
    for known in proposal.dependents:
        stands, what = known.dependent, known.as_json()
        when = f", committed {what['commit_time']}" if what["commit_time"] else ""
        kept = "stays" if stands.kept else "is given up or left"
        console.print(
            f"dependent    {what['xid']}{when}: {stands.kind}, {stands.rows} row(s), {kept}", soft_wrap=True
        )
    for note in proposal.notes:
        console.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
    _show_end(console, proposal)


def _show_conflicts(console: Console, title: str, conflicts: tuple[Conflict, ...]) -> None:
    for each in conflicts[:SHOWN]:
        key = ", ".join(f"{name}={value}" for name, value in each.key.items())
        columns = f" ({', '.join(each.columns)})" if each.columns else ""
        writers = f", by {', '.join(map(str, each.writers))}" if each.writers else ""
        detail = f": {each.detail}" if each.detail else ""
        text = f"{each.table} {key}: {each.kind}{columns}{writers}{detail}"
        console.print(f"[yellow]{title}[/]     {escape(text)}", soft_wrap=True)
    if len(conflicts) > SHOWN:
        console.print(f"  and {len(conflicts) - SHOWN} more (--json lists them all)")


def _show_end(console: Console, proposal: Proposal) -> None:
    if proposal.nothing:
        console.print("nothing is left to be reverted: every row is as it was before")
    elif proposal.refused:
        for reason in proposal.plan.refused:
            console.print(f"[bold red]refused[/] {escape(reason)}", soft_wrap=True)
        if proposal.conflicts:
            console.print("other modes: --mode skip-conflicts, cascade, force; see docs/revert.md")
    else:
        console.print(f"plan {proposal.plan.id}; carry it out with --apply, or --approve {proposal.plan.id}")


def _show_done(console: Console, done: Executed) -> None:
    for result in done.recovery.results:
        console.print(
            f"{escape(str(result.outcome).replace('_', ' '))}: {escape(result.detail)},"
            f" {seconds(result.seconds)}, rows locked for {seconds(result.blocked_seconds)}",
            soft_wrap=True,
        )
        for path in result.evidence:
            console.print(f"  the rows before: {escape(path)}", soft_wrap=True)
    for claim in done.recovery.claims:
        console.print(
            f"{coloured(claim.verdict)} {escape(claim.name)}: {escape(claim.detail)}", soft_wrap=True
        )
    if done.xid is not None:
        console.print(f"take it back with knockwood revert {done.xid}")
