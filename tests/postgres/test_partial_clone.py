"""Clones of some relations: right where they can be read, and impossible to read anywhere else."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import psycopg
import pyrage
import pytest

from fix_clones import Protected, one, protected, rows
from knockwood.clone import spawn
from knockwood.clone.partial import (
    PartialClone,
    PartialImpossibleError,
    RelationKey,
    spawn_for,
    spawn_partial,
)
from knockwood.clone.partial_wal import locator_of
from knockwood.errors import KnockwoodError, RefusedError, TargetUnreachableError
from knockwood.host import privileges
from knockwood.postgres.connection import connect
from knockwood.repository.backups.fetch import fetch_chain
from knockwood.repository.backups.listing import RelationMap, relation_map
from knockwood.repository.backups.partial import read_block
from knockwood.repository.inventory import segment_object
from knockwood.repository.repository import Repository

if TYPE_CHECKING:
    from fix_server import ServerFactory
    from knockwood.repository.targets import RestorePlan

_SHOP = """
create table wanted (id bigserial primary key, v text, big text);
alter table wanted alter big set storage external;
create index on wanted (v);
create table other (id bigserial primary key, v text);
create index on other (v);
create table idle (id int primary key);
insert into wanted (v, big) select 'w' || i, case when i % 50 = 0 then repeat('x', 5000) end
  from generate_series(1, 2000) i;
insert into other (v) select 'o' || i from generate_series(1, 20000) i;
insert into idle select generate_series(1, 1000);
"""

_WORK = """
update wanted set v = v || '!' where id % 10 = 0;
update other set v = v || '?' where id % 3 = 0;
delete from other where id % 7 = 0;
insert into wanted (v) select 'late' || i from generate_series(1, 100) i;
insert into other (v) select 'late' || i from generate_series(1, 5000) i;
create table fresh as select * from generate_series(1, 500) f(a);
"""


def key(name: str, database: str = "postgres") -> RelationKey:
    return RelationKey(database, "public", name)


def content(dsn: str, table: str) -> list[object]:
    return rows(dsn, f"select t::text from {table} t order by 1")


def unreadable(made: Protected, clone: PartialClone, allowed: set[str]) -> None:
    """Every relation of the users' but the allowed ones raises for whoever reads it."""
    named = rows(
        clone.dsn(),
        "select oid::regclass::text from pg_class where oid >= 16384 and relkind in ('r', 'm', 't')"
        " and relpersistence = 'p'",
    )
    others = [name for name in named if name not in allowed and not name.startswith("pg_toast")]
    assert others
    with connect(clone.dsn()) as connection:
        for name in others:
            for plan in ("on", "off"):
                connection.execute(f"set enable_seqscan = {plan}".encode())
                with pytest.raises(psycopg.Error, match="could not open file"):
                    connection.execute(f"select count(*) from {name}".encode())


def promote_by_hand(clone: PartialClone) -> None:
    one(clone.dsn(), "select pg_promote()")
    if one(clone.dsn(), "select pg_is_in_recovery()"):
        raise KnockwoodError("still in recovery")


