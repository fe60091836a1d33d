"""`knockwood bisect`: since when is it wrong."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from knockwood.cli.answer import Answer, coloured, megabytes, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import spinner
from knockwood.errors import UsageError
from knockwood.history.bisect import Outcome
from knockwood.model import Commit
from knockwood.operations.bisect import Bisection, Probe
from knockwood.operations.bisect import bisect as run_bisect
from knockwood.operations.bisect_question import question
from knockwood.repository.targets import parse_target
from knockwood.settings.schema import parse_duration

_HEADLINES = {
    Outcome.FOUND: "found",
    Outcome.NARROWED: "narrowed down",
    Outcome.BAD_FROM_START: "bad from the start of the range",
    Outcome.NEVER_BAD: "never bad",
    Outcome.NOT_MONOTONE: "it turned more than once",
    Outcome.NOT_CHECKABLE: "not checkable",
}


def bisect(
    *,
    invariant: Annotated[str | None, Parameter(help="An invariant of the settings.")] = None,
    check: Annotated[str | None, Parameter(help="A check, as `knockwood check --list` names it.")] = None,
    sql: Annotated[str | None, Parameter(help="A query that returns the bad rows.")] = None,
    database: Annotated[str | None, Parameter(help="Where the SQL runs; otherwise the dsn's.")] = None,
    from_: Annotated[
        str | None, Parameter(name="--from", help="Begin at an LSN, a time with its zone or before-XID.")
    ] = None,
    to: Annotated[str, Parameter(help="latest, an LSN, a time with its zone, or before-XID.")] = "latest",
    confirm: Annotated[int, Parameter(help="Look at so many further states for a second turn.")] = 0,
    statement_timeout: Annotated[str, Parameter(help="Longest single query.")] = "5m",
    common: Common = DEFAULT,
) -> Answer:
    """Find the first commit at which a rule is broken, on clones, over backups and WAL."""
    since = parse_target(from_) if from_ is not None else None
    until = parse_target(to)
    try:
        timeout = parse_duration(statement_timeout)
    except ValueError as error:
        what, _, hint = str(error).partition(": ")
        raise UsageError(what, where=statement_timeout, hint=hint) from error
    cluster = common.open_cluster()
    asked = question(cluster, invariant=invariant, check=check, sql=sql, database=database, timeout=timeout)
    with spinner("bisect", quiet=common.json) as tell:
        found = run_bisect(cluster, asked, since=since, until=until, confirm=confirm, progress=tell)
    return Answer(_values(found), lambda console: _show(console, found), found.verdict)


def _commit(commit: Commit) -> dict[str, Any]:
    return {"xid": commit.xid, "commit_lsn": str(commit.lsn), "commit_time": commit.time.isoformat()}


def _state(probe: Probe | None) -> dict[str, Any] | None:
    if probe is None:
        return None
    if probe.commit is None:
        return {"xid": None, "commit_lsn": None, "commit_time": None, "state_lsn": str(probe.lsn)}
    return _commit(probe.commit) | {"state_lsn": str(probe.lsn)}


def _values(found: Bisection) -> dict[str, Any]:
    first = _commit(found.first_bad) if found.first_bad is not None else None
    if first is not None:
        culprit = found.culprit.as_json() if found.culprit is not None else {}
        first |= {"tables": culprit.get("tables"), "label": culprit.get("label")}
    return {
        "outcome": str(found.outcome),
        "question": found.question.as_json(),
        "first_bad": first,
        "last_good": _state(found.last_good),
        "bad_rows": list(found.examples),
        "suspects": {"count": found.suspect_count, "commits": [_commit(c) for c in found.suspects]},
        "probes": [probe.as_json() for probe in found.probes],
        "range": {"from": str(found.start), "to": str(found.end)},
        "counts": {
            "commits": found.commits,
            "backups": found.backups,
            "probes": len(found.probes),
            "probes_promised": found.promised,
            "fetched": found.tally.fetched,
            "fetched_bytes": found.tally.fetched_bytes,
            "copies": found.tally.copies,
            "copied_bytes": found.tally.copied_bytes,
            "shared_bytes": found.tally.shared_bytes,
        },
        "seconds": round(found.seconds, 3),
        "notes": list(found.notes),
    }


def _show(console: Console, found: Bisection) -> None:
    for number, probe in enumerate(found.probes, 1):
        text = probe.commit.time.isoformat() if probe.commit else "the start of the range"
        reason = f": {probe.seen.reason}" if probe.seen.reason else ""
        console.print(
            f"{number:>3}. {coloured(probe.seen.verdict)} at {probe.lsn} [dim]{escape(text)}, {escape(probe.source)},"
            f" {seconds(probe.seconds)}[/]{escape(reason)}",
            soft_wrap=True,
        )
    console.print(f"\n[bold]{_HEADLINES[found.outcome]}[/] [dim]{escape(found.question.name)}[/]")
    if found.first_bad is not None:
        bad = found.first_bad
        console.print(f"first bad: transaction [bold]{bad.xid}[/] at {bad.lsn}, {bad.time.isoformat()}")
    if found.culprit is not None:
        label = found.culprit.transaction.label
        if label:
            console.print(f"  labelled {escape(label)}", soft_wrap=True)
        for table in found.culprit.tables:
            counts = f"{table.inserted} inserted, {table.updated} updated, {table.deleted} deleted"
            what = f", {table.what}" if table.what else ""
            console.print(f"  {escape(table.name)}: {counts}{what}", soft_wrap=True)
    if found.last_good is not None:
        good = found.last_good
        named = f"transaction {good.commit.xid} at " if good.commit else ""
        console.print(f"last good: {named}{good.lsn}")
    for suspect in found.suspects:
        console.print(f"  suspect: transaction {suspect.xid} at {suspect.lsn}, {suspect.time.isoformat()}")
    for row in found.examples[:3]:
        console.print(f"  bad row: {escape(str(row))}", soft_wrap=True)
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    tally = found.tally
    console.print(
        f"{len(found.probes)} probes of at most {found.promised} for {found.commits} commits and {found.backups}"
        f" backups, {tally.fetched} fetched ({megabytes(tally.fetched_bytes)}), {tally.copies} copies"
        f" ({megabytes(tally.copied_bytes)} copied, {megabytes(tally.shared_bytes)} shared),"
        f" in {seconds(found.seconds)}"
    )
