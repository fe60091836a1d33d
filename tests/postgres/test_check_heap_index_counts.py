"""Rows that an index knows and the table lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fix_checks import SHOP, check, found, path_of, silent, sql, writers
from knockwood.drill import faults
from knockwood.model import Severity

if TYPE_CHECKING:
    from fix_server import ServerFactory

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


def test_tables_under_writers_are_silent(new_server: ServerFactory) -> None:
    server = new_server(18, shared_buffers="1MB")
    sql(server, SHOP)
    with writers(server):
        for _ in range(8):
            report = check(server, NAME)
            assert [f.as_json() for f in report.findings] == []
