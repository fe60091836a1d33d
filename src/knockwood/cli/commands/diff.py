"""`knockwood diff`: rows before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from knockwood.cli.answer import Answer, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import spinner
from knockwood.history import ColumnValue, RowChange
from knockwood.history.diff import parse_subject
from knockwood.history.touched import ROW_LIMIT
from knockwood.model import Verdict
from knockwood.operations.diff import SHOWN, Difference
from knockwood.operations.diff import diff as read_diff

_WIDTH = 120
_SIGNS = {"insert": "[green]+[/]", "delete": "[red]-[/]", "update": "[yellow]~[/]"}


def diff(
    what: Annotated[str, Parameter(help="A transaction's XID, or LSN..LSN.")],
    /,
    *,
    table: Annotated[str | None, Parameter(help="Only this table: NAME or SCHEMA.NAME.")] = None,
    limit: Annotated[int, Parameter(help="Give so many rows; all are counted.")] = SHOWN,
    max_rows: Annotated[int, Parameter(help="Refuse more changed rows than this.")] = ROW_LIMIT,
    common: Common = DEFAULT,
) -> Answer:
    """Show what a transaction, or all of a range taken as one, did to rows, column by column."""
    subject = parse_subject(what)
    cluster = common.open_cluster()
    with spinner("diff", quiet=common.json) as tell:
        found = read_diff(cluster, subject, table=table, shown=limit, limit=max_rows, progress=tell)
    # What could not be read is no 'no change'.
    verdict = Verdict.NOT_CHECKED if found.unread else None
    return Answer(found.as_json(), lambda console: _show(console, found), verdict)


def _show(console: Console, found: Difference) -> None:
    _headline(console, found)
    for line in found.ddl:
        console.print(f"[magenta]schema[/] {escape(line)}", soft_wrap=True)
    table = ""
    for change in found.changes:
        name = f"{change.table.database}.{change.table}"
        if name != table:
            console.print(f"[bold]{escape(name)}[/]")
            table = name
        _show_change(console, change)
    if found.left_out:
        console.print(f"[yellow]and {found.left_out:,} more[/]; see them with --limit {found.total}")
    for each in found.unread:
        rows = f" ({each.rows:,} rows)" if each.rows is not None else ""
        console.print(
            f"[yellow]not read[/] {escape(str(each.table))}{rows}: {escape(each.reason)}", soft_wrap=True
        )
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    if not found.total and not found.ddl and not found.unread:
        console.print("no row is other than it was")
    for place, kind, count in found.counts:
        console.print(f"{escape(str(place))}: {count:,} {kind}{'s' if count != 1 else ''}")
    console.print(f"[dim]read in {seconds(found.seconds)}[/]")


def _headline(console: Console, found: Difference) -> None:
    if not found.transactions:
        console.print(f"no transaction of {found.subject} changed anything")
        return
    first, last = found.transactions[0], found.transactions[-1]
    if first is last:
        label = f" ({escape(first.label)})" if first.label else ""
        console.print(
            f"transaction {first.xid}{label}, committed {first.commit_time.isoformat()} at {first.commit_lsn}"
        )
        return
    console.print(
        f"{len(found.transactions):,} transactions, {first.xid} at {first.commit_lsn} to {last.xid} at"
        f" {last.commit_lsn}, taken as one"
    )


def _show_change(console: Console, change: RowChange) -> None:
    moved = change.details.get("moved_to")
    key = _columns(change.key) if change.key else "(no key)"
    line = f"  {_SIGNS[change.kind]} {change.kind} {escape(key)}"
    console.print(line + (f" -> {escape(str(moved))}" if moved is not None else ""), soft_wrap=True)
    if change.before is not None and change.after is not None:
        width = max((len(name) for name in change.changed), default=0)
        for name in change.changed:
            now = _text(change.after[name]) if name in change.after else "(no such column)"
            console.print(
                f"      {escape(name.ljust(width))}  {escape(_text(change.before[name]))} -> {escape(now)}",
                soft_wrap=True,
            )
    else:
        row = change.before or change.after or {}
        rest = {name: value for name, value in row.items() if name not in change.key}
        if rest:
            console.print(f"      {escape(_columns(rest))}", soft_wrap=True)


def _columns(row: Mapping[str, ColumnValue]) -> str:
    return ", ".join(f"{name}={_text(value)}" for name, value in row.items())


def _text(value: ColumnValue) -> str:
    """A value on one line, cut where it is long: JSON has it whole."""
    if value.text is None:
        return "NULL"
    shown = value.text.encode("utf-8", "replace").decode()
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in shown)
    return f"{shown[:_WIDTH]}… ({len(value.text):,} characters)" if len(shown) > _WIDTH else shown
