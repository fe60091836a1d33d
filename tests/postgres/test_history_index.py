"""The index of the archive against pg_waldump's own reading of the same WAL, version by version."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fix_archive import Archived, archive_wal, new_archive
from fix_server import ServerFactory
from knockwood.errors import ObjectMissingError
from knockwood.history.index import ArchiveIndex
from knockwood.history.transaction import RelationChanges, Transaction
from knockwood.model import Lsn, WalSegment
from knockwood.postgres.connection import Connection, connect
from knockwood.postgres.server import LocalServer

_LINE = re.compile(
    r"rmgr: (\w+) +len \(rec/tot\): +\d+/ *(\d+), tx: +(\d+), lsn: ([0-9A-F/]+), prev [0-9A-F/]+, desc: (.*)"
)
_REL = re.compile(r"blkref #0: rel (\d+)/(\d+)/(\d+)")
_SUBS = re.compile(r"; subxacts:((?: \d+)+)")
_TUPLES = re.compile(r"ntuples: (\d+)|(\d+) tuples")


@dataclass
class Told:
    """What pg_waldump's text says of one transaction."""

    commit: Lsn | None = None
    subs: tuple[int, ...] = ()
    first: Lsn | None = None
    bytes: int = 0
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)


def waldump(server: LocalServer, segments: list[WalSegment]) -> tuple[dict[int, Told], list[int], int]:
    """Per xid what it did; the xids that committed in order; how many records there are."""
    folder = server.data_directory / "pg_wal"
    command = [
        server.programs.path("pg_waldump"), f"--path={folder}",
        f"--start={segments[0].start}", f"--end={segments[-1].end}", segments[0].name, segments[-1].name,
    ]  # fmt: skip
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told: dict[int, Told] = {}
    order: list[int] = []
    records = 0
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        records += 1
        rmgr, size, xid, lsn, desc = match[1], int(match[2]), int(match[3]), Lsn.parse(match[4]), match[5]
        if xid:
            one = told.setdefault(xid, Told())
            one.first = one.first or lsn
            one.bytes += size
            for kind, count in _changes(rmgr, desc):
                relation = _REL.search(desc)
                assert relation is not None
                one.counts[(int(relation[3]), kind)] += count
        if rmgr == "Transaction" and (done := re.match(r"COMMIT(?:_PREPARED (\d+):)? ", desc)):
            top = int(done[1] or xid)
            one = told.setdefault(top, Told())
            one.commit = lsn
            found = _SUBS.search(desc)
            one.subs = tuple(map(int, found[1].split())) if found else ()
            order.append(top)
    return told, order, records


def _changes(rmgr: str, desc: str) -> Iterator[tuple[str, int]]:
    word = desc.split("+")[0].split(" ")[0]
    if rmgr == "Heap" and word in ("INSERT", "DELETE"):
        yield word.lower(), 1
    elif rmgr == "Heap" and word in ("UPDATE", "HOT_UPDATE"):
        yield "update", 1
    elif rmgr == "Heap2" and word == "MULTI_INSERT":
        count = _TUPLES.search(desc)
        assert count is not None, desc
        yield "insert", int(count[1] or count[2])


