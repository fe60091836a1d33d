"""pg_xact: flipped ends of transactions and missing pages are named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fix_checks import SHOP, check, found, path_of, silent, sql, writers
from knockwood.drill import faults
from knockwood.model import Severity
from knockwood.postgres.connection import connect

if TYPE_CHECKING:
    from fix_server import ServerFactory

NAME = "transaction_status"


def test_a_flipped_commit_is_named(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    sql(server, SHOP)
    for number in range(5):
        sql(server, f"insert into shop values ({-number}, 1, 1)")
    xid = int(sql(server, "select xmin::text::int from shop where id = -2"))
    sql(server, "select count(*) from shop where id <= 0")  # reading sets the hint bits
    with faults.offline(server) as folder:
        faults.xact_flip(folder, xid)
    findings = found(server, NAME)
    assert {f.location.key for f in findings} == {f"xid {xid}"}
    [finding] = [f for f in findings if f.location.relation]  # the other one is of the WAL
    assert finding.location.relation == "public.shop"
    assert finding.location.file == path_of(server, "shop")
    assert finding.evidence["pg_xact_says"] == "aborted"
    assert finding.severity is Severity.CRITICAL


def test_a_flipped_commit_whose_rows_nobody_read_is_named_by_the_wal(
    new_server: ServerFactory, every_version: int
) -> None:
    server = new_server(every_version, max_prepared_transactions="2")
    sql(server, SHOP)
    insert = "insert into shop values (-1, 1, 1) returning pg_current_xact_id()::text::int"
    plain = int(sql(server, insert))
    with connect(server.dsn(), autocommit=False) as connection:
        [(prepared,)] = connection.execute(insert.replace("-1", "-2")).fetchall()
        connection.execute("prepare transaction 'later'")
    sql(server, "commit prepared 'later'")
    with faults.offline(server) as folder:
        for xid in (plain, prepared):
            faults.xact_flip(folder, xid)
    sql(server, "select count(*) from shop; checkpoint")  # the readers copy the wrong end into the rows
    findings = found(server, NAME)
    assert [f.location.key for f in findings] == [f"xid {plain}", f"xid {prepared}"]
    assert {(f.location.file, f.location.block) for f in findings} == {("pg_xact/0000", 0)}
    assert all(f.location.lsn and f.evidence["pg_xact_says"] == "aborted" for f in findings)


def test_a_flipped_delete_is_named(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    with connect(server.dsn(), autocommit=False) as reader:
        reader.execute("set transaction isolation level repeatable read")
        reader.execute("select count(*) from shop")  # keeps the deleted row from being pruned
        xid = int(sql(server, "with d as (delete from shop where id = 77) select txid_current()"))
        sql(server, "select count(*) from shop")
    with faults.offline(server) as folder:
        faults.xact_flip(folder, xid)
    [finding] = found(server, NAME, local=False)
    assert (finding.location.key, finding.evidence["column"]) == (f"xid {xid}", "xmax")


def test_a_missing_file_is_named(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    sql(server, "checkpoint")
    (server.data_directory / "pg_xact/0000").rename(server.data_directory / "pg_xact.away")
    report = check(server, NAME)
    (server.data_directory / "pg_xact.away").rename(server.data_directory / "pg_xact/0000")
    assert ("pg_xact/0000", 0) in {(f.location.file, f.location.block) for f in report.findings}


def test_healthy_clusters_are_silent(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    silent(server, NAME)
    sql(server, SHOP)
    sql(server, "update shop set amount = 2; select count(*) from shop")
    sql(server, "delete from shop where id % 2 = 0")
    sql(
        server,
        "begin; insert into shop values (-1, 1, 1); savepoint s; delete from shop where id = 1; rollback",
    )
    sql(server, "select count(*) from shop; select * from shop for update; checkpoint")
    silent(server, NAME)
    server.kill()
    server.start()
    sql(server, "select count(*) from shop")
    silent(server, NAME)
    sql(server, "vacuum (freeze)")
    silent(server, NAME)


def test_tables_under_writers_are_silent(new_server: ServerFactory) -> None:
    server = new_server(18, shared_buffers="1MB")
    sql(server, SHOP)
    with writers(server):
        for _ in range(6):
            report = check(server, NAME)
            assert [f.as_json() for f in report.findings] == []
