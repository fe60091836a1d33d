"""Names for files: of every relation, and as fast where there are tens of thousands of them."""

from __future__ import annotations

from fix_server import ServerFactory
from knockwood.integrity import catalog
from knockwood.postgres.connection import connect


def test_each_relation_with_its_table(new_server: ServerFactory) -> None:
    with connect(new_server(18).dsn()) as connection:
        connection.execute('create schema "My"; create table "My".t (id int primary key, body text)')
        connection.execute('create view "My".v as select 1; create sequence "My".s')
        found = {each.name: each for each in catalog.relations(connection, "postgres")}
        [(table, toast)] = connection.execute(
            "select oid::int8, reltoastrelid::regclass::text from pg_class where relname = 't'"
        ).fetchall()
        assert (found['"My".t'].oid, found['"My".t'].owner) == (table, None)
        assert (found['"My".t_pkey'].kind, found['"My".t_pkey'].owner) == ("i", '"My".t')
        assert (found[toast].kind, found[toast].owner) == ("t", '"My".t')
        assert found[f"{toast}_index"].owner == toast
        assert found['"My".s'].kind == "S"
        assert '"My".v' not in found
        assert found["pg_catalog.pg_database"].shared
        paths = connection.execute(
            "select pg_relation_filepath(oid) from pg_class where relkind in ('r', 'i', 't', 'm', 'S')"
        ).fetchall()
        assert {each.path for each in found.values()} == {path for (path,) in paths}


def test_no_relation_is_looked_for_once_for_each_other(new_server: ServerFactory) -> None:
    """A subquery for each row took minutes for ten thousand tables: pg_class has no index on reltoastrelid."""
    with connect(new_server(18).dsn()) as connection:
        plan = connection.execute(f"explain {catalog._RELATIONS}".encode()).fetchall()
    assert not [line for (line,) in plan if "SubPlan" in line]
