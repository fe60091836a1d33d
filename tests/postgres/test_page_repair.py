"""Damaged pages of a running server, mended in place under load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fix_repair import ORDERS, WORK, Site, flipped, load, site_of
from knockwood.errors import PostgresError, RefusedError
from knockwood.host import privileges
from knockwood.integrity.check import Budget
from knockwood.model import Finding, Location, Lsn, Severity, Verdict
from knockwood.model.recovery import Outcome, Plan
from knockwood.operations.page_repair import plan_pages
from knockwood.operations.protect import take
from knockwood.postgres.pages import bad_pages, decode_header, sealed
from knockwood.recover.pages_facts import flush_wal, target_named, wal_facts
from knockwood.recover.pages_session import session
from knockwood.recover.pages_write import look
from knockwood.recover.plan.page_wal import WalFacts
from knockwood.recover.plan.pages import PageClass
from knockwood.repository.backups.listing import list_backups

if TYPE_CHECKING:
    from fix_server import ServerFactory

FINGERPRINT = "select count(*) || ' ' || coalesce(sum(hashtextextended(o::text, 0)), 0) from orders o"


def mend(site: Site, plan: Plan) -> str:
    assert plan.steps, plan.refused
    recovery = site.execute(plan)
    assert recovery.complete, recovery.as_json()
    assert recovery.verdict is Verdict.HELD, recovery.as_json()
    return " ".join(result.detail for result in recovery.results)


def wal_of(site: Site, name: str, block: int) -> Mapping[int, WalFacts]:
    """What the WAL since the newest backup says of a block up to now."""
    subject = site.cluster.subject(Budget(), repository=site.repository)
    since = list_backups(site.repository)[-1].start_lsn
    with session(subject, "postgres") as tools:
        target = target_named(tools.connection, "postgres", name)
        return wal_facts(subject, target, [block], since, flush_wal(subject, "postgres"))


def judged(site: Site, name: str, block: int, known: Mapping[int, WalFacts]) -> PageClass:
    subject = site.cluster.subject(Budget(), repository=site.repository)
    with session(subject, "postgres") as tools:
        target = target_named(tools.connection, "postgres", name)
        return look(tools, target, [block], known[block].since, known).judgements[block].damage


@pytest.mark.parametrize("version", [15, pytest.param(17, marks=pytest.mark.slow), 18])
def test_pages_that_nobody_can_read(new_server: ServerFactory, version: int) -> None:
    """A flipped bit, a torn page, one written to the wrong place, and one of TOAST; nobody waits."""
    server = new_server(version)
    with site_of(server) as site:
        orders, toast = site.path("orders"), site.path(site.toast())
        site.settle()
        old = site.page(orders, 8)
        site.sql("update orders set note = 'new' where id between 1 and 4000 and id % 7 = 0")
        server.stop("fast")
        site.put(orders, 3, flipped(site.page(orders, 3)))
        site.put(orders, 8, old[:4096] + site.page(orders, 8)[4096:])
        site.put(orders, 9, site.page(orders, 12))
        site.put(toast, 5, flipped(site.page(toast, 5), 5000, 1))
        server.start()
        plan = site.plan((orders, 3), (orders, 8), (orders, 9), (toast, 5), (orders, 4))
        assert len(plan.steps) == 2
        assert not plan.refused
        assert {step.arguments["procedure"] for step in plan.steps} == {"write"}
        assert "checksum of block 12" in str(plan.as_json())
        with load(site) as done:
            recovery = site.execute(plan)
            assert done[0]
        assert recovery.verdict is Verdict.HELD, recovery.as_json()
        assert site.failures
        assert all(result.blocked_seconds == 0 for result in recovery.results)
        damage = {k: v for result in recovery.results for k, v in result.values["damage"].items()}
        assert damage["3"] == "one bit differs, in byte 8000"
        assert damage["8"].startswith("torn")
        assert site.sql("select count(*) from pg_extension") == 1
        again = site.plan((orders, 3), (toast, 5))
        assert not again.steps
        assert not again.refused
        assert recovery.results[0].outcome is Outcome.DONE


def test_pages_that_can_be_read_but_are_wrong(new_server: ServerFactory) -> None:
    """Zeroes and an old page (lost write) in the table and in TOAST, with nothing in the buffers; then a page
    that is bad on disk and good in the buffers."""
    server = new_server(18)
    with site_of(server) as site:
        orders, toast = site.path("orders"), site.path(site.toast())
        # Rows that nobody has read yet: whoever reads the old page writes on it, and logs its image.
        site.sql("update orders set note = 'unread' where ctid >= '(6,0)' and ctid < '(7,0)' and id % 2 = 0")
        site.settle()
        old = {6: site.page(orders, 6), 8: site.page(orders, 8)}
        site.sql("update orders set note = 'newer' where id between 1 and 4000 and id % 5 = 0")
        expected = site.sql(FINGERPRINT)
        server.stop("fast")
        site.put(orders, 2, bytes(8192))
        for block, page in old.items():
            assert page != site.page(orders, block)
            site.put(orders, block, page)
        site.put(toast, 3, bytes(8192))
        server.start()
        # The bad pages come into the buffers, and are looked at.
        assert site.sql("select count(*) from orders where length(note) > 0") < 4000
        with pytest.raises(PostgresError, match="missing chunk"):
            site.sql(FINGERPRINT)
        plan = site.plan((orders, 2), (orders, 6), (orders, 8), (toast, 3))
        pages = [step for step in plan.steps if step.kind == "repair-pages"]
        assert [step.arguments["procedure"] for step in pages] == ["replace", "replace"], plan.as_json()
        assert "it was read, and nothing more" in str(plan.as_json())
        others = tuple(text for text in WORK if "orders" not in text)
        with load(site, statements=(*others, "select count(*) from orders where id < 100")):
            recovery = site.execute(plan)
        assert recovery.verdict is Verdict.HELD, recovery.as_json()
        assert site.sql(FINGERPRINT) == expected
        assert all(result.blocked_seconds > 0 for result in recovery.results if result.kind == "repair-pages")
        site.settle()
        site.sql("select sum(length(note)) from orders")
        server_page = site.page(orders, 7)
        site.put(orders, 7, flipped(server_page))
        plan = site.plan((orders, 7))
        assert [step.arguments["procedure"] for step in plan.steps] == ["save buffer"], plan.as_json()
        mend(site, plan)
        assert site.page(orders, 7) == server_page
        assert site.sql(FINGERPRINT) == expected


def test_indexes_maps_and_what_is_refused(new_server: ServerFactory) -> None:
    server = new_server(18)
    with site_of(server) as site:
        site.sql("create materialized view seen as select * from other; create sequence numbers")
        orders, index = site.path("orders"), site.path("orders_customer")
        refused = {
            name: site.path(name) for name in ("scratch", "seen", "numbers", "pg_class", "pg_database")
        }
        server.stop("fast")
        site.put(index, 3, flipped(site.page(index, 3)))
        for fork in ("fsm", "vm"):
            path = f"{orders}_{fork}"
            site.put(path, 0, flipped(site.page(path, 0), 100))
        for path in refused.values():
            if path != refused["pg_class"] and path != refused["pg_database"]:
                site.put(path, 0, flipped(site.page(path, 0)))
        server.start()
        plan = site.plan((index, 3), (f"{orders}_fsm", 0), (f"{orders}_vm", 0))
        assert [step.kind for step in plan.steps] == ["rebuild-maps", "rebuild-maps", "reindex"]
        # What a killed REINDEX CONCURRENTLY leaves behind.
        site.sql("create index orders_customer_ccnew on orders (customer)")
        site.sql(
            "update pg_index set indisvalid = false where indexrelid = 'orders_customer_ccnew'::regclass"
        )
        with load(site):
            mend(site, plan)
        assert site.sql("select count(*) from pg_class where relname like '%_ccnew'") == 0
        again = site.plan((index, 3))
        assert (again.steps, again.refused) == ((), ())
        site.settle()
        assert site.plan((index, 3)).refused == ()
        (server.data_directory / index).write_bytes(bytes(8192))
        assert "no relation lies in file" in site.plan((index, 0)).refused[0]
        for fork in ("fsm", "vm"):
            page = site.page(f"{orders}_{fork}", 0)
            assert not bad_pages(page, 0, True)
        plan = site.plan(*((path, 0) for path in refused.values()))
        assert not plan.steps
        text = " ".join(plan.refused)
        for word in ("unlogged", "REFRESH", "setval", "system catalog", "shared catalog"):
            assert word in text, text
        assert "not a relation's file" in " ".join(site.plan(("pg_xact/0000", 0)).refused)
        with pytest.raises(RefusedError, match="no steps"):
            site.execute(plan)
        site.sql(
            "create role careless; alter role careless set work_mem = '64kB';"
            "alter role careless set zero_damaged_pages = on"
        )
        assert "zero_damaged_pages is on" in site.plan((orders, 2)).refused[0]


def test_changes_that_the_archive_has_lost_too(new_server: ServerFactory) -> None:
    """A lost write whose page was used again: its image in the archive is stale, so rows are brought over."""
    server = new_server(18)
    with site_of(server) as site:
        site.sql(
            "create table account (id int primary key, name text unique, owner int references other);"
            "insert into account select i, 'n' || i, i from generate_series(1, 100) i;"
            "alter table account set (autovacuum_enabled = off)"
        )
        take(site.cluster, site.repository)
        account = site.path("account")
        site.sql("select count(*) from account")
        site.settle()
        old = site.page(account, 0)
        site.sql(
            "checkpoint; update account set name = 'changed' where id = 7; delete from account where id = 8;"
            "insert into account values (201, 'inserted', 9), (202, 'another', 10)"
        )
        expected = site.sql("select string_agg(a::text, ',' order by id) from account a")
        site.settle()
        lost = site.page(account, 0)
        assert lost != old
        read_before = wal_of(site, "public.account", 0)
        site.damage(account, 0, old)
        # The stale page is used again: a row is put where a lost one was, and the archive has that image.
        site.sql("insert into account values (301, 'since', 11)")
        site.settle()
        assert "changed" not in site.sql("select string_agg(a::text, ',' order by id) from account a")
        # That image may come just after the WAL was read: the page is not taken for the newest then.
        assert judged(site, "public.account", 0, read_before) is PageClass.POISONED
        plan = site.plan((account, 0))
        assert [step.kind for step in plan.steps] == ["replace-rows"], plan.as_json()
        # Somebody changes one of the rows: that is theirs to decide. (The indexes lie by now.)
        slowly = "set enable_indexscan = off; set enable_bitmapscan = off;"
        site.sql(f"{slowly} update account set owner = 99 where id = 7")
        recovery = site.execute(plan)
        assert recovery.results[-1].outcome is Outcome.REFUSED
        assert "('7',)" in recovery.results[-1].detail
        site.sql(f"{slowly} update account set owner = 7 where id = 7")
        mend(site, plan)
        now = site.sql("select string_agg(a::text, ',' order by id) from account a")
        assert now == expected + ",(301,since,11)"
        assert site.sql("set enable_seqscan = off; select id from account where name = 'inserted'") == 201
        with pytest.raises(PostgresError, match="duplicate key"):
            site.sql("insert into account values (500, 'another', 1)")
        again = site.execute(plan)
        assert again.results[0].outcome is Outcome.ALREADY_DONE


def test_two_pages_of_a_table_that_the_archive_has_lost_too(new_server: ServerFactory) -> None:
    """Rows of both are back from the dead beside their new versions: the indexes are made anew after both."""
    server = new_server(18)
    with site_of(server) as site:
        site.sql(
            "create table account (id int primary key, name text);"
            "insert into account select i, i || repeat(' name', 40) from generate_series(1, 300) i;"
            "alter table account set (autovacuum_enabled = off)"
        )
        take(site.cluster, site.repository)
        account = site.path("account")
        site.sql("select count(*) from account")
        site.settle()
        old = [site.page(account, block) for block in (0, 1)]
        site.sql("checkpoint; update account set name = 'changed' || repeat('x', 900) where id in (3, 45)")
        site.settle()
        for block in (0, 1):
            assert site.page(account, block) != old[block]
            site.damage(account, block, old[block])
        site.sql("update account set name = 'since' where id in (5, 46)")
        site.settle()
        slowly = "set enable_indexscan = off; set enable_bitmapscan = off;"
        assert site.sql(f"{slowly} select count(*) from account where id in (3, 45)") == 4
        plan = site.plan((account, 0), (account, 1))
        assert [step.kind for step in plan.steps] == ["replace-rows"], plan.as_json()
        assert "2 rows to delete" in mend(site, plan)
        told = "select string_agg(left(name, 7), ',' order by id) from account where id in (3, 5, 45, 46)"
        assert site.sql(f"{slowly} {told}") == "changed,since,changed,since"
        assert site.sql(f"set enable_seqscan = off; {told}") == "changed,since,changed,since"


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("version", [15, 18])
def test_a_zeroed_page_that_was_taken_for_a_free_one(
    new_server: ServerFactory, version: int, changed: bool
) -> None:
    """VACUUM notes it as free and somebody fills it: all three places agree, and the rows are gone."""
    server = new_server(version)
    with site_of(server) as site:
        # Eight rows fill a page to the last bytes, so that the free space map knows of none.
        site.sql(
            "create table account (id int primary key, name text); alter table account alter name set storage plain;"
            "insert into account select i, rpad(i::text, 984, ' name') from generate_series(1, 80) i;"
            "alter table account set (autovacuum_enabled = off)"
        )
        take(site.cluster, site.repository)
        account = site.path("account")
        if changed:
            site.sql(
                "update account set name = rpad('changed', 100) where id = (select min(id) from account"
                " where ctid >= '(2,0)')"
            )
        expected = site.sql("select string_agg(a::text, ',' order by id) from account a")
        site.sql("checkpoint")
        site.settle()
        site.damage(account, 2, bytes(8192))
        site.sql("vacuum (disable_page_skipping, index_cleanup off) account")
        site.sql("insert into account select i, repeat('since', 400) from generate_series(1001, 1003) i")
        slowly = "set enable_indexscan = off; set enable_bitmapscan = off; set enable_indexonlyscan = off;"
        assert site.sql(f"{slowly} select max(ctid)::text from account where id > 1000").startswith("(2,")
        site.settle()
        plan = site.plan((account, 2))
        assert [step.kind for step in plan.steps] == ["rebuild-maps", "replace-rows"], plan.as_json()
        assert "all rows of block 2" in plan.steps[1].title
        mend(site, plan)
        since = ",".join(f"({number},{'since' * 400})" for number in range(1001, 1004))
        for how in (slowly, "set enable_seqscan = off;"):
            now = site.sql(f"{how} select string_agg(a::text, ',' order by id) from account a")
            assert now == f"{expected},{since}"
        assert site.execute(plan).results[-1].outcome is Outcome.ALREADY_DONE


def test_a_page_that_vacuum_has_freed_is_sound(new_server: ServerFactory) -> None:
    server = new_server(18)
    with site_of(server) as site:
        site.sql(
            "create table account (id int primary key, name text);"
            "insert into account select i, i || repeat(' name', 40) from generate_series(1, 300) i;"
            "alter table account set (autovacuum_enabled = off)"
        )
        take(site.cluster, site.repository)
        account = site.path("account")
        site.sql("delete from account where ctid >= '(2,0)' and ctid < '(3,0)'")
        site.sql("vacuum account")
        site.sql("insert into account values (1001, repeat('since', 400))")
        assert site.sql("select ctid::text from account where id = 1001") == "(2,1)"
        site.settle()
        records = wal_of(site, "public.account", 2)[2].records
        assert "Heap INSERT+INIT" in [record.kind for record in records]
        plan = site.plan((account, 2))
        assert (plan.steps, plan.refused) == ((), ())


def test_a_table_cut_where_it_was_made_is_mended_page_by_page(new_server: ServerFactory) -> None:
    """TRUNCATE in the transaction that made the table keeps its file: pages begin anew, and nothing was lost."""
    server = new_server(18)
    with site_of(server) as site:
        site.sql(
            "begin; create table load (id int primary key, name text);"
            "insert into load select i, 'first' from generate_series(1, 2000) i; truncate load;"
            "insert into load select i, 'second' from generate_series(1, 2000) i; commit;"
            "alter table load set (autovacuum_enabled = off)"
        )
        site.settle()
        load_path = site.path("load")
        known = wal_of(site, "public.load", 0)[0]
        assert [record.kind for record in known.records].count("Heap INSERT+INIT") == 1
        site.damage(load_path, 0, flipped(site.page(load_path, 0)))
        plan = site.plan((load_path, 0))
        assert [step.arguments["procedure"] for step in plan.steps] == ["write"], plan.as_json()
        mend(site, plan)
        assert site.sql("select count(*) from load where name = 'second'") == 2000


def test_pages_last_written_before_the_backup(new_server: ServerFactory) -> None:
    """The change that a page lacks is older than every backup: the backup's page counts, but only if it holds
    the change. A page that no backup proves hinders no other."""
    server = new_server(18)
    with site_of(server, f"{ORDERS};\nvacuum (freeze) other") as site:
        other = site.path("other")
        expected = site.sql("select sum(hashtextextended(o::text, 0)) from other o")
        site.settle()
        good = {block: site.page(other, block) for block in (2, 4, 6)}

        def finding(block: int) -> Finding:
            return Finding(
                "lost_writes",
                Severity.CRITICAL,
                Location(database="postgres", relation="public.other", file=other, block=block),
                "the page is all zeros, and the WAL says that it was written",
                evidence={
                    "last_record": str(Lsn(decode_header(good[block]).lsn.value - 8)),
                    "wal": f"0/1000000..{read_to} on timeline 1",
                },
            )

        read_to = site.sql("select pg_current_wal_lsn()")
        site.damage(other, 2, bytes(8192))
        [first] = list_backups(site.repository)
        assert first.start_lsn > decode_header(good[2]).lsn
        # This one has the page that is zero, and another that is old but looks right.
        stale = bytearray(good[4])
        stale[:8] = bytes.fromhex("00000000e8030000")
        site.damage(other, 4, sealed(bytes(stale), 4))
        later = take(site.cluster, site.repository)
        plan = plan_pages(site.cluster, site.repository, [finding(2), finding(4)])
        assert [step.arguments["backup"] for step in plan.steps if step.kind == "repair-pages"] == [first.id]
        read_to = site.sql("select pg_current_wal_lsn()")
        # Neither is proven by the newest backup: the older one is asked.
        plan = plan_pages(site.cluster, site.repository, [finding(2), finding(4)])
        [step] = [step for step in plan.steps if step.kind == "repair-pages"]
        assert step.arguments["backup"] == later.id
        assert step.arguments["older"][0] == first.id
        # Of a page that lacks what nobody has there is no image; the others are mended all the same.
        site.damage(other, 6, bytes(8192))
        lost = replace(
            finding(6), evidence={"last_record": read_to, "wal": f"0/1000000..{read_to} on timeline 1"}
        )
        plan = plan_pages(site.cluster, site.repository, [finding(2), finding(4), lost])
        recovery = site.execute(plan)
        [result] = [each for each in recovery.results if each.kind == "repair-pages"]
        assert result.outcome is Outcome.REFUSED
        assert recovery.verdict is Verdict.BROKEN
        assert result.values["mended"] == [2, 4]
        assert list(result.values["not_mended"]) == ["6"]
        assert "known to have changed" in result.detail
        assert site.page(other, 2) == good[2]
        plan = plan_pages(site.cluster, site.repository, [finding(6)])
        mend(site, plan)
        assert site.sql("select sum(hashtextextended(o::text, 0)) from other o") == expected


def test_without_a_way_to_drop_buffers(new_server: ServerFactory) -> None:
    """15 mends a zero page that no buffer holds, and one that is good in the buffers; it refuses what it holds."""
    server = new_server(15)
    with site_of(server) as site:
        orders = site.path("orders")
        site.sql("update orders set note = 'newer' where id % 9 = 0")
        expected = site.sql(FINGERPRINT)
        site.settle()
        site.damage(orders, 6, bytes(8192))
        plan = site.plan((orders, 6))
        assert plan.steps[0].arguments["procedure"] == "replace"
        mend(site, plan)
        assert site.sql(FINGERPRINT) == expected
        site.settle()
        good = site.page(orders, 6)
        site.put(orders, 6, bytes(8192))
        plan = site.plan((orders, 6))
        assert plan.steps[0].arguments["procedure"] == "save buffer"
        mend(site, plan)
        assert site.page(orders, 6) == good
        site.damage(orders, 7, bytes(8192))
        site.sql("select count(*) from orders")
        plan = site.plan((orders, 7))
        assert not plan.steps
        assert "restart the server" in plan.refused[0]
        # Nothing is built on the table while it holds such a page.
        site.damage(orders, 8, bytes(8192))
        site.sql("select count(*) from orders where ctid = '(7,1)'")
        plan = site.plan((orders, 7), (orders, 8))
        assert [(step.kind, step.arguments["blocks"]) for step in plan.steps] == [("repair-pages", [8])]
        assert "only once its other damaged pages are mended" in plan.refused[-1]


@pytest.mark.slow
def test_a_table_in_a_tablespace_and_one_that_was_rewritten(new_server: ServerFactory) -> None:
    server = new_server(18)
    with site_of(server) as site:
        space = site.folder / "space"
        space.mkdir()
        privileges.give(space, server.account)
        site.sql(f"create tablespace fast location '{space}'")
        site.sql("create table far (id int primary key, n text) tablespace fast")
        site.sql("insert into far select i, 'n' || i from generate_series(1, 2000) i")
        take(site.cluster, site.repository)
        site.sql("update far set n = 'new' where id % 10 = 0; alter table orders alter note type varchar")
        site.settle()
        far, orders = site.path("far"), site.path("orders")
        assert far.startswith("pg_tblspc/")
        before = [
            site.sql(f"select sum(hashtextextended(t::text, 0)) from {name} t") for name in ("far", "orders")
        ]
        server.stop("fast")
        site.put(far, 1, flipped(site.page(far, 1)))
        site.put(far, 2, bytes(8192))
        site.put(orders, 3, flipped(site.page(orders, 3)))
        server.start()
        plan = site.plan((far, 1), (far, 2), (orders, 3))
        mend(site, plan)
        after = [
            site.sql(f"select sum(hashtextextended(t::text, 0)) from {name} t") for name in ("far", "orders")
        ]
        assert after == before
