"""amcheck's checks: all damage of a table past unreadable pages, indexes, and silence on health."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fix_checks import SHOP, check, found, path_of, silent, sql, writers
from knockwood.drill import faults
from knockwood.integrity.check import Role
from knockwood.model import Severity, Verdict

if TYPE_CHECKING:
    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer

LIGHT = ("amcheck_heap", "amcheck_index")
ALL = (*LIGHT, "amcheck_deep")


def prepared(new_server: ServerFactory, major: int = 18, **settings: str) -> LocalServer:
    server = new_server(major, **settings)
    sql(server, "create extension amcheck")
    sql(server, "create extension amcheck", database="template1")
    sql(server, SHOP)
    sql(server, "create index shop_tags on shop using gin (tags)")
    return server


def toast_of(server: LocalServer, table: str) -> str:
    return str(
        sql(server, f"select reltoastrelid::regclass::text from pg_class where oid = '{table}'::regclass")
    )


def test_all_damage_of_a_table_past_unreadable_pages(new_server: ServerFactory, every_version: int) -> None:
    server = prepared(new_server, every_version)
    path = path_of(server, "shop")
    with faults.offline(server) as folder:
        for block in (4, 9, 10):
            faults.bit_flip(folder, path, block)
        # t_hoff of the first row, with a valid checksum: only verify_heapam sees it.
        page = faults.read_block(folder, path, 20)
        row = int.from_bytes(page[24:26], "little") & 0x7FFF
        faults.flip_before_checksum(folder, path, 20, row + 22, bit=2)
    findings = found(server, "amcheck_heap")
    assert [(f.location.relation, f.location.block) for f in findings] == [
        ("public.shop", block) for block in (4, 9, 10, 20)
    ]
    assert all(f.location.file == path and f.severity is Severity.CRITICAL for f in findings)


def test_a_zeroed_toast_page_is_seen_from_its_rows(new_server: ServerFactory, every_version: int) -> None:
    server = prepared(new_server, every_version)
    path = path_of(server, toast_of(server, "shop"))
    with faults.offline(server) as folder:
        faults.zero_block(folder, path, 3)
    findings = found(server, "amcheck_heap")
    assert {f.location.relation for f in findings} == {"public.shop"}
    assert "toast value" in findings[0].summary


def test_an_unreadable_toast_page_is_named_and_the_table_still_checked(new_server: ServerFactory) -> None:
    server = prepared(new_server)
    toast = toast_of(server, "shop")
    path = path_of(server, toast)
    with faults.offline(server) as folder:
        faults.bit_flip(folder, path, 3)
    report = check(server, "amcheck_heap")
    assert [(f.location.relation, f.location.block) for f in report.findings] == [(toast, 3)]
    assert report.findings[0].evidence["toast_of"] == "public.shop"
    assert "public.shop" in report.not_checked[0].reason


def test_a_stale_btree_leaf_is_named(new_server: ServerFactory, every_version: int) -> None:
    server = prepared(new_server, every_version)
    path = path_of(server, "other_pkey")
    with faults.offline(server) as folder:
        image = faults.read_block(folder, path, 1)
    sql(server, "insert into other select i, 'y' from generate_series(-3000, 0) i")
    with faults.offline(server) as folder:
        faults.stale_block(folder, path, 1, image)
    [finding] = found(server, "amcheck_index")
    assert (finding.location.index, finding.location.relation) == ("public.other_pkey", "public.other")
    assert finding.severity is Severity.HIGH
    assert "REINDEX" in finding.remedy


def test_an_unreadable_index_page_is_named(new_server: ServerFactory) -> None:
    server = prepared(new_server)
    path = path_of(server, "other_pkey")
    with faults.offline(server) as folder:
        faults.bit_flip(folder, path, 5)
    [finding] = found(server, "amcheck_index")
    assert (finding.location.index, finding.location.file, finding.location.block) == (
        "public.other_pkey",
        path,
        5,
    )


def test_a_row_without_its_entry_is_named(new_server: ServerFactory, every_version: int) -> None:
    server = prepared(new_server, every_version)
    path = path_of(server, "other_pkey")
    with faults.offline(server) as folder:
        faults.drop_entry(folder, path, 2)
    silent(server, *LIGHT)
    [finding] = found(server, "amcheck_deep")
    assert finding.location.index == "public.other_pkey"
    assert (finding.location.key or "").startswith("ctid (")


def test_gin_is_checked_from_18(new_server: ServerFactory) -> None:
    server = prepared(new_server)
    path = path_of(server, "shop_tags")
    with faults.offline(server) as folder:
        faults.bit_flip(folder, path, 1)
    [finding] = found(server, "amcheck_index")
    assert (finding.location.index, finding.location.block) == ("public.shop_tags", 1)


def test_without_the_extension_nothing_is_green(new_server: ServerFactory) -> None:
    report = check(new_server(18), *ALL)
    assert report.verdict is Verdict.NOT_CHECKED
    assert all("CREATE EXTENSION amcheck" in gap.reason for gap in report.not_checked)


def test_a_clone_that_takes_writes_gets_the_extension(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    silent(server, *ALL, role=Role.CLONE)


def test_healthy_clusters_are_silent(new_server: ServerFactory, every_version: int) -> None:
    server = prepared(new_server, every_version)
    silent(server, *ALL)
    sql(server, "delete from shop where id > 2000; update other set body = 'y' where id % 3 = 0")
    sql(server, "vacuum")
    sql(server, "reindex table shop; truncate scratch; drop table scratch")
    silent(server, *ALL)


def test_tables_under_writers_are_silent(new_server: ServerFactory) -> None:
    server = prepared(new_server)
    with writers(server):
        for _ in range(5):
            report = check(server, *LIGHT)
            assert [f.as_json() for f in report.findings] == []
