"""One table brought back out of a large database: a clone of that table against a clone of everything.

    bench/table_restore.py [--megabytes N ...] [--table N] [--wal N] [--runs N]

For each size of the database, in one run: fetched bytes and seconds of both, and how long writers waited while
the table came back in its place. Exit status 0: the table was right each time and a clone of it fetched less than
twice its share; 1: not so; 2: it could not be tried.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from knockwood.clone.partial import PartialClone, RelationKey, spawn_for
from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone, spawn
from knockwood.host import privileges
from knockwood.operations.restore_table_in_place import restore_in_place
from knockwood.postgres.binaries import find_programs
from knockwood.postgres.connection import connect, server_facts
from knockwood.postgres.server import LocalServer
from knockwood.recover.table_definition import TableName
from knockwood.repository.backups.take import take_backup
from knockwood.repository.receive import Receiver, receiving
from knockwood.repository.repository import Repository
from knockwood.repository.storage.open import open_storage
from knockwood.repository.targets import BeforeXid, RestorePlan, resolve
from machine import describe
from sandbox import OUT, end_cleanly, new_server, query, say, work_folder
from tables import markdown

SETTINGS = {"shared_buffers": "256MB", "max_wal_size": "4GB", "fsync": "off", "autovacuum": "off"}
KEY = RelationKey("postgres", "public", "wanted")
TABLE = TableName("postgres", "public", "wanted")
_ROW = "md5(i::text) || md5((i * 7)::text) || md5((i * 13)::text)"
_ROWS_PER_MEGABYTE = 6500
_UPDATE = """with place as (select (random() * (select max(id) from {table}))::bigint at)
update {table} set v = v || 'x' from place where id between at and at + {rows}"""


@dataclass(frozen=True, slots=True)
class Result:
    """One size: sizes in bytes, times in seconds (medians)."""

    database: int
    table: int
    stored: int
    fetched: int
    wal: int
    partial: float
    whole: float
    silencing: tuple[int, int]
    in_place: float
    blocked: float


@dataclass(frozen=True, slots=True)
class Site:
    server: LocalServer
    repository: Repository
    receiver: Receiver
    registry: Registry
    folder: Path


@contextmanager
def site() -> Iterator[Site]:
    account = privileges.server_account()
    with work_folder(account) as folder:
        folder.chmod(0o711)
        server = new_server(find_programs(18), folder / "data", account, SETTINGS)
        try:
            with connect(server.dsn()) as connection:
                facts = server_facts(connection)
            repository = Repository.create(
                open_storage(str(folder / "repository")),
                cluster="bench",
                system_identifier=facts.system_identifier,
                segment_bytes=facts.segment_bytes,
            )
            receiver = Receiver(
                repository, server.dsn(), folder / "receiver", programs=server.programs, partial_every=3600
            )
            with receiving(receiver):
                yield Site(server, repository, receiver, Registry(folder / "state"), folder)
        finally:
            server.stop("immediate")


def fill(made: Site, name: str, megabytes: int) -> None:
    rows = megabytes * _ROWS_PER_MEGABYTE
    query(made.server.dsn(), f"create table {name} (id bigint primary key, v text)")
    query(made.server.dsn(), f"insert into {name} select i, {_ROW} from generate_series(1, {rows}) i")


def work(made: Site, megabytes: int) -> None:
    """So much WAL, most of it about other tables."""
    dsn = made.server.dsn()
    [(start,)] = query(dsn, "select pg_current_wal_lsn()::text")
    while True:
        # Rows that lie together: scattered ones would write every page of the table into the WAL.
        query(dsn, _UPDATE.format(table="filler", rows=5000))
        query(dsn, _UPDATE.format(table="wanted", rows=200))
        [(made_now,)] = query(dsn, f"select (pg_current_wal_lsn() - '{start}'::pg_lsn)::bigint")
        if made_now > megabytes << 20:
            return


def timed(act: Callable[[], Clone], expected: object) -> tuple[Clone, float]:
    """Seconds until the table's rows were read on a clone; the clone is gone afterwards."""
    began = time.monotonic()
    with act() as clone:
        [found] = query(clone.dsn(), _CONTENT)
        seconds = time.monotonic() - began
        if found != expected:
            raise SystemExit(f"the table is not right: {found}, expected {expected}")
        return clone, seconds


