"""`blame --deleted`: which transaction deleted the rows that match, seen once more on a clone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from knockwood.errors import KnockwoodError, ObjectMissingError
from knockwood.history.blame import Deleted, deletions, owners_of, read_log, stops_for
from knockwood.history.chains import Place
from knockwood.history.spawners import clones_for
from knockwood.history.standing import Position, Standing, commit_plan, just_before
from knockwood.history.touched import FileId
from knockwood.history.transaction import Transaction
from knockwood.host import clock
from knockwood.model import Lsn
from knockwood.operations.blame import (
    SHOWN,
    TIMEOUT_SECONDS,
    Archive,
    Blamed,
    BlamedRow,
    Progress,
)
from knockwood.operations.blame_rows import Question, Table, rows_at, table_of
from knockwood.operations.cluster import Cluster
from knockwood.postgres.connection import connect
from knockwood.repository.backups.listing import list_backups

STOPS: Final = 30
"""Points in time at which a clone is read: each takes about a second."""


def blame_deleted(
    cluster: Cluster,
    asked: Question,
    *,
    since: Lsn | None = None,
    shown: int = SHOWN,
    stops: int = STOPS,
    timeout: float = TIMEOUT_SECONDS,
    wait: float = 10,
    progress: Progress | None = None,
) -> Blamed:
    """Name the transaction that deleted each matching row, the newest deletions first.

    The deletions come from the WAL (from `since` on, else from the oldest backup on); the expression is
    asked of each row as it last was, on a clone that goes from commit to commit, at most at `stops` points:
    those of the newest deletions. The table has to exist now. Raises what `blame` raises.
    """
    began = clock.monotonic()
    tell = progress or (lambda _: None)
    table = table_of(cluster.dsn, asked)
    archive = Archive.open(cluster, wait, tell)
    files = archive.files_of(table)
    oldest = _oldest(archive)
    begin = max(oldest, since) if since is not None else oldest
    transactions = archive.of_files(files, begin)
    rows: list[BlamedRow] = []
    left_out = ""
    if transactions:
        tell("reading deletions from the WAL")
        logs, gone = read_log(archive.repository, archive.programs, transactions, files)
        if gone:
            archive.notes.append(
                "a file of the table was replaced meanwhile (truncated or rewritten): rows that went with it"
                " are not among these"
            )
        every = stops_for(list(deletions(logs, owners_of(transactions))))
        chosen = every[-stops:]
        skipped = sum(len(group) for _, group in every[: len(every) - len(chosen)])
        if skipped:
            left_out = (
                f"{skipped} older deletions were not looked at: narrow it with --since, or give --stops"
            )
        rows = _look(archive, asked, table, files, chosen, timeout, tell)
    rows.sort(key=lambda row: row.transaction.commit_lsn if row.transaction else Lsn(0), reverse=True)
    if len(rows) > shown:
        left_out = f"{len(rows) - shown} more rows match; see them with --limit {len(rows)}" + (
            f"; {left_out}" if left_out else ""
        )
    emptied = _emptied(transactions, files)
    if emptied:
        left_out = "; ".join(filter(None, [left_out, *emptied]))
    return Blamed(
        table.id, tuple(rows[:shown]), f"clones of the archive from {begin} on", archive.begins, left_out,
        tuple(archive.notes), clock.monotonic() - began,
    )  # fmt: skip


def _oldest(archive: Archive) -> Lsn:
    """Where rows can first be seen: at the end of the oldest backup."""
    backups = list_backups(archive.repository)
    if not backups:
        raise ObjectMissingError("there is no backup", hint="take one now: `knockwood backup`")
    return min(backup.stop_lsn for backup in backups)


def _emptied(transactions: Sequence[Transaction], files: Collection[FileId]) -> list[str]:
    """What to say of rows that went with a TRUNCATE: they are not asked."""
    numbers = {(database, number) for _, database, number in files}
    return [
        f"the rows that transaction {each.xid} truncated were not asked: see `knockwood diff {each.xid}`"
        for each in transactions
        if any(one.truncated and (one.database, one.filenode) in numbers for one in each.relations)
    ]


def _look(
    archive: Archive,
    asked: Question,
    table: Table,
    files: Mapping[FileId, int],
    stops: list[tuple[Transaction, list[Deleted]]],
    timeout: float,
    tell: Progress,
) -> list[BlamedRow]:
    """Go from stop to stop with one clone, and ask of each deleted row whether it matches."""
    if not stops:
        return []
    deleters = [by for by, _ in stops]
    plan = commit_plan(
        archive.repository, deleters[-1].timeline, deleters[-1].commit_lsn,
        since=deleters[0].commit_lsn, programs_for=archive.cluster.programs,
    )  # fmt: skip
    everyone = list({row.by.commit_lsn: row.by for _, rows in stops for row in rows}.values())
    spawner = clones_for(
        archive.repository, everyone, purpose="blame",
        programs_for=archive.cluster.programs, registry=archive.registry,
    )  # fmt: skip
    found: list[BlamedRow] = []
    with Position(spawner) as position:
        for number, (by, rows) in enumerate(stops, 1):
            tell(f"looking at rows just before {by.commit_lsn} ({number} of {len(stops)})")
            clone = position.go(just_before(plan, by.commit_lsn))
            try:
                found += _matching(clone, asked, table, files, rows, timeout)
            except KnockwoodError as error:
                archive.notes.append(f"{len(rows)} deletions were not looked at: {error.what}")
    return found


def _matching(
    clone: Standing,
    asked: Question,
    table: Table,
    files: Mapping[FileId, int],
    rows: list[Deleted],
    timeout: float,
) -> list[BlamedRow]:
    by_file: dict[FileId, dict[Place, Deleted]] = defaultdict(dict)
    for row in rows:
        by_file[row.file][row.place] = row
    found: list[BlamedRow] = []
    with connect(clone.dsn(table.id.database)) as connection:
        connection.execute("set lock_timeout = '10s'")
        for file, mine in by_file.items():
            for each in rows_at(connection, table, table.shapes[files[file]], mine.keys(), asked, timeout):
                by = mine[each.place].by
                found.append(BlamedRow(each.table, each.key, each.ctid, by.xid, by))
    return found


__all__ = ["STOPS", "blame_deleted"]
