"""Rows that an index knows and the table lacks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fix_checks import SHOP, check, found, path_of, silent, sql, subject_of, writers
from fix_clones import protected
from knockwood.clone.spawn import spawn
from knockwood.drill import faults
from knockwood.integrity.check import Role
from knockwood.integrity.run import run_checks
from knockwood.model import Severity
from knockwood.postgres.connection import connect, server_facts

if TYPE_CHECKING:
    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer

NAME = "heap_index_counts"


def test_zeroed_old_and_cut_pages_are_named(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    sql(server, SHOP)
    table, other = path_of(server, "shop"), path_of(server, "other")
    last = int(sql(server, "select pg_relation_size('shop') / 8192")) - 1
    with faults.offline(server) as folder:
        old = faults.read_block(folder, table, last)
    sql(server, "insert into shop select i, 1, 1 from generate_series(5001, 5200) i")
    length = int(sql(server, "select pg_relation_size('other') / 8192"))
    with faults.offline(server) as folder:
        faults.zero_block(folder, table, 7)
        faults.stale_block(folder, table, last, old)
        faults.truncate_tail(folder, other, 3)
    findings = found(server, NAME)
    assert [(f.location.relation, f.location.block, f.evidence["state"]) for f in findings] == [
        ("public.shop", 7, "zero"),
        ("public.shop", last, "unused"),
        *(("public.other", block, "beyond the end") for block in range(length - 3, length)),
    ]
    assert all(f.severity is Severity.CRITICAL for f in findings)


def test_entries_of_equal_keys_are_followed_too(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, "create table t as select 1 as a, i from generate_series(1, 20000) i; create index on t (a)")
    path = path_of(server, "t")
    with faults.offline(server) as folder:
        faults.zero_block(folder, path, 50)
    [finding] = found(server, NAME, local=False)
    assert (finding.location.relation, finding.location.block) == ("public.t", 50)
    assert finding.evidence["index_entries"] == 20000


def test_a_zeroed_toast_page_is_named(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    toast = sql(server, "select reltoastrelid::regclass::text from pg_class where relname = 'shop'")
    path = path_of(server, toast)
    with faults.offline(server) as folder:
        faults.zero_block(folder, path, 2)
    [finding] = found(server, NAME)
    assert (finding.location.relation, finding.location.block) == (toast, 2)


def test_unreadable_pages_are_left_to_the_page_check(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    table, index = path_of(server, "shop"), path_of(server, "shop_pkey")
    with faults.offline(server) as folder:
        faults.bit_flip(folder, table, 3, offset=13)
        faults.bit_flip(folder, index, 3, offset=13)
    silent(server, NAME)


def test_healthy_clusters_are_silent(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    sql(server, SHOP)
    silent(server, NAME)
    sql(server, "update shop set customer = customer + 1; delete from shop where id > 3000 or id % 4 = 0")
    sql(server, "delete from other where id > 9")
    sql(server, "vacuum")
    silent(server, NAME)
    sql(server, "insert into shop select i, 1, 1 from generate_series(5001, 5200) i")
    sql(server, "reindex table shop; truncate other; drop table scratch")
    sql(server, "vacuum full shop")
    silent(server, NAME)


def cut_and_extend(server: LocalServer) -> None:
    """The file ends in zeros then, the rows' page is in the buffers; so is the index without the rows deleted."""
    sql(server, "delete from other where id > 4000")
    sql(server, "vacuum (index_cleanup on, truncate on) other")
    sql(server, "insert into other select i, repeat('y', 100) from generate_series(6001, 6010) i")


@pytest.mark.parametrize("inspect", [True, False])
def test_a_table_cut_and_extended_before_its_index_is_flushed_is_silent(
    new_server: ServerFactory, every_version: int, inspect: bool
) -> None:
    server = new_server(every_version, bgwriter_lru_maxpages=0, autovacuum=False)
    sql(server, SHOP)
    if inspect:
        sql(server, "create extension pageinspect")
    sql(server, "checkpoint")
    cut_and_extend(server)
    length = int(sql(server, "select pg_relation_size('other')"))
    page = (server.data_directory / path_of(server, "other")).read_bytes()[length - faults.BLOCK : length]
    assert not any(page)
    silent(server, NAME)


@pytest.mark.parametrize("inspect", [True, False])
def test_a_paused_clone_tells_pages_gone_from_pages_not_flushed(
    new_server: ServerFactory, inspect: bool
) -> None:
    server = new_server(18, bgwriter_lru_maxpages=0, autovacuum=False)
    with protected(server, server.data_directory.parent / "kw") as kept:
        sql(server, SHOP)
        if inspect:
            sql(server, "create extension pageinspect")
        kept.backup()
        cut_and_extend(server)
        with spawn(kept.repository, kept.plan("latest"), registry=kept.registry, purpose="check") as clone:
            faults.zero_block(clone.data_directory, path_of(server, "shop"), 7)
            with connect(clone.dsn()) as connection:
                facts = server_facts(connection)
            subject = replace(
                subject_of(server), dsn=clone.dsn(), facts=facts, role=Role.CLONE,
                data_directory=clone.data_directory,
            )  # fmt: skip
            report = run_checks(subject, [NAME])
    named = [(finding.location.relation, finding.location.block) for finding in report.findings]
    gaps = [gap.reason for gap in report.not_checked]
    if inspect:
        assert named == [("public.shop", 7)]
        assert gaps == []
    else:
        assert named == []
        assert [gap.partition(":")[0] for gap in gaps] == ["table public.shop", "table public.other"]
        assert all("pageinspect" in gap for gap in gaps)


def test_tables_under_writers_are_silent(new_server: ServerFactory) -> None:
    server = new_server(18, shared_buffers="1MB")
    sql(server, SHOP)
    with writers(server):
        for _ in range(8):
            report = check(server, NAME)
            assert [f.as_json() for f in report.findings] == []
