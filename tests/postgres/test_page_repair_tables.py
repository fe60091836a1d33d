"""A disk that fails damages many tables: their pages come from one clone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fix_repair import flipped, site_of
from knockwood.model import Verdict
from knockwood.operations.page_repair import PageRepairs, verify_pages
from knockwood.operations.protect import take
from knockwood.recover.execute import execute

if TYPE_CHECKING:
    from fix_server import ServerFactory

TABLES = 8
ALL = "select string_agg(t::text, ',' order by id) from m{n} t"


@pytest.mark.parametrize("version", [pytest.param(15, marks=pytest.mark.slow), 18])
def test_pages_of_many_tables_come_from_one_clone(new_server: ServerFactory, version: int) -> None:
    server = new_server(version, wal_keep_size="500MB")
    with site_of(server) as site:
        for n in range(TABLES):
            site.sql(
                f"create table m{n} (id int primary key, note text);"
                f"insert into m{n} select i, repeat('n', 60) || i from generate_series(1, 1000) i;"
                f"alter table m{n} set (autovacuum_enabled = off)"
            )
        take(site.cluster, site.repository)
        # The last record of each page is of one row: neither the backup nor an image in the WAL is the newest.
        for n in range(TABLES):
            site.sql(
                f"update m{n} set note = 'first' where id % 3 = 0; update m{n} set note = 'then' where id = 7"
            )
        # One has a file that no backup knows.
        site.sql("truncate m3; insert into m3 select i, 'anew' || i from generate_series(1, 1000) i")
        site.settle()
        expected = [site.sql(ALL.format(n=n)) for n in range(TABLES)]
        site.settle()
        paths = [site.path(f"m{n}") for n in range(TABLES)]
        server.stop("fast")
        for path in paths:
            site.put(path, 0, flipped(site.page(path, 0)))
        server.start()
        plan = site.plan(*((path, 0) for path in paths))
        assert len(plan.steps) == TABLES, plan.refused
        with PageRepairs(site.cluster, site.repository, plan=plan) as repairs:
            recovery = execute(
                plan,
                repairs.handlers,
                site.folder / "journal",
                approve=plan.id,
                verify=lambda: verify_pages(site.cluster, site.repository, plan),
            )
            clones = {id(clone) for clone in repairs._clones.values()}
        assert recovery.verdict is Verdict.HELD, recovery.as_json()
        assert len(clones) == 1
        assert [site.sql(ALL.format(n=n)) for n in range(TABLES)] == expected


def test_a_table_that_needs_more_than_its_blocks_has_a_clone_of_its_own(new_server: ServerFactory) -> None:
    """VACUUM has cut its end off: some blocks alone cannot follow that."""
    server = new_server(18, wal_keep_size="500MB")
    with site_of(server) as site:
        for n, rows in enumerate((1000, 40_000)):
            site.sql(
                f"create table m{n} (id int primary key, note text);"
                f"insert into m{n} select i, repeat('n', 60) || i from generate_series(1, {rows}) i;"
                f"alter table m{n} set (autovacuum_enabled = off)"
            )
        take(site.cluster, site.repository)
        site.sql("delete from m1 where id > 20000")
        site.sql("vacuum m1")
        for n in range(2):
            site.sql(
                f"update m{n} set note = 'first' where id % 3 = 0; update m{n} set note = 'then' where id = 7"
            )
        site.settle()
        expected = [site.sql(ALL.format(n=n)) for n in range(2)]
        site.settle()
        paths = [site.path(f"m{n}") for n in range(2)]
        server.stop("fast")
        for path in paths:
            site.put(path, 0, flipped(site.page(path, 0)))
        server.start()
        plan = site.plan(*((path, 0) for path in paths))
        with PageRepairs(site.cluster, site.repository, plan=plan) as repairs:
            recovery = execute(plan, repairs.handlers, site.folder / "journal", approve=plan.id)
            clones = {id(clone) for clone in repairs._clones.values()}
        assert recovery.complete, recovery.as_json()
        assert len(clones) == 2
        assert [site.sql(ALL.format(n=n)) for n in range(2)] == expected