_CONTENT = "select count(*), sum(hashtextextended(w::text, 0)) from wanted w"


def measure(made: Site, plan: RestorePlan, xid: int, expected: object, runs: int) -> Result:
    options = {"purpose": "bench", "registry": made.registry}
    partial, whole = [], []
    fetched, silenced = 0, (0, 0)
    for _ in range(runs):
        part, seconds = timed(
            lambda: spawn_for(made.repository, plan, [KEY], **options),  # type: ignore[arg-type]
            expected,
        )
        if not isinstance(part, PartialClone) or part.wal_filter is None:
            raise SystemExit(f"the whole backup was restored: {part.whole_because}")
        partial.append(seconds)
        fetched, silenced = part.fetched_bytes, (part.wal_filter.silenced, part.wal_filter.scanned)
        _, seconds = timed(
            lambda: spawn(made.repository, plan, free_of_locks=True, **options),  # type: ignore[arg-type]
            expected,
        )
        whole.append(seconds)
    began = time.monotonic()
    done = restore_in_place(
        made.repository, "bench", BeforeXid(xid), TABLE, live_dsn=made.server.dsn(),
        state=made.folder / "state", apply=True, registry=made.registry,
    )  # fmt: skip
    seconds = time.monotonic() - began
    if (
        done.recovery is None
        or not done.recovery.complete
        or query(made.server.dsn(), _CONTENT) != [expected]
    ):
        raise SystemExit(f"the table did not come back in its place: {done.plan.refused}, {done.recovery}")
    [(database, table)] = query(
        made.server.dsn(),
        "select sum(pg_database_size(oid))::bigint, pg_total_relation_size('wanted') from pg_database",
    )
    return Result(
        int(database),
        int(table),
        sum(link.stored_bytes for link in plan.chain),
        fetched,
        sum(piece.segment.bytes for piece in plan.wal),
        median(partial),
        median(whole),
        silenced,
        seconds,
        done.recovery.results[0].blocked_seconds,
    )


def one_size(megabytes: int, options: argparse.Namespace) -> Result:
    with site() as made:
        say(f"making {megabytes} MB")
        fill(made, "wanted", options.table)
        fill(made, "filler", max(1, megabytes - options.table))
        take_backup(made.repository, made.server.dsn())
        work(made, options.wal)
        [expected] = query(made.server.dsn(), _CONTENT)
        with connect(made.server.dsn()) as connection, connection.transaction():
            connection.execute("truncate wanted")
            row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
        assert row is not None
        made.receiver.flush()
        plan = resolve(made.repository, BeforeXid(row[0]))
        say("bringing the table back")
        return measure(made, plan, row[0], expected, options.runs)


def report(results: list[Result]) -> str:
    def size(count: float) -> str:
        return f"{count / 1e6:,.0f} MB"

    header = [
        "database", "table", "backup stored", "fetched for the table", "WAL", "records silenced",
        "clone of the table", "clone of everything", "times faster", "in place, in all", "writers waited",
    ]  # fmt: skip
    rows = [
        [
            size(one.database), size(one.table), size(one.stored), size(one.fetched), size(one.wal),
            f"{one.silencing[0]:,} of {one.silencing[1]:,}", f"{one.partial:.1f} s", f"{one.whole:.1f} s",
            f"{one.whole / one.partial:.1f}", f"{one.in_place:.1f} s", f"{one.blocked:.2f} s",
        ]
        for one in results
    ]  # fmt: skip
    return f"{describe()}\n\n{markdown(header, rows)}\n"


def main() -> int:
    end_cleanly()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--table", type=int, default=100, help="megabytes of the wanted table")
    parser.add_argument("--wal", type=int, default=256, help="megabytes of WAL after the backup")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    results = [one_size(megabytes, options) for megabytes in options.megabytes]
    text = report(results)
    OUT.mkdir(exist_ok=True)
    (OUT / "table-restore.md").write_text(text)
    print(text)
    # The catalogs and the transaction status come on top of the table's own share of what is stored.
    good = all(one.fetched < 2 * one.stored * one.table / one.database + 16e6 for one in results)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