def culprits(connection: Connection, server: LocalServer) -> dict[str, int]:
    """Transactions of every kind; their xids by name."""
    xids: dict[str, int] = {}

    def run(name: str, *statements: str) -> None:
        with connection.transaction():
            for statement in statements:
                connection.execute(statement.encode())
            row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
            assert row is not None
            xids[name] = row[0]

    run(
        "tables",
        "create table parent (id int primary key, note text)",
        "create table child (id int primary key, parent int references parent on delete cascade)",
        "create table wide (id int primary key, body text)",
        "alter table wide alter body set storage external",
        "create table parted (id int, place int) partition by list (place)",
        "create table parted_1 partition of parted for values in (1)",
        "create table parted_2 partition of parted for values in (2)",
    )
    run("insert", "insert into parent select g, 'n' from generate_series(1, 500) g")
    run("children", "insert into child select g, g from generate_series(1, 300) g")
    run("hot", "update parent set note = 'h' where id <= 20")
    run("twice", "update parent set note = 'a' where id = 30", "update parent set note = 'b' where id = 30")
    run("key", "update parent set id = 9999 where id = 400")
    run("delete", "delete from parent where id between 401 and 410")
    run("cascade", "delete from parent where id between 11 and 15")
    run("upsert", "insert into parent values (1, 'x'), (7001, 'y') on conflict (id) do update set note = 'u'")
    run("toast", "insert into wide select g, repeat(md5(g::text), 400) from generate_series(1, 5) g")
    run("toast update", "update wide set body = repeat(md5('u'), 400) where id = 2")
    run("partition", "insert into parted values (1, 1), (2, 1)", "update parted set place = 2 where id = 1")
    run(
        "savepoints",
        "insert into parent values (8001, 's')",
        "savepoint a", "insert into parent values (8002, 's')", "release a",
        "savepoint b", "insert into parent select g, 's' from generate_series(8100, 8199) g",
        "rollback to savepoint b",
        "savepoint c", "delete from parent where id = 8002", "savepoint d",
        "update parent set note = 't' where id = 8001", "release d", "release c",
    )  # fmt: skip
    run(
        "many",
        *(f"savepoint s; insert into parent values ({n}, 'm'); release s" for n in range(20000, 20100)),
    )
    with connection.transaction(), connection.cursor() as cursor:
        with cursor.copy("copy parent from stdin") as copy:
            for number in range(30000, 31000):
                copy.write_row((number, "copied"))
        row = cursor.execute("select pg_current_xact_id()::text::bigint").fetchone()
        assert row is not None
        xids["copy"] = row[0]
    connection.execute("begin")
    row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
    assert row is not None
    xids["aborted"] = row[0]
    connection.execute("insert into parent select g, 'x' from generate_series(40000, 40100) g")
    connection.execute("rollback")
    two_phase(connection, xids)
    multixact(connection, server)
    run(
        "label",
        "select pg_logical_emit_message(true, 'knockwood', 'release 42')",
        "delete from child where id = 1",
    )
    run(
        "foreign label",
        "select pg_logical_emit_message(true, 'other', 'secret')",
        "delete from child where id = 2",
    )
    run("truncate", "truncate child")
    run("refill", "truncate wide", "insert into wide values (1, 'one')")
    run("rewrite", "alter table parent alter note type varchar(77) using note || ''")
    run("drop", "drop table wide")
    run("analyze", "analyze parent")
    run("ddl only", "alter table child add column more int")
    return xids


def two_phase(connection: Connection, xids: dict[str, int]) -> None:
    for name, end in (
        ("prepared", "commit prepared 'two'"),
        ("prepared rollback", "rollback prepared 'two'"),
    ):
        connection.execute("begin")
        row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
        assert row is not None
        xids[name] = row[0]
        connection.execute("savepoint s")
        connection.execute(f"insert into parent values ({50000 + len(xids)}, 'p')".encode())
        connection.execute("release s")
        connection.execute("prepare transaction 'two'")
        connection.execute("insert into parent values (%s, 'between')", [60000 + len(xids)])
        connection.execute(end.encode())


def multixact(connection: Connection, server: LocalServer) -> None:
    with connect(server.dsn()) as other, other.transaction():
        other.execute("select * from parent where id = 100 for key share")
        connection.execute("update parent set note = 'locked' where id = 100")


def archived(server: LocalServer, root: Path) -> tuple[Archived, dict[str, int]]:
    made = new_archive(server, root)
    with connect(server.dsn()) as connection:
        connection.execute("select pg_switch_wal()")
        connection.execute("checkpoint")
        xids = culprits(connection, server)
        connection.execute("select pg_switch_wal()")
    archive_wal(made)
    return made, xids


def whole_segments(made: Archived) -> list[WalSegment]:
    size = made.repository.header.segment_bytes
    return [WalSegment.parse(path.name[:24], size) for path in sorted(made.root.glob("wal/0*/*/*"))]


