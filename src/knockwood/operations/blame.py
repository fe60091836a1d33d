"""`blame`: which transaction wrote these rows, through chains of versions, or deleted them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from psycopg.conninfo import conninfo_to_dict

from knockwood.clone.registry import Registry
from knockwood.clone.spawn import spawn
from knockwood.errors import ObjectMissingError, ServerDownError, UsageError
from knockwood.history.blame import Written, owners_of, read_log, times_used, versions
from knockwood.history.index import ArchiveIndex
from knockwood.history.touched import FileId, file_of
from knockwood.history.transaction import TableId, Transaction
from knockwood.host import clock
from knockwood.model import Lsn
from knockwood.operations.blame_rows import Found, Question, Table, select_rows, table_of
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import connect, translated
from knockwood.repository.backups.listing import list_backups, relation_map
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Latest, resolve

SHOWN: Final = 100
TIMEOUT_SECONDS: Final = 30.0

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BlamedRow:
    """A row and the transaction that wrote (or deleted) it; None with the `reason` why nobody can say.

    `ambiguous`: the number of its writer was given out more than once (after a wraparound, a frozen row
    may be of any of them). `versions` are those before it, the newest first, where they were asked for.
    """

    table: TableId
    key: Mapping[str, str | None]
    ctid: str
    xid: int
    transaction: Transaction | None
    reason: str = ""
    ambiguous: bool = False
    versions: tuple[Written, ...] = ()

    def as_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "table": str(self.table),
            "key": dict(self.key),
            "ctid": self.ctid,
            "xid": self.xid,
        }
        value |= _transaction(self.transaction)
        if self.transaction is not None:
            value["xid"] = self.transaction.xid
        if self.reason:
            value["reason"] = self.reason
        if self.ambiguous:
            value["ambiguous"] = True
        if self.versions:
            value["versions"] = [
                {"kind": each.kind, "xid": each.transaction.xid if each.transaction else None}
                | _transaction(each.transaction)
                for each in self.versions
            ]
        return value


def _transaction(transaction: Transaction | None) -> dict[str, Any]:
    return {
        "commit_lsn": str(transaction.commit_lsn) if transaction else None,
        "commit_time": transaction.commit_time.isoformat() if transaction else None,
        "label": transaction.label if transaction else None,
    }


@dataclass(frozen=True, slots=True)
class Blamed:
    """The answer. `source` says where rows were looked for, `begins` where the archive's WAL begins.

    `more` rows (or transactions' worth of them) match and are not given: `left_out` says so in words.
    """

    table: TableId
    rows: tuple[BlamedRow, ...]
    source: str
    begins: Lsn | None
    left_out: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "table": str(self.table),
            "database": self.table.database,
            "rows": [row.as_json() for row in self.rows],
            "source": self.source,
            "archive_begins": str(self.begins) if self.begins is not None else None,
            "left_out": self.left_out or None,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


@dataclass(slots=True)
class Archive:
    """The repository with its index, opened once."""

    cluster: Cluster
    repository: Repository
    index: ArchiveIndex
    registry: Registry
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, cluster: Cluster, wait: float, tell: Progress) -> Archive:
        repository = cluster.repository()
        notes: list[str] = []
        if wait > 0:
            tell("waiting for the newest WAL")
            freshness = bring_up_to_date(cluster, repository, timeout=wait)
            notes += [] if freshness.complete else [freshness.detail]
        tell("reading the archive's index")
        index = ArchiveIndex.open(repository, programs_for=cluster.programs)
        notes += [f"no transaction is known of {hole.range}: {hole.reason}" for hole in index.not_covered]
        return cls(
            cluster, repository, index, Registry(cluster.settings.proof.clones or cluster.state), notes
        )

    @property
    def begins(self) -> Lsn | None:
        covered = self.index.covered
        return covered[0].start if covered else None

    @property
    def programs(self) -> Programs:
        """Those of the cluster's version, which the newest backup tells."""
        backups = list_backups(self.repository)
        if not backups:
            raise ObjectMissingError("there is no backup", hint="take one now: `knockwood backup`")
        return self.cluster.programs(max(backups, key=lambda backup: backup.stop_lsn).major)

    def files_of(self, table: Table) -> dict[FileId, int]:
        """The files that the table's leaves have now or had at a backup, and whose they are."""
        files = {file: oid for oid, file in table.files.items()}
        for backup in list_backups(self.repository):
            for relation in relation_map(self.repository, backup).relations:
                if relation.database == table.id.database and relation.oid in table.files:
                    file = file_of(relation.path)
                    if file is not None:
                        files.setdefault(file, relation.oid)
        return files

    def of_files(self, files: Collection[FileId], since: Lsn | None) -> tuple[Transaction, ...]:
        """The transactions that changed some files, in order of their commits."""
        wanted = {(database, number) for _, database, number in files}
        return tuple(self.index.transactions(since=since, filenodes=wanted))


def blame(
    cluster: Cluster,
    asked: Question,
    *,
    history: bool = False,
    since: Lsn | None = None,
    shown: int = SHOWN,
    timeout: float = TIMEOUT_SECONDS,
    wait: float = 10,
    progress: Progress | None = None,
) -> Blamed:
    """Name the transaction that wrote each matching row of the live server.

    The rows are read in one read-only transaction of at most `timeout` seconds; where the server is down,
    on a clone at the archive's end. With `history` the versions before are followed through the WAL from
    `since` (its beginning) on. Raises ObjectMissingError for an unknown table, PostgresError for an
    expression that PostgreSQL refuses, RefusedError for more changes than fit in memory.
    """
    if shown < 1:
        raise UsageError("a limit below one", hint="--limit 100")
    began = clock.monotonic()
    tell = progress or (lambda _: None)
    tell("reading rows")
    with _source(cluster, tell) as (dsn, source):
        table = table_of(dsn, asked)
        found, more = select_rows(dsn, table, asked, shown, timeout)
        now = _Now.of(dsn)
    archive, writers = _writers(cluster, {each.xmin for each in found}, now, wait, tell)
    rows = [_blamed(archive, writers.get(each.xmin), each, now.next_xid) for each in found]
    if history:
        tell("following versions through the WAL")
        rows = _with_versions(archive, table, found, rows, since)
    left_out = f"more than {shown} rows match; see more with --limit" if more else ""
    return Blamed(
        table.id,
        tuple(rows),
        source,
        archive.begins,
        left_out,
        tuple(archive.notes),
        clock.monotonic() - began,
    )


@contextmanager
def _source(cluster: Cluster, tell: Progress) -> Iterator[tuple[str, str]]:
    """Where live rows can be read: the server, or a clone at the archive's end where it is down."""
    try:
        with connect(cluster.dsn):
            pass
    except ServerDownError as error:
        tell("the server is down: restoring a clone")
        repository = cluster.repository()
        plan = resolve(repository, Latest(), programs_for=cluster.programs)
        with spawn(
            repository,
            plan,
            programs=cluster.programs(plan.backup.major),
            purpose="blame",
            registry=Registry(cluster.settings.proof.clones or cluster.state),
        ) as clone:
            yield clone.dsn(database_of(cluster.dsn)), f"a clone at {clone.reached_lsn}, since {error.what}"
        return
    yield cluster.dsn, "the live server"


def database_of(dsn: str) -> str:
    """The database that a connection string means."""
    words = conninfo_to_dict(dsn)
    return str(words.get("dbname") or words.get("user") or "postgres")


@dataclass(frozen=True, slots=True)
class _Now:
    """Where the rows were read: the next xid to be given out, with its epoch in the upper half, and the
    timeline that is written (None where none is: on a standby or a clone).
    """

    next_xid: int
    timeline: int | None

    @classmethod
    def of(cls, dsn: str) -> _Now:
        with connect(dsn) as connection, translated():
            row = connection.execute(
                "select pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint,"
                " case when not pg_catalog.pg_is_in_recovery() then pg_catalog.pg_walfile_name("
                "pg_catalog.pg_current_wal_insert_lsn()) end"
            ).fetchone()
        assert row is not None
        return cls(int(row[0]), int(row[1][:8], 16) if row[1] is not None else None)


def _writers(
    cluster: Cluster, xids: Collection[int], now: _Now, wait: float, tell: Progress
) -> tuple[Archive, Mapping[int, Transaction]]:
    """The archive, and who had the xids. The newest WAL is waited for only where it may say otherwise."""
    archive = Archive.open(cluster, 0, tell)
    writers = archive.index.writers(xids)
    # A number given out once on this timeline is that transaction's, and all that led to its rows is older.
    known = archive.index.timeline == now.timeline and all(
        xid in writers and times_used(xid, now.next_xid) == 1 for xid in xids
    )
    if not known and wait > 0:
        archive = Archive.open(cluster, wait, tell)
        writers = archive.index.writers(xids)
    return archive, writers


def _blamed(archive: Archive, transaction: Transaction | None, found: Found, next_xid: int) -> BlamedRow:
    uses = times_used(found.xmin, next_xid)
    reason = ""
    if transaction is None:
        begins = archive.begins
        reason = f"written before the archive begins ({begins})" if begins else "the archive holds no WAL"
        if archive.index.not_covered:
            reason += ", or in WAL that it lacks"
    elif uses > 1:
        reason = (
            f"the number {found.xmin} was given out {uses} times:"
            " if the row is frozen, an earlier transaction may have written it"
        )
    return BlamedRow(found.table, found.key, found.ctid, found.xmin, transaction, reason, uses > 1)


def _with_versions(
    archive: Archive, table: Table, found: Sequence[Found], rows: Sequence[BlamedRow], since: Lsn | None
) -> list[BlamedRow]:
    """Follow each row back through its table's present file, and the partitions it came from."""
    files = archive.files_of(table)
    transactions = archive.of_files(files, since)
    if not transactions:
        return list(rows)
    logs, gone = read_log(archive.repository, archive.programs, transactions, files)
    if gone:
        archive.notes.append("a file of the table was replaced meanwhile: versions before are not followed")
    owners = owners_of(transactions)
    return [
        replace(row, versions=tuple(versions(logs, owners, table.files[each.oid], each.place, each.xmin)))
        for each, row in zip(found, rows, strict=True)
    ]


__all__ = ["SHOWN", "TIMEOUT_SECONDS", "Archive", "Blamed", "BlamedRow", "blame", "database_of"]
