"""Wrong visibility map bits are named by heap block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fix_checks import SHOP, check, found, path_of, silent, sql, writers
from knockwood.drill import faults
from knockwood.model import Verdict

if TYPE_CHECKING:
    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer

NAME = "visibility_map"


def prepared(new_server: ServerFactory, major: int = 18) -> LocalServer:
    server = new_server(major)
    for database in ("postgres", "template1"):
        sql(server, "create extension pg_visibility", database=database)
    sql(server, SHOP)
    return server


def test_wrong_bits_are_named(new_server: ServerFactory, every_version: int) -> None:
    server = prepared(new_server, every_version)
    sql(server, "vacuum (freeze) shop")
    sql(server, "delete from shop where ctid >= '(5,0)' and ctid < '(6,0)'")
    sql(server, "delete from shop where ctid >= '(9,0)' and ctid < '(10,0)'")
    path = path_of(server, "shop")
    with faults.offline(server) as folder:
        faults.vm_flip(folder, path, 5, bits=3)
        faults.vm_flip(folder, path, 9, bits=1)
    findings = found(server, NAME)
    assert {(f.location.relation, f.location.block) for f in findings} == {
        ("public.shop", 5),
        ("public.shop", 9),
    }
    kinds = {(f.location.block, f.evidence["kind"]) for f in findings}
    assert {(5, "frozen"), (5, "visible"), (9, "visible"), (9, "page")} <= kinds


def test_a_zeroed_page_of_a_vacuumed_table_is_named(new_server: ServerFactory) -> None:
    server = prepared(new_server)
    sql(server, "vacuum shop")
    path = path_of(server, "shop")
    with faults.offline(server) as folder:
        faults.zero_block(folder, path, 11)
    assert {(f.location.relation, f.location.block) for f in found(server, NAME)} == {("public.shop", 11)}


def test_without_the_extension_nothing_is_green(new_server: ServerFactory) -> None:
    report = check(new_server(18), NAME)
    assert report.verdict is Verdict.NOT_CHECKED
    assert "CREATE EXTENSION pg_visibility" in report.not_checked[0].reason


def test_healthy_clusters_are_silent(new_server: ServerFactory, every_version: int) -> None:
    server = prepared(new_server, every_version)
    sql(server, "vacuum")
    silent(server, NAME)
    sql(server, "delete from shop where id % 3 = 0; update other set body = 'y'; truncate scratch")
    silent(server, NAME)
    sql(server, "vacuum (freeze)")
    silent(server, NAME)


def test_tables_under_writers_are_silent(new_server: ServerFactory) -> None:
    server = prepared(new_server)
    with writers(server):
        for _ in range(3):
            report = check(server, NAME)
            assert [f.as_json() for f in report.findings] == []