def assert_equal(found: Transaction, told: dict[int, Told]) -> None:
    one = told[found.xid]
    assert found.subxids == one.subs
    assert found.commit_lsn == one.commit
    parts = [told[xid] for xid in found.xids if xid in told]
    assert found.first_lsn == min([part.first for part in parts if part.first] or [found.commit_lsn])
    assert found.wal_bytes == sum(part.bytes for part in parts)
    counts = sum((part.counts for part in parts), Counter[tuple[int, str]]())
    mine = Counter[tuple[int, str]]()
    for relation in found.relations:
        mine[(relation.filenode, "insert")] += relation.inserted
        mine[(relation.filenode, "update")] += relation.updated
        mine[(relation.filenode, "delete")] += relation.deleted
    kept = {relation.filenode for relation in found.relations}
    # Files that were made and dropped by the transaction itself are left out.
    assert +mine == Counter({key: n for key, n in counts.items() if key[0] in kept})
    if not found.catalog_changes:
        assert {key[0] for key in counts} <= kept


def table(connection: Connection, name: str) -> int:
    row = connection.execute("select pg_relation_filenode(%s::regclass)::bigint", [name]).fetchone()
    assert row is not None
    return int(row[0])


def changes(found: Transaction, filenode: int) -> RelationChanges:
    [one] = [relation for relation in found.relations if relation.filenode == filenode]
    return one


@pytest.mark.parametrize("segment_megabytes", [1, 16])
def test_the_index_says_what_pg_waldump_says(
    every_version: int, segment_megabytes: int, new_server: ServerFactory, tmp_path: Path
) -> None:
    server = new_server(
        every_version, segment_megabytes=segment_megabytes, max_prepared_transactions="5", wal_keep_size="1GB"
    )
    made, xids = archived(server, tmp_path / "repository")
    told, order, records = waldump(server, whole_segments(made))
    index = ArchiveIndex.open(made.repository)
    # A recycled template's oldest segment may begin with the end of a record.
    assert all(gap.range.start == whole_segments(made)[0].start for gap in index.not_covered)
    assert sum(head.records for head in index.heads) == records
    found = list(index.transactions())
    assert [one.xid for one in found] == order
    for one in found:
        assert_equal(one, told)
    assert all(one.complete for one in found if one.xid >= xids["tables"])
    by_name = {
        name: index.transaction(xid)
        for name, xid in xids.items()
        if "rollback" not in name and name != "aborted"
    }
    for name in ("aborted", "prepared rollback"):
        with pytest.raises(ObjectMissingError):
            index.transaction(xids[name])
    assert by_name["label"].label == "release 42"
    assert by_name["foreign label"].label == "other"
    assert by_name["prepared"].gid == "two"
    assert by_name["insert"].gid is None
    ddl = {name for name, one in by_name.items() if one.catalog_changes}
    assert ddl == {"tables", "truncate", "refill", "rewrite", "drop", "ddl only"}
    with connect(server.dsn()) as connection:
        parent, child = table(connection, "parent"), table(connection, "child")
    (old_child,) = {r.filenode for r in by_name["children"].relations}
    (old_parent,) = {r.filenode for r in by_name["insert"].relations}
    truncated = changes(by_name["truncate"], old_child)
    assert truncated.truncated
    assert truncated.dropped
    assert child not in {r.filenode for r in by_name["truncate"].relations}
    rewritten = changes(by_name["rewrite"], old_parent)
    assert (rewritten.truncated, rewritten.dropped) == (False, True)
    assert changes(by_name["rewrite"], parent).rewritten
    assert [one.xid for one in index.transactions(filenodes={old_child})] == [
        xids[name] for name in ("children", "cascade", "label", "foreign label", "truncate")
    ]
    assert len(by_name["many"].subxids) == 100
    assert changes(by_name["copy"], old_parent).inserted == 1000
    # What is stored says the same as what was just made.
    again = ArchiveIndex.open(made.repository, build=False)
    assert list(again.transactions()) == found
    middle = found[len(found) // 2].commit_lsn
    assert [*again.transactions(until=middle), *again.transactions(since=middle)] == found
