"""Relation files: missing and short ones are named, and the leftovers of healthy work are not."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from fix_checks import SHOP, check, found, path_of, silent, sql, writers
from knockwood.drill import faults
from knockwood.host import privileges
from knockwood.model import Severity, Verdict
from knockwood.postgres.connection import connect

if TYPE_CHECKING:
    from pathlib import Path

    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer

NAME = "segment_files"
GIGABYTE = 1 << 30


def grown(server: LocalServer, path: str, folder: Path) -> None:
    """Three segments, the two added ones sparse: all-zero pages are legal."""
    for name, size in ((path, GIGABYTE), (f"{path}.1", GIGABYTE), (f"{path}.2", 8192)):
        (folder / name).touch()
        os.truncate(folder / name, size)
        privileges.give(folder / name, server.account)


def test_a_missing_middle_segment_is_named(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    sql(server, SHOP)
    path = path_of(server, "other")
    with faults.offline(server) as folder:
        grown(server, path, folder)
    silent(server, NAME)
    with faults.offline(server) as folder:
        faults.remove_segment(folder, path, 1)
    [finding] = found(server, NAME)
    assert (finding.location.relation, finding.location.file) == ("public.other", f"{path}.1")
    assert finding.severity is Severity.CRITICAL
    assert "missing" in finding.summary


def test_missing_files_are_named(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    other, index, scratch = (path_of(server, n) for n in ("other", "shop_customer", "scratch"))
    with faults.offline(server) as folder:
        faults.remove_file(folder, other)
        faults.remove_file(folder, index)
        faults.remove_file(folder, f"{scratch}_init")
    places = {(f.location.relation, f.location.index, f.location.file) for f in found(server, NAME)}
    assert places == {
        ("public.other", None, other),
        ("public.shop", "public.shop_customer", index),
        ("public.scratch", None, f"{scratch}_init"),
    }


def test_a_torn_end_of_a_file_is_named(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    path = path_of(server, "other")
    with faults.offline(server) as folder:
        faults.truncate_tail(folder, path, 1, extra_bytes=100)
    [finding] = found(server, NAME, local=False)
    assert finding.location.file == path
    assert "whole number of pages" in finding.summary


def test_a_cut_tail_of_a_vacuumed_table_is_named(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    sql(server, SHOP)
    sql(server, "vacuum other")
    path = path_of(server, "other")
    length = int(sql(server, "select pg_relation_size('other') / 8192"))
    with faults.offline(server) as folder:
        faults.truncate_tail(folder, path, 5)
    [finding] = found(server, NAME)
    assert (finding.location.relation, finding.location.block) == ("public.other", length - 5)
    assert finding.evidence["last_block_known"] == length - 1


def test_a_lost_database_file_is_named(new_server: ServerFactory) -> None:
    server = new_server(18)
    oid = sql(server, "select oid from pg_database where datname = 'template1'")
    (server.data_directory / f"base/{oid}/PG_VERSION").unlink()
    report = check(server, NAME)
    assert report.verdict is Verdict.BROKEN
    assert report.findings[0].location.file == f"base/{oid}/PG_VERSION"
    assert "template1" in report.not_checked[0].reason


def test_healthy_clusters_are_silent(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    sql(server, SHOP)
    silent(server, NAME)
    sql(server, "vacuum")
    sql(server, "delete from shop where id > 2000")
    sql(server, "delete from other where id > 10")
    sql(server, "vacuum")  # cuts both tails
    sql(server, "reindex table shop; drop table scratch; create temp table t as select 1; truncate other")
    sql(server, "create table empty (id int)")
    silent(server, NAME)
    silent(server, NAME, local=False)
    # A crash in the middle of a transaction leaves files that no catalog knows.
    with connect(server.dsn(), autocommit=False) as connection:
        connection.execute("create table never as select i from generate_series(1, 1000) i")
        server.kill()
        connection.close()
    server.start()
    silent(server, NAME)


def test_an_index_whose_concurrent_build_waits_is_silent(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    with ThreadPoolExecutor() as pool:
        with connect(server.dsn()) as writer, writer.transaction():
            writer.execute("insert into other values (0, 'holds the build up')")
            build = pool.submit(sql, server, "create index concurrently waiting on other (body)")
            while not sql(server, "select count(*) from pg_index where not indisready"):
                assert not build.done()
            empty = server.data_directory / path_of(server, "waiting")
            assert empty.stat().st_size == 0
            silent(server, "segment_files")
        build.result(60)
    assert empty.stat().st_size > 0


def test_a_table_under_writers_is_silent(new_server: ServerFactory) -> None:
    server = new_server(18, shared_buffers="1MB")
    sql(server, SHOP)
    with writers(server):
        for _ in range(8):
            silent(server, NAME)
