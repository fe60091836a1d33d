"""A table that was dropped, truncated or ruined comes back in its place, and later good rows stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fix_clones import Protected, one, protected, rows
from knockwood.clone.partial import RelationKey, spawn_for
from knockwood.errors import RefusedError
from knockwood.model.recovery import Outcome
from knockwood.operations.restore_table_in_place import InPlace, restore_in_place, table_handler
from knockwood.postgres.connection import connect
from knockwood.recover.execute import execute, resume, roll_back, unfinished
from knockwood.recover.journal import StepJournal
from knockwood.recover.table_definition import TableName
from knockwood.recover.tables import TableHandler
from knockwood.repository.targets import BeforeXid

if TYPE_CHECKING:
    from fix_server import ServerFactory

_SHOP = """
create role clerk;
create type state as enum ('new', 'paid');
create table customer (id int primary key);
create table orders (
    id bigint generated always as identity primary key,
    gone text,
    customer int not null references customer,
    state state not null default 'new',
    total numeric(12, 2) check (total >= 0),
    doubled numeric generated always as (total * 2) stored,
    number bigserial,
    note text collate "C",
    unique (customer, number)
);
alter table orders drop column gone;
create table line (id int primary key, orders bigint references orders on delete cascade, what text);
create index on orders (lower(note)) where state = 'paid';
create table log (what text);
create function tell() returns trigger language plpgsql as
  $$ begin insert into public.log values (tg_op); return new; end $$;
create trigger tell after insert or update on orders for each row execute function tell();
alter table orders enable always trigger tell;
create policy mine on orders for select to clerk using (state = 'paid');
alter table orders enable row level security;
grant select, insert (note) on orders to clerk;
comment on table orders is 'what was sold';
comment on column orders.total is 'with tax';
create view paid as select id, total from orders where state = 'paid';
create view dear as select * from paid where total > 100;
grant select on dear to clerk;
insert into customer select generate_series(1, 10);
insert into orders (customer, state, total, note)
  select i % 10 + 1, case when i % 3 = 0 then 'paid' else 'new' end::state, i * 1.5, 'n' || i
  from generate_series(1, 500) i;
