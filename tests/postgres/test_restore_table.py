"""One table brought back beside the live one, exactly as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fix_clones import one, protected, rows
from knockwood.errors import ObjectMissingError, RefusedError
from knockwood.operations.restore_table import restore_table
from knockwood.postgres.connection import connect
from knockwood.recover.table_definition import TableName
from knockwood.repository.targets import BeforeXid, Latest

if TYPE_CHECKING:
    from fix_server import ServerFactory

_SHOP = """
create schema "Sales";
create type "Sales".state as enum ('new', 'paid');
create domain "Sales".amount as numeric(12, 2) check (value >= 0);
create table "Sales".customer (id int primary key);
create table "Sales"."Or.ders" (
    id bigint generated always as identity primary key,
    gone text,
    customer int references "Sales".customer,
    state "Sales".state not null default 'new',
    total "Sales".amount,
    doubled numeric generated always as (total * 2) stored,
    tags text[] collate "C",
    "Odd ""name" jsonb,
    placed timestamptz,
    constraint dear check (total < 1000000),
    unique (customer, placed)
);
alter table "Sales"."Or.ders" drop column gone;
create index "lower USING it" on "Sales"."Or.ders" (lower(("Odd ""name" ->> 'x'))) where state = 'paid';
insert into "Sales".customer select generate_series(1, 10);
insert into "Sales"."Or.ders" (customer, state, total, tags, "Odd ""name", placed)
select i % 10 + 1, case when i % 3 = 0 then 'paid' else 'new' end::"Sales".state, i * 1.5,
       array['a' || i, null], jsonb_build_object('x', 'X' || i), '2026-01-01'::timestamptz + i * interval '1 s'
from generate_series(1, 2000) i;
create table "Sales".parts (k int, v text) partition by range (k);
create table "Sales".parts_1 partition of "Sales".parts for values from (0) to (100);
create table "Sales".parts_2 partition of "Sales".parts for values from (100) to (200);
create unique index on "Sales".parts (k);
insert into "Sales".parts select i, 'v' || i from generate_series(0, 199) i;
"""


@pytest.mark.parametrize("version", [15, pytest.param(17, marks=pytest.mark.slow), 18])
def test_a_ruined_table_comes_back_beside_the_live_one(new_server: ServerFactory, version: int) -> None:
    server = new_server(version, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        with connect(server.dsn()) as connection:
            connection.execute("create database shop")
        with connect(server.dsn("shop")) as connection:
            connection.execute(_SHOP.encode())
        made.backup()
        table = TableName.parse('shop.Sales."Or.ders"')
        before = rows(server.dsn("shop"), 'select o::text from "Sales"."Or.ders" o order by id')
        xid = rows(
            server.dsn("shop"),
            'with ruin as (update "Sales"."Or.ders" set total = 0 returning 1)'
            " select pg_current_xact_id()::text::bigint from ruin limit 1",
        )[0]
        with connect(server.dsn("shop")) as connection:
            connection.execute('drop table "Sales"."Or.ders"')
        made.flush()
        options = {"live_dsn": server.dsn(), "registry": made.registry}
        planned = restore_table(made.repository, BeforeXid(xid), table, **options)  # type: ignore[arg-type]
        assert not planned.applied
        assert "neither locked nor changed" in planned.steps[-1]
        assert (
            one(server.dsn("shop"), "select count(*) from pg_namespace where nspname like 'knockwood%'") == 0
        )
        done = restore_table(made.repository, BeforeXid(xid), table, apply=True, **options)  # type: ignore[arg-type]
        assert done.applied
        assert done.rows == 2000
        name = done.destination.partition(".")[2]
        back = f'knockwood_restored."{name}"'
        assert rows(server.dsn("shop"), f"select o::text from {back} o order by id") == before
        assert done.left_out == (
            "default of doubled",
            "default of state",
            'foreign key "Or.ders_customer_fkey"',
        )
        definitions = " ".join(
            rows(
                server.dsn("shop"),
                f"select pg_get_indexdef(indexrelid) from pg_index where indrelid = '{back}'::regclass",
            )
        )
        assert "lower" in definitions
        assert "WHERE" in definitions
        kinds = f"select contype::text from pg_constraint where conrelid = '{back}'::regclass order by 1"
        assert [kind for kind in rows(server.dsn("shop"), kinds) if kind != "n"] == ["c", "p", "u"]
        described = one(server.dsn("shop"), f"select obj_description('{back}'::regclass)")
        assert described.startswith("shop.Sales.Or.ders as of ")
        with pytest.raises(ObjectMissingError, match="no table"):
            restore_table(made.repository, Latest(), table, apply=True, **options)  # type: ignore[arg-type]
        with connect(server.dsn("shop")) as connection:
            connection.execute('drop schema knockwood_restored cascade; drop type "Sales".state cascade')
        made.flush()
        with pytest.raises(RefusedError, match=r'no type "Sales"\.state'):
            restore_table(made.repository, BeforeXid(xid), table, apply=True, **options)  # type: ignore[arg-type]
        assert (
            one(server.dsn("shop"), "select count(*) from pg_namespace where nspname like 'knockwood%'") == 0
        )
        assert made.registry.records() == []


def test_a_partitioned_table_and_one_into_a_file(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        with connect(server.dsn()) as connection:
            connection.execute(_SHOP.encode())
        made.backup()
        made.flush()
        parts = TableName("postgres", "Sales", "parts")
        done = restore_table(
            made.repository, Latest(), parts, live_dsn=server.dsn(), apply=True, registry=made.registry
        )
        assert done.rows == 200
        assert one(server.dsn(), f"select count(*) from {done.destination}") == 200
        file = made.folder / "orders.sql"
        orders = TableName("postgres", "Sales", "Or.ders")
        done = restore_table(made.repository, Latest(), orders, file=file, apply=True, registry=made.registry)
        assert done.rows == 2000
        assert 'COPY "Sales"."Or.ders"' in file.read_text()
        with pytest.raises(RefusedError, match="exists already"):
            restore_table(made.repository, Latest(), orders, file=file, apply=True, registry=made.registry)
        with pytest.raises(RefusedError, match="either"):
            restore_table(made.repository, Latest(), orders, registry=made.registry)
