"""`knockwood blame`: who wrote, or deleted, these rows."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from knockwood.cli.answer import Answer, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import spinner
from knockwood.errors import UsageError
from knockwood.history import Transaction
from knockwood.model import Lsn, Verdict
from knockwood.operations.blame import SHOWN, Blamed, BlamedRow
from knockwood.operations.blame import blame as find_writers
from knockwood.operations.blame_deleted import STOPS, blame_deleted
from knockwood.operations.blame_rows import Question
from knockwood.settings.schema import parse_duration


def blame(
    table: Annotated[str, Parameter(help="NAME, SCHEMA.NAME or DATABASE.SCHEMA.NAME.")],
    /,
    *,
    where: Annotated[str | None, Parameter(help="What would stand after WHERE.")] = None,
    deleted: Annotated[
        bool, Parameter(negative="", help="Rows that are gone, and who deleted them.")
    ] = False,
    history: Annotated[bool, Parameter(negative="", help="Also the versions before, from the WAL.")] = False,
    since: Annotated[str | None, Parameter(help="Read the WAL from this LSN on only.")] = None,
    limit: Annotated[int, Parameter(help="At most so many rows.")] = SHOWN,
    stops: Annotated[int, Parameter(help="With --deleted: look at so many points in time.")] = STOPS,
    statement_timeout: Annotated[str, Parameter(help="Longest single query.")] = "30s",
    common: Common = DEFAULT,
) -> Answer:
    """Name the transaction that wrote each matching row, or with --deleted the one that deleted it."""
    if deleted and history:
        raise UsageError("--deleted and --history do not go together", hint="leave one of them out")
    begin = _lsn(since)
    try:
        timeout = parse_duration(statement_timeout).total_seconds()
    except ValueError as error:
        what, _, hint = str(error).partition(": ")
        raise UsageError(what, where=statement_timeout, hint=hint) from error
    asked = Question.of(table, where)
    cluster = common.open_cluster()
    with spinner("blame", quiet=common.json) as tell:
        if deleted:
            found = blame_deleted(
                cluster, asked, since=begin, shown=limit, stops=stops, timeout=timeout, progress=tell
            )
        else:
            found = find_writers(
                cluster, asked, history=history, since=begin, shown=limit, timeout=timeout, progress=tell
            )
    unknown = any(row.transaction is None or row.ambiguous for row in found.rows)
    verdict = Verdict.NOT_CHECKED if unknown or (deleted and found.left_out) else None
    return Answer(found.as_json(), lambda console: _show(console, found, deleted), verdict)


def _lsn(text: str | None) -> Lsn | None:
    if text is None:
        return None
    try:
        return Lsn.parse(text)
    except ValueError:
        raise UsageError(f"not an LSN: {text!r}", hint="an LSN looks like 16/B374D848") from None


def _show(console: Console, found: Blamed, deleted: bool) -> None:
    if not found.rows:
        console.print("no deleted row matches" if deleted else "no row matches")
    for row in found.rows:
        key = ", ".join(f"{name}={value}" for name, value in row.key.items()) or f"ctid {row.ctid}"
        verb = "deleted by" if deleted else "written by"
        console.print(f"{escape(str(row.table))} {escape(key)}: {verb} {_writer(row)}", soft_wrap=True)
        if row.transaction is not None and row.reason:
            console.print(f"    [yellow]{escape(row.reason)}[/]", soft_wrap=True)
        for version in row.versions:
            console.print(f"    {version.kind:6}  {_told(version.transaction)}", soft_wrap=True)
    if found.left_out:
        console.print(f"[yellow]{escape(found.left_out)}[/]", soft_wrap=True)
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    console.print(f"[dim]from {escape(found.source)}, in {seconds(found.seconds)}[/]", soft_wrap=True)


def _writer(row: BlamedRow) -> str:
    if row.transaction is None:
        return f"transaction {row.xid}, [yellow]{escape(row.reason)}[/]"
    return _told(row.transaction)


def _told(transaction: Transaction | None) -> str:
    if transaction is None:
        return "not known"
    label = f" ({escape(transaction.label)})" if transaction.label else ""
    return (
        f"[bold]transaction {transaction.xid}[/]{label},"
        f" committed {transaction.commit_time.isoformat()} at {transaction.commit_lsn}"
    )
