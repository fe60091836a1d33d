"""Clones of some relations: right where they can be read, and impossible to read anywhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

from fix_clones import Protected, one, protected, rows
from knockwood.clone.partial import PartialClone, RelationKey, spawn_partial
from knockwood.errors import KnockwoodError
from knockwood.postgres.connection import connect

if TYPE_CHECKING:
    from fix_server import ServerFactory

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
