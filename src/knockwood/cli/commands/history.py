"""`knockwood log` and `knockwood mark`: what happened, and what people say about it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from knockwood.cli.answer import Answer, megabytes
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import spinner
from knockwood.errors import UsageError
from knockwood.history.log import Log, LogEntry, Question, TableChanges
from knockwood.history.marks import Mark
from knockwood.model.wal import Lsn
from knockwood.operations.history import make_mark, parse_moment, read_history


def log(
    *,
    since: Annotated[
        str | None, Parameter(name="--from", help="From an LSN, or a time with its zone.")
    ] = None,
    to: Annotated[str | None, Parameter(help="Before an LSN, or up to a time.")] = None,
    table: Annotated[str | None, Parameter(help="Only this table: [DATABASE.]SCHEMA.TABLE.")] = None,
    xid: Annotated[int | None, Parameter(help="Only the transaction with this number.")] = None,
    largest: Annotated[bool, Parameter(negative="", help="The largest first, by bytes of WAL.")] = False,
    limit: Annotated[int, Parameter(help="At most so many: the newest, or the largest.")] = 50,
    rebuild: Annotated[bool, Parameter(negative="", help="Make the index of the archive anew.")] = False,
    common: Common = DEFAULT,
) -> Answer:
    """List transactions from the archive: when, how much, and which tables they changed."""
    if limit < 1:
        raise UsageError(f"--limit {limit} shows nothing", hint="--limit 50")
    low, high = _moment(since), _moment(to)
    question = Question(
        since=low if isinstance(low, Lsn) else None,
        until=high if isinstance(high, Lsn) else None,
        after=low if isinstance(low, datetime) else None,
        before=high if isinstance(high, datetime) else None,
        table=table,
        # pg_current_xact_id() prints the epoch in the upper half; WAL has the lower only.
        xid=xid & 0xFFFF_FFFF if xid is not None else None,
        largest=largest,
        limit=limit,
    )
    cluster = common.open_cluster()
    with spinner("log", quiet=common.json) as tell:
        found = read_history(
            cluster,
            question,
            rebuild=rebuild,
            progress=lambda done, total: tell(f"indexing WAL, {megabytes(done)} of {megabytes(total)}"),
        )
    return Answer(found.as_json(), lambda console: _show(console, found, largest), found.verdict)


def mark(
    text: str,
    *,
    at: Annotated[str | None, Parameter(help="At an LSN, or a time with its zone; otherwise now.")] = None,
    common: Common = DEFAULT,
) -> Answer:
    """Say what happens now (a release, a migration), so that the log shows it where it happened."""
    made = make_mark(common.open_cluster(), text, _moment(at))
    return Answer(
        {"mark": made.mark.as_json(), "detail": made.detail},
        lambda console: console.print(f"marked {escape(made.detail)}", soft_wrap=True),
    )


def _moment(text: str | None) -> Lsn | datetime | None:
    return parse_moment(text) if text is not None else None


def _show(console: Console, found: Log, largest: bool) -> None:
    if found.more and not largest:
        console.print("[dim]older ones are not shown: --limit, --from and --to choose others[/]")
    marks = list(found.marks)
    for entry in found.entries:
        while not largest and marks and _before(marks[0], entry):
            _show_mark(console, marks.pop(0))
        _show_entry(console, entry)
    for mark_ in marks:
        _show_mark(console, mark_)
    if not found.entries:
        console.print("no such transaction in the WAL that is there")
    if found.more and largest:
        console.print("[dim]smaller ones are not shown: --limit[/]")
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    for gap in found.not_covered:
        console.print(
            f"[yellow]not covered[/] {gap.range.start} to {gap.range.end} on timeline {gap.range.timeline}:"
            f" {escape(gap.reason)}",
            soft_wrap=True,
        )


def _before(mark_: Mark, entry: LogEntry) -> bool:
    one = entry.transaction
    return mark_.lsn <= one.commit_lsn if mark_.lsn is not None else mark_.at <= one.commit_time


def _show_mark(console: Console, mark_: Mark) -> None:
    console.print(
        f"[bold cyan]── {escape(mark_.text)}[/] [dim]{mark_.at:%Y-%m-%d %H:%M:%S}Z, {escape(mark_.by)}[/]"
    )


def _show_entry(console: Console, entry: LogEntry) -> None:
    one = entry.transaction
    words = [f"[bold]{one.xid}[/]", f"{one.commit_time:%Y-%m-%d %H:%M:%S.%f}Z", str(one.commit_lsn)]
    words.append(f"{one.wal_bytes:,} B" if one.wal_bytes < 1_000_000 else megabytes(one.wal_bytes))
    if one.subxids:
        words.append(f"{len(one.subxids)} subtransactions")
    if one.gid is not None:
        words.append(f"two-phase {escape(one.gid)}")
    if one.catalog_changes:
        words.append("[magenta]DDL[/]")
    if not one.complete:
        words.append("[yellow]may have begun before the WAL that is there[/]")
    if one.label is not None:
        words.append(f"[cyan]{escape(one.label)}[/]")
    console.print("  ".join(words), soft_wrap=True)
    for table in entry.tables:
        console.print(f"    {escape(_table(table))}", soft_wrap=True)


def _table(table: TableChanges) -> str:
    counts = [
        f"{count:,} {word}"
        for count, word in (
            (table.inserted, "inserted"),
            (table.updated, "updated"),
            (table.deleted, "deleted"),
        )
        if count
    ]
    if table.what is not None:
        counts.insert(0, table.what)
    place = f"{table.database}.{table.name}" if table.known else table.name
    return f"{place}: {', '.join(counts)}"
