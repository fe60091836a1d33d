"""Indexes without a checker: rows that cannot be found through them are named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fix_checks import SHOP, check, found, path_of, silent, sql, writers
from knockwood.drill import faults
from knockwood.model import Severity

if TYPE_CHECKING:
    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer

NAME = "index_against_heap"
INDEXES = """
create index by_hash on shop using hash (amount);
create index by_gist on shop using gist (place);
create index by_spgist on shop using spgist (note) where length(note) < 100;
create index by_gin on shop using gin (tags);
create index by_brin on shop using brin (id) with (pages_per_range = 4);
create index by_expression on shop using hash ((customer % 13));
"""


def prepared(new_server: ServerFactory, major: int = 18) -> LocalServer:
    server = new_server(major)
    sql(server, SHOP + INDEXES)
    # A btree on the same column would be used instead: the primary key's is on id.
    sql(server, "alter table shop drop constraint shop_pkey")
    return server


@pytest.mark.parametrize(
    ("index", "block"), [("by_hash", 2), ("by_gist", 3), ("by_spgist", 5), ("by_gin", 3), ("by_brin", 2)]
)
def test_rows_missing_from_an_index_are_named(
    new_server: ServerFactory, every_version: int, index: str, block: int
) -> None:
    server = prepared(new_server, every_version)
    path = path_of(server, index)
    with faults.offline(server) as folder:
        if index == "by_brin":
            faults.shrink_brin_range(folder, path, block, item=1)
        elif index == "by_spgist":
            # An SP-GiST scan never asks how many items a page has: its entry points at another row instead.
            page = faults.read_block(folder, path, block)
            pointer = int.from_bytes(page[24:28], "little") & 0x7FFF
            faults.flip_before_checksum(folder, path, block, pointer + 10, bit=0)
        else:
            faults.drop_entry(folder, path, block)
    [finding] = found(server, NAME)
    assert (finding.location.index, finding.location.relation) == (f"public.{index}", "public.shop")
    assert finding.location.file == path
    assert finding.severity is Severity.HIGH


def test_an_index_page_that_cannot_be_read_is_named(new_server: ServerFactory) -> None:
    server = prepared(new_server)
    path = path_of(server, "by_gist")
    with faults.offline(server) as folder:
        faults.bit_flip(folder, path, 3)
    [finding] = found(server, NAME)
    assert (finding.location.index, finding.location.block) == ("public.by_gist", 3)


def test_an_index_that_the_planner_passes_over_is_not_green(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, "create table t as select i from generate_series(1, 1000) i; create unique index on t (i)")
    sql(server, "create index by_brin on t using brin (i); create table d (x tsvector)")
    sql(server, "create index by_words on d using gin (x)")
    reasons = [gap.reason for gap in check(server, NAME).not_checked]
    assert len(reasons) == 2
    assert "prefers another index" in reasons[0]
    assert "no operator" in reasons[1]


def test_healthy_clusters_are_silent(new_server: ServerFactory, every_version: int) -> None:
    server = prepared(new_server, every_version)
    silent(server, NAME)
    sql(
        server, "delete from shop where id % 3 = 0; update shop set amount = amount + 1, place = point(id, 1)"
    )
    sql(
        server,
        "update shop set tags = null, note = null where id % 5 = 0; update shop set tags = '{}' where id = 1",
    )
    sql(
        server, "insert into shop select i, i, i, i, array[i], point(i, i) from generate_series(6000, 9000) i"
    )
    sql(server, "vacuum")
    silent(server, NAME)


def test_tables_under_writers_are_silent(new_server: ServerFactory) -> None:
    server = prepared(new_server)
    with writers(server):
        for _ in range(3):
            report = check(server, NAME)
            assert [f.as_json() for f in report.findings] == []