insert into line select i, i, 'what' || i from generate_series(1, 500) i;
create table plain (a int, b text);
insert into plain select i, 'b' || i from generate_series(1, 100) i;
"""

_DEFINITION = """
select conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) || convalidated
from pg_constraint where conrelid = 'orders'::regclass or confrelid = 'orders'::regclass;
select pg_get_indexdef(indexrelid) from pg_index where indrelid = 'orders'::regclass;
select pg_get_triggerdef(oid) || tgenabled::text from pg_trigger
where tgrelid = 'orders'::regclass and not tgisinternal;
select polname || pg_get_expr(polqual, polrelid) from pg_policy where polrelid = 'orders'::regclass;
select relname || coalesce(relacl::text, '') || relowner::regrole || relrowsecurity || relkind::text
from pg_class where relname in ('orders', 'paid', 'dear', 'orders_id_seq', 'orders_number_seq');
select pg_get_viewdef(oid) from pg_class where relname in ('paid', 'dear');
select description from pg_description where objoid = 'orders'::regclass;
select attname || format_type(atttypid, atttypmod) || attidentity::text || attgenerated::text
|| coalesce(pg_get_expr(adbin, adrelid), '') || coalesce(attacl::text, '')
from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum
where attrelid = 'orders'::regclass and attnum > 0 and not attisdropped
"""

_ORDERS = TableName("postgres", "public", "orders")


@contextmanager
def shop(new_server: ServerFactory, version: int = 18) -> Iterator[Protected]:
    server = new_server(version, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(_SHOP)
        made.backup()
        made.execute("update orders set note = 'good' where id = 7")
        yield made


def definition(made: Protected) -> list[str]:
    """All that is said about the table and what depends on it."""
    queries = _DEFINITION.split(";")
    return [str(row) for query in queries for row in sorted(map(str, rows(made.server.dsn(), query)))]


def content(made: Protected, table: str = "orders") -> list[Any]:
    return rows(made.server.dsn(), f"select t::text from {table} t order by 1")


def culprit(made: Protected, sql: str) -> int:
    """Run something; the number of its transaction."""
    with connect(made.server.dsn()) as connection, connection.transaction():
        connection.execute(sql.encode())
        row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
    assert row is not None
    return int(row[0])


def bring_back(made: Protected, xid: int, table: TableName = _ORDERS, **options: Any) -> InPlace:
    made.flush()
    return restore_in_place(
        made.repository, "shop", BeforeXid(xid), table, live_dsn=made.server.dsn(),
        state=made.folder / "state", registry=made.registry, **options,
    )  # fmt: skip


@pytest.mark.parametrize("version", [15, pytest.param(17, marks=pytest.mark.slow), 18])
def test_a_dropped_table_is_there_again_with_all_that_depended_on_it(
    new_server: ServerFactory, version: int
) -> None:
    with shop(new_server, version) as made:
        before, built, logged = content(made), definition(made), content(made, "log")
        xid = culprit(made, "drop table orders cascade")
        planned = bring_back(made, xid)
        assert planned.recovery is None
        assert planned.plan.steps[0].locks == "SHARE ROW EXCLUSIVE on public.customer, public.line"
        assert planned.plan.expected_loss.nothing
        assert planned.state.views == ("public.dear", "public.paid")
        assert one(made.server.dsn(), "select to_regclass('orders') is null")
        done = bring_back(made, xid, apply=True)
        assert done.whole_because == ""
        assert done.recovery is not None
        assert [result.outcome for result in done.recovery.results] == [Outcome.DONE]
        assert content(made) == before
        assert definition(made) == built
        assert content(made, "log") == logged
        new = made.execute("insert into orders (customer, total) values (1, 1) returning id, number")[0]
        assert new[0] > 500
        assert new[1] > 500
        with pytest.raises(Exception, match="violates foreign key"):
            made.execute("insert into line values (1000, 99999, 'dangling')")
        again = bring_back(made, xid)
        assert again.refused
        assert "nothing is to be done" in again.plan.refused[0]


def test_rows_that_refer_to_nothing_leave_the_foreign_key_for_new_rows(new_server: ServerFactory) -> None:
    with shop(new_server) as made:
        xid = culprit(made, "drop table orders cascade")
        made.execute("insert into line values (1000, 99999, 'dangling')")
        done = bring_back(made, xid, apply=True)
        assert done.recovery is not None
        assert "holds for new rows only" in done.recovery.results[0].detail
        assert one(
            made.server.dsn(), "select not convalidated from pg_constraint where conname like 'line%fkey'"
        )
        xid = culprit(made, "drop table orders cascade")
        made.execute("delete from customer where id = 3")
        refused = bring_back(made, xid, apply=True)
        assert refused.recovery is not None
        assert refused.recovery.results[0].outcome is Outcome.REFUSED
        assert "refer to rows that are gone" in refused.recovery.results[0].detail
        assert one(made.server.dsn(), "select to_regclass('orders') is null")


def test_what_is_missing_comes_back_and_what_is_newer_stays(new_server: ServerFactory) -> None:
    with shop(new_server) as made:
        before, built = content(made), definition(made)
        xid = culprit(made, "truncate orders restart identity cascade")
        made.execute("alter sequence orders_number_seq restart with 100000")
        made.execute("select setval('orders_id_seq', 5000)")
        made.execute("insert into orders (customer, total, note) values (1, 5, 'later'), (2, 5, 'later')")
        later, logged = content(made), content(made, "log")
        planned = bring_back(made, xid)
        assert planned.comparison is not None
        assert (planned.comparison.missing, planned.comparison.newer, planned.comparison.changed) == (
            500,
            2,
            0,
        )
        assert content(made) == later
        done = bring_back(made, xid, apply=True)
        assert done.recovery is not None
        result = done.recovery.results[0]
        assert (result.outcome, result.values["inserted"], result.values["newer"]) == (Outcome.DONE, 500, 2)
        assert content(made) == sorted(before + later)
        assert content(made, "log") == logged
        assert definition(made) == built
        assert one(made.server.dsn(), "select last_value from orders_id_seq") == 5002
        assert one(made.server.dsn(), "select last_value from orders_number_seq") == 100001
        lines = bring_back(made, xid, TableName("postgres", "public", "line"), apply=True)
        assert lines.recovery is not None
        assert one(made.server.dsn(), "select count(*) from line") == 500


def test_rows_that_changed_since_are_asked_about(new_server: ServerFactory) -> None:
    with shop(new_server) as made:
        before = content(made)
        xid = culprit(made, "update orders set total = 0, note = 'ruined' where id <= 100")
        made.execute("delete from orders where id between 200 and 209")
        made.execute("insert into orders (customer, total, note) values (1, 5, 'later')")
        ruined = content(made)
        refused = bring_back(made, xid, apply=True)
        assert refused.refused
        assert refused.recovery is None
        assert refused.plan.refused[0].startswith("100 rows changed since: (")
        assert content(made) == ruined
        kept = bring_back(made, xid, mode="keep-current", apply=True)
        assert kept.recovery is not None
        assert kept.recovery.results[0].values["left"] == 100
        assert one(made.server.dsn(), "select count(*) from orders where note = 'ruined'") == 100
        assert one(made.server.dsn(), "select count(*) from orders") == 501
        back = bring_back(made, xid, mode="keep-restored", apply=True)
        assert back.recovery is not None
        assert back.plan.expected_loss.rows == 100
        values = back.recovery.results[0].values
        assert values["put_back"] == 100
        assert one(made.server.dsn(), f"select count(*) from {values['copy']} where note = 'ruined'") == 100
        assert [row for row in content(made) if "later" not in row] == before
        evidence = [json.loads(Path(path).read_text()) for path in back.recovery.results[0].evidence]
        assert evidence[0]["count"] == 100


def test_what_cannot_be_merged_is_refused_or_replaced(new_server: ServerFactory) -> None:
    with shop(new_server) as made:
        plain = TableName("postgres", "public", "plain")
        before = content(made, "plain")
        xid = culprit(made, "update plain set b = 'ruined'")
        made.execute("insert into plain values (1000, 'later')")
        refused = bring_back(made, xid, plain, apply=True)
        assert "cannot be told apart" in refused.plan.refused[0]
        done = bring_back(made, xid, plain, mode="replace", apply=True)
        assert done.recovery is not None
        assert content(made, "plain") == before
        copy = done.recovery.results[0].values["copy"]
        assert one(made.server.dsn(), f"select count(*) from {copy}") == 101
        assert "would lose what they refer to" in bring_back(made, xid, mode="replace").plan.refused[0]
        made.execute("alter table plain add c int")
        altered = bring_back(made, xid, plain, mode="replace")
        assert "column c is new" in altered.plan.refused[0]
        # A unique value of a lost row that a later row has.
        xid = culprit(made, "delete from orders where id = 450")
        made.execute("insert into orders (customer, number, total) select 1, 450, 1")
        taken = bring_back(made, xid, apply=True)
        assert taken.recovery is not None
        assert taken.recovery.results[0].outcome is Outcome.REFUSED
        assert "does not fit what is there now" in taken.recovery.results[0].detail
        assert one(made.server.dsn(), "select count(*) from orders") == 500


class _KilledError(Exception):
    pass


class _Killing(TableHandler):
    """Dies where a kill would leave most: its number noted and not committed, or committed and not told."""

    at = "note"

    def _transaction(self, step: Any, journal: StepJournal, *rest: Any) -> Any:
        super()._transaction(step, _Dying(journal) if self.at == "note" else journal, *rest)
        raise _KilledError


class _Dying:
    def __init__(self, journal: StepJournal) -> None:
        self._journal = journal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)

    def note(self, name: str, value: Any) -> None:
        self._journal.note(name, value)
        if name == "xid":
            raise _KilledError


def test_a_killed_run_is_resumed_or_rolled_back(new_server: ServerFactory) -> None:
    with shop(new_server) as made:
        before = content(made)
        xid = culprit(made, "truncate orders cascade")
        planned = bring_back(made, xid)
        state = made.folder / "state"
        key = RelationKey("postgres", "public", "orders")
        with spawn_for(
            made.repository, planned.restore, [key], purpose="test", registry=made.registry
        ) as clone:
            for at, outcome in (("note", Outcome.DONE), ("commit", Outcome.ALREADY_DONE)):
                made.execute("truncate orders cascade")
                handler = _Killing(made.server.dsn(), lambda step: nullcontext(clone))
                handler.at = at
                with pytest.raises(_KilledError):
                    execute(planned.plan, [handler], state, approve=planned.plan.id)
                assert (content(made) == before) is (at == "commit")
                (left,) = unfinished(state, "shop")
                whole = TableHandler(made.server.dsn(), lambda step: nullcontext(clone))
                if at == "commit":
                    taken_back = roll_back(left.folder, [whole])
                    assert taken_back.results[0].outcome is Outcome.REFUSED
                    assert content(made) == before
                    continue
                result = resume(left.folder, [whole]).results[0]
                assert result.outcome is outcome
                assert content(made) == before
        renewed = table_handler(made.repository, made.server.dsn(), registry=made.registry)
        assert renewed.kind == "restore-table"


def test_a_lock_that_is_not_had_changes_nothing(new_server: ServerFactory) -> None:
    with shop(new_server) as made:
        xid = culprit(made, "delete from line")
        line = TableName("postgres", "public", "line")
        with connect(made.server.dsn()) as busy, busy.transaction():
            busy.execute("insert into line values (5000, 1, 'open')")
            done = bring_back(made, xid, line, apply=True, lock_timeout="200ms")
        assert done.recovery is not None
        assert done.recovery.results[0].outcome is Outcome.REFUSED
        assert "not had in time" in done.recovery.results[0].detail
        with pytest.raises(RefusedError, match="not a table"):
            bring_back(made, xid, TableName("postgres", "public", "paid"))
        assert one(made.server.dsn(), "select count(*) from line") == 1