@pytest.mark.parametrize("version", [15, pytest.param(17, marks=pytest.mark.slow), 18])
def test_one_table_is_right_and_every_other_one_raises(new_server: ServerFactory, version: int) -> None:
    server = new_server(version, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute("create database elsewhere")
        made.execute(_SHOP)
        made.execute("create table t2 (a int); insert into t2 values (1)", "elsewhere")
        made.backup()
        made.execute(_WORK)
        made.execute("checkpoint")
        made.execute("truncate idle")
        made.execute("vacuum other")
        made.execute("insert into t2 values (2)", "elsewhere")
        before = content(server.dsn(), "wanted")
        xid = made.insert(1)
        made.execute("update wanted set v = 'ruined'; update other set v = 'ruined'")
        plan = made.plan(f"before-{xid}")
        with spawn_partial(
            made.repository, plan, [key("wanted")], purpose="test", registry=made.registry
        ) as clone:
            assert content(clone.dsn(), "wanted") == before
            assert one(clone.dsn(), "select count(*) from fresh") == 500
            # A sequence is logged 32 numbers ahead.
            assert one(clone.dsn(), "select last_value from wanted_id_seq") in range(2100, 2133)
            unreadable(made, clone, {"wanted", "fresh", "idle"})
            # Truncated since: its new file comes whole from the WAL.
            assert one(clone.dsn(), "select count(*) from idle") == 0
            with pytest.raises(Exception, match="could not open file"):
                rows(clone.dsn("elsewhere"), "select * from t2")
            assert clone.wal_filter is not None
            assert clone.wal_filter.silenced > 1000
            with pytest.raises(Exception, match="never opened for writes"):
                clone.promote()
            # The server ends rather than being promoted.
            with pytest.raises((psycopg.Error, KnockwoodError)):
                promote_by_hand(clone)
        with spawn_partial(
            made.repository, plan, [key("wanted")], purpose="test", registry=made.registry
        ) as clone:
            clone.advance(made.plan("latest"))
            assert set(rows(clone.dsn(), "select v from wanted")) == {"ruined"}
            unreadable(made, clone, {"wanted", "fresh", "idle"})
        assert made.registry.records() == []


@pytest.mark.parametrize("version", [pytest.param(17, marks=pytest.mark.slow), 18])
def test_the_pieces_of_a_chain_of_backups_are_combined(new_server: ServerFactory, version: int) -> None:
    server = new_server(version, segment_megabytes=1, summarize_wal="on")
    place = server.data_directory.parent / "space"
    place.mkdir()
    privileges.give(place, server.account)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(f"create tablespace space location '{place}'")
        made.execute(_SHOP)
        made.execute(
            "create table far (a int) tablespace space; insert into far select generate_series(1, 9000)"
        )
        made.execute("create table far_other (a int) tablespace space; insert into far_other values (1)")
        full = made.backup()
        made.execute("update wanted set v = v || '+' where id < 50; delete from far where a > 4000")
        made.execute("vacuum far")
        made.execute("insert into other (v) select 'x' from generate_series(1, 3000)")
        first = made.backup(incremental=True)
        made.execute("update wanted set v = v || '-' where id > 1900; insert into far values (-1)")
        last = made.backup(incremental=True)
        made.execute(_WORK)
        keys = [key("wanted"), key("far")]
        with spawn_partial(
            made.repository,
            made.plan("latest", prefer_proved=False),
            keys,
            purpose="test",
            registry=made.registry,
        ) as clone:
            assert [link.id for link in clone.plan.chain] == [full.id, first.id, last.id]
            for table in ("wanted", "far"):
                assert content(clone.dsn(), table) == content(server.dsn(), table)
            unreadable(made, clone, {"wanted", "far", "fresh"})
            assert clone.fetched_bytes < full.stored_bytes + first.stored_bytes + last.stored_bytes
        # A single page through the chain is what PostgreSQL combines.
        path = one(server.dsn(), "select pg_relation_filepath('wanted')")
        into = made.folder / "whole"
        fetch_chain(
            made.repository, (full, first, last), into, account=server.account, programs=server.programs,
            tablespace_root=made.folder / "spaces", sync=False,
        )  # fmt: skip
        whole = (into / path).read_bytes()
        for block in range(len(whole) // 8192):
            page = read_block(made.repository, last, path, block, (full, first))
            assert page == whole[block * 8192 : (block + 1) * 8192]
        with pytest.raises(KnockwoodError, match="no block"):
            read_block(made.repository, last, path, len(whole) // 8192, (full, first))


def test_tables_that_were_rewritten_renamed_or_made_since_and_partitions(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(_SHOP)
        made.execute("create table emptied as select generate_series(1, 1000) a")
        made.execute("create table old_name as select generate_series(1, 1000) a")
        made.execute("create table parts (k int primary key, v text) partition by range (k)")
        made.execute("create table parts_1 partition of parts for values from (0) to (500)")
        made.execute("create table parts_2 partition of parts for values from (500) to (1000)")
        made.execute("insert into parts select i, 'p' || i from generate_series(0, 999) i")
        oid = one(server.dsn(), "select 'other'::regclass::oid::int")
        node = one(server.dsn(), "select pg_relation_filenode('idle')::int")
        made.backup()
        made.execute("alter table wanted alter v type varchar(100); update wanted set v = 'a' where id = 1")
        made.execute("truncate emptied; insert into emptied values (1)")
        made.execute("alter table old_name rename to new_name; insert into new_name values (-1)")
        made.execute("create table later as select generate_series(1, 100) a")
        made.execute("update parts set v = 'new' where k % 100 = 0")
        made.execute("create database copied strategy wal_log")
        made.execute("create table there as select 1 a", "copied")
        plan = made.plan("latest")
        for name in ("wanted", "emptied", "new_name", "later", "parts"):
            with spawn_for(
                made.repository, plan, [key(name)], purpose="test", registry=made.registry
            ) as clone:
                assert isinstance(clone, PartialClone), clone.whole_because
                assert content(clone.dsn(), name) == content(server.dsn(), name)
        keys = [
            RelationKey("postgres", oid=oid),
            RelationKey("postgres", filenode=node),
            key("there", "copied"),
        ]
        with spawn_partial(made.repository, plan, keys, purpose="test", registry=made.registry) as clone:
            assert content(clone.dsn(), "other") == content(server.dsn(), "other")
            assert content(clone.dsn(), "idle") == content(server.dsn(), "idle")
            assert rows(clone.dsn("copied"), "select a from there") == [1]


def test_where_it_is_not_safe_the_whole_backup_is_restored(
    new_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(_SHOP)
        made.backup()
        made.execute("update wanted set v = 'changed' where id < 10")
        plan = made.plan("latest")
        with pytest.raises(RefusedError, match="no relation is named"):
            spawn_partial(made.repository, plan, [], purpose="test", registry=made.registry)
        # A map that names another file for the table: seen on the clone, in the catalog.
        right = relation_map(made.repository, plan.backup)
        table, other = right.find("postgres", "public", "wanted"), right.find("postgres", "public", "other")
        assert table is not None
        assert other is not None
        wrong = RelationMap(
            tuple(replace(one, path=other.path) if one.oid == table.oid else one for one in right.relations)
        )
        monkeypatch.setattr("knockwood.clone.partial.relation_map", lambda *_: wrong)
        with pytest.raises(PartialImpossibleError, match="would not be whole") as told:
            spawn_partial(made.repository, plan, [key("wanted")], purpose="test", registry=made.registry)
        assert told.value.more
        with spawn_for(
            made.repository, plan, [key("wanted")], purpose="test", registry=made.registry
        ) as clone:
            assert isinstance(clone, PartialClone)
            assert content(clone.dsn(), "wanted") == content(server.dsn(), "wanted")
        monkeypatch.undo()
        made.execute("create database copied strategy file_copy")
        with spawn_for(
            made.repository, made.plan("latest"), [key("wanted")], purpose="test", registry=made.registry
        ) as clone:
            assert not isinstance(clone, PartialClone)
            assert "copies a whole database" in clone.whole_because
            assert content(clone.dsn(), "wanted") == content(server.dsn(), "wanted")
        assert made.registry.records() == []


def test_a_relation_locked_by_a_transaction_in_progress_is_readable_at_once(
    new_server: ServerFactory,
) -> None:
    server = new_server(18, segment_megabytes=1)
    identity = pyrage.x25519.Identity.generate()
    keys = {"recipients": (str(identity.to_public()),), "identities": (str(identity),)}
    with protected(server, server.data_directory.parent / "kw", **keys) as made:  # type: ignore[arg-type]
        made.execute(_SHOP)
        made.backup()
        before = content(server.dsn(), "wanted")
        with connect(server.dsn()) as connection, connection.transaction():
            connection.execute("drop table wanted")
            # Locks are told again with each snapshot of the running transactions.
            made.execute("checkpoint")
            row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
        assert row is not None
        plan = made.plan(f"before-{row[0]}")
        whole = spawn(made.repository, plan, purpose="test", registry=made.registry, free_of_locks=True)
        part = spawn_partial(made.repository, plan, [key("wanted")], purpose="test", registry=made.registry)
        for clone in (whole, part):
            with clone:
                dsn = clone.dsn() + " options='-c statement_timeout=60s'"
                assert content(dsn, "wanted") == before


_LARGE = """
create table large (id int primary key, n int not null, filler text) with (fillfactor = 90);
create index on large (n);
insert into large select i, i, repeat('x', 100) from generate_series(1, 40000) i;
"""


@pytest.mark.parametrize("version", [15, pytest.param(17, marks=pytest.mark.slow), 18])
@pytest.mark.parametrize("incremental", [False, True])
def test_some_blocks_of_a_large_table(new_server: ServerFactory, version: int, incremental: bool) -> None:
    if incremental and version < 17:
        pytest.skip("there are no incremental backups")
    summarize = {"summarize_wal": "on"} if incremental else {}
    server = new_server(version, segment_megabytes=1, **summarize)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(_LARGE)
        made.execute("vacuum large")
        made.backup()
        if incremental:
            made.execute("update large set n = n + 1 where id % 500 = 0")
            made.backup(incremental=True)
        # Rows that stay on their page, rows that go to others, new pages, pruning, and images after a checkpoint.
        for step in range(6):
            made.execute(f"update large set n = n + 1 where id % 97 = {step}")
            made.execute(f"update large set filler = repeat('y', 600) where id % 211 = {step}")
            made.execute(f"delete from large where id % 103 = {step}")
            if step % 2:
                made.execute("checkpoint")
            if step == 3:
                made.execute("vacuum large")
        made.execute("insert into large select i, i, repeat('z', 100) from generate_series(50001, 52000) i")
        pages = one(server.dsn(), "select pg_relation_size('large') / 8192")
        blocks = frozenset([3, 4, 50, 51, 333, pages - 1, *range(0, pages, 17)])
        wanted = replace(key("large"), blocks=blocks)

        before = _of_blocks(server.dsn(), sorted(blocks))
        xid = made.insert(1)
        plan = made.plan(f"before-{xid}")
        made.execute(
            "update large set n = -n, filler = 'w' where id % 50 = 0; delete from large where id % 31 = 0"
        )
        after = _of_blocks(server.dsn(), sorted(blocks))
        with spawn_partial(made.repository, plan, [wanted], purpose="test", registry=made.registry) as clone:
            place = locator_of(one(clone.dsn(), "select pg_relation_filepath('large')"))
            assert place is not None
            assert clone.held(place) == blocks
            assert clone.wal_filter is not None
            assert clone.wal_filter.pieces[place].fenced
            assert _of_blocks(clone.dsn(), sorted(blocks)) == before
            with connect(clone.dsn()) as connection:
                for setting in (
                    "enable_seqscan",
                    "enable_bitmapscan",
                    "enable_indexscan",
                    "enable_indexonlyscan",
                ):
                    connection.execute(f"set {setting} = off".encode())
                    with pytest.raises(psycopg.Error, match=r"invalid page|unexpected zero page|could not"):
                        connection.execute("select count(*), max(filler) from large where n > 0")
            clone.advance(made.plan("latest"))
            assert _of_blocks(clone.dsn(), sorted(blocks)) == after
        assert made.registry.records() == []


def test_where_blocks_cannot_be_cut_out_the_table_comes_whole(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(_LARGE)
        made.execute("create table small (id int primary key); insert into small values (1)")
        made.backup()
        made.execute("delete from large where id > 20000")
        made.execute("vacuum (truncate) large")
        keys = [replace(key("large"), blocks=frozenset([1])), replace(key("small"), blocks=frozenset([0]))]
        with spawn_for(
            made.repository, made.plan("latest"), keys, purpose="test", registry=made.registry
        ) as clone:
            assert isinstance(clone, PartialClone)
            assert content(clone.dsn(), "large") == content(server.dsn(), "large")
            assert rows(clone.dsn(), "select id from small") == [1]


def test_wal_that_nobody_has_read_is_read_where_nothing_comes_of_its_clone(
    new_server: ServerFactory,
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(_SHOP)
        made.backup()
        made.execute(_WORK)
        plan = made.plan("latest", unread=True)
        read = made.plan("latest")
        assert plan.unread
        assert not read.unread
        assert (plan.target_lsn, plan.last_commit) == (read.target_lsn, read.last_commit)
        assert [piece.segment for piece in plan.wal] == [piece.segment for piece in read.wal]
        options = {"purpose": "test", "registry": made.registry}
        with spawn_for(made.repository, plan, [key("wanted")], **options) as clone:
            assert isinstance(clone, PartialClone)
            assert content(clone.dsn(), "wanted") == content(server.dsn(), "wanted")
        with spawn(made.repository, plan, **options) as clone:
            assert content(clone.dsn(), "other") == content(server.dsn(), "other")
        # A record's data, which only its checksum tells: nothing but replay comes upon it.
        name = segment_object(plan.wal[len(plan.wal) // 2].segment)
        stored = made.repository.find(name)
        assert stored is not None
        damaged = bytearray(b"".join(made.repository.read(stored)))
        damaged[20 * 8192 + 4000] ^= 1
        made.repository.storage.delete(stored)
        made.repository.put(name, [bytes(damaged)])
        for make in (partial(spawn_for, relations=[key("wanted")]), spawn):
            fresh = Repository.open(made.repository.storage)
            with pytest.raises(TargetUnreachableError, match=r"cannot be reached: the WAL ends at"):
                make(fresh, plan, **options)
        assert made.registry.records() == []


def test_a_tablespace_made_since_is_refused(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(_SHOP)
        made.backup()
        made.execute("update wanted set v = 'changed' where id < 10")
        before = made.plan("latest", unread=True)
        folder = server.data_directory.parent / "elsewhere"
        folder.mkdir()
        privileges.give(folder, server.account)
        made.execute(f"create tablespace elsewhere location '{folder}'")
        made.execute("update wanted set v = 'later' where id < 10")
        options = {"purpose": "test", "registry": made.registry}
        with spawn_partial(made.repository, before, [key("wanted")], **options) as clone:
            with pytest.raises(RefusedError, match=r"tablespace \d+ was created after the backup") as told:
                clone.advance(made.plan("latest", unread=True))
            assert told.value.where == str(folder)
        assert list(folder.rglob("*/*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("version", [15, 17, 18])
def test_blocks_after_random_work_are_those_of_the_server(
    new_server: ServerFactory, version: int, seed: int
) -> None:
    chance = random.Random(seed)
    server = new_server(version, segment_megabytes=1, autovacuum="off")
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(_LARGE)
        made.execute("vacuum large")
        made.backup()
        plans: list[tuple[RestorePlan, list[object]]] = []
        blocks = frozenset(chance.sample(range(700), 60))
        for step in range(12):
            _random_work(made, chance, step)
            xid = made.insert(step)
            pages = one(server.dsn(), "select pg_relation_size('large') / 8192")
            here = sorted(block for block in blocks if block < pages)
            if chance.random() < 0.4:
                plans.append((made.plan(f"before-{xid}"), _of_blocks(server.dsn(), here)))
        plans.append((made.plan("latest"), _of_blocks(server.dsn(), sorted(blocks))))
        wanted = replace(key("large"), blocks=blocks)
        clone: PartialClone | None = None
        try:
            for plan, expected in plans:
                if clone is None:
                    clone = spawn_partial(
                        made.repository, plan, [wanted], purpose="test", registry=made.registry
                    )
                else:
                    clone.advance(plan)
                assert _of_blocks(clone.dsn(), sorted(blocks)) == expected
        finally:
            if clone is not None:
                clone.destroy()


def _random_work(made: Protected, chance: random.Random, step: int) -> None:
    """Some transactions by several sessions at once, and what a server does beside."""
    low, many = chance.randrange(1, 40000), chance.choice([1, 20, 3000])
    statements = [
        f"update large set n = n + 1 where id between {low} and {low + many}",
        f"update large set filler = repeat('q', {chance.randrange(50, 900)}) where id % 400 = {step}",
        f"delete from large where id between {low} and {low + many // 4}",
        (
            f"insert into large select i, i, repeat('z', 90) from generate_series({10**6 + step * 5000},"
            f" {10**6 + step * 5000 + many}) i"
        ),
        f"select count(*) from (select 1 from large where id between {low} and {low + 50} for share) s",
        f"begin; update large set n = -1 where id between {low} and {low + many}; rollback",
        "set enable_seqscan = off; select sum(n) from large where id % 7 = 0",
    ]
    for statement in chance.sample(statements, 4):
        made.execute(statement)
    for command in ("checkpoint", "vacuum large", "vacuum (freeze) large", "vacuum (truncate off) large"):
        if chance.random() < 0.25:
            made.execute(command)


def _of_blocks(dsn: str, blocks: list[int]) -> list[object]:
    """The rows of some blocks, asked one by one: a scan of the whole table would meet what is not there."""
    ask = "select ctid::text || t::text from large t where ctid >= '({},0)' and ctid < '({},0)'"
    with connect(dsn) as connection:
        found = [connection.execute(ask.format(b, b + 1).encode()).fetchall() for b in blocks]
    return [row[0] for some in found for row in some]
