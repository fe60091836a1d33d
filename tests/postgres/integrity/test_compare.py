"""A copy against its primary: equal under load whatever the wal_level, and one changed byte is named."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress

import psycopg
import pytest

from fix_copy import Copies, flip_byte, writers
from fix_server import ServerFactory
from knockwood.integrity.compare import compare
from knockwood.integrity.primary_state import primary_state
from knockwood.model import Verdict
from knockwood.postgres.connection import with_words
from knockwood.postgres.server import LocalServer

SCHEMA = """
create table "Odd ""name"" %s" ("Key %" int primary key, "per cent %d" text, n numeric);
create table parent (id int primary key, v int);
create table child (id bigserial primary key, p int references parent, t text, f float8, j jsonb,
    a numeric[]);
create table nothing ();
create table log (at timestamptz, what text);
create table parts (k int, v text) partition by hash (k);
create table parts_0 partition of parts for values with (modulus 2, remainder 0);
create table parts_1 partition of parts for values with (modulus 2, remainder 1);
create unlogged table outside (a int);
insert into nothing default values;
insert into "Odd ""name"" %s" select i, 'value ' || i, i / 100.0 from generate_series(1, 2000) i;
insert into parent select i, 0 from generate_series(1, 200) i;
insert into child (p, t, f, j, a)
    select i % 200 + 1, 'child ' || i, i / 7.0, jsonb_build_object('i', i), array[i]
    from generate_series(1, 3000) i;
insert into parts select i, 'part ' || i from generate_series(1, 1000) i;
"""


def churn(connection: psycopg.Connection[tuple[object, ...]], turn: int) -> None:
    """Everything that makes a row version hard to judge: locks, multixacts, subtransactions, aborts."""
    dice = random.Random(turn)
    key = dice.randint(1, 200)
    kind = turn % 8
    # What moves to another partition meanwhile cannot be updated: an application tries again.
    moved = suppress(psycopg.errors.SerializationFailure)
    with moved, connection.transaction(force_rollback=kind == 3):
        if kind in (0, 3):
            connection.execute("update parent set v = v + 1 where id = %s", [key])
        elif kind == 1:
            connection.execute("insert into child (p, t) values (%s, 'new')", [key])
        elif kind == 2:
            connection.execute("delete from child where id = (select min(id) from child where p = %s)", [key])
        elif kind == 4:
            connection.execute("select from parent where id = %s for key share", [key])
            with connection.transaction():
                connection.execute("update parent set v = v + 1 where id = %s", [key])
        elif kind == 5:
            connection.execute('update "Odd ""name"" %s" set n = n + 1 where "Key %" = ' + str(key))
        elif kind == 6:
            connection.execute("insert into log values (clock_timestamp(), repeat('x', 50))")
            with connection.transaction(force_rollback=True):
                connection.execute("insert into log values (clock_timestamp(), 'undone')")
        else:
            connection.execute("update parts set v = v || '.', k = k + 1000000 where k = %s", [key])


BOTH = pytest.mark.parametrize("primary", ["logical", "replica"], indirect=True)


@pytest.fixture
def primary(request: pytest.FixtureRequest, new_server: ServerFactory) -> LocalServer:
    return prepared(new_server, getattr(request, "param", "logical"))


def prepared(new_server: ServerFactory, level: str, major: int = 18) -> LocalServer:
    server = new_server(
        major,
        segment_megabytes=1,
        wal_level=level,
        archive_mode="on",
        max_prepared_transactions="20",
    )
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute('create database "Second ""db"""')
        connection.execute(SCHEMA.encode())
    with psycopg.connect(server.dsn('Second "db"'), autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
    return server


@pytest.fixture
def copies(primary: LocalServer) -> Iterator[Copies]:
    made = Copies(primary)
    yield made
    made.stop()


def prove_equal(server: LocalServer, copies: Copies, rounds: int) -> None:
    for _ in range(rounds):
        state = primary_state(server.dsn(), workers=2)
        copy = copies.at(state.lsn)
        result = compare(state, copy.dsn(), primary_dsn=server.dsn())
        assert [finding.summary for finding in result.findings] == []
        gaps = {(table.table, table.reason) for table in result.tables if table.verdict is not Verdict.HELD}
        assert gaps == {("public.outside", "unlogged: no physical backup holds its rows")}
        assert result.verdict is Verdict.HELD
        assert result.rows > 12_000
        copy.stop("immediate")


@BOTH
def test_no_false_difference_under_writers(primary: LocalServer, copies: Copies) -> None:
    with writers(primary.dsn(), 8, churn), writers(primary.dsn('Second "db"'), 4, churn):
        prove_equal(primary, copies, rounds=1)


@BOTH
@pytest.mark.slow
def test_no_false_difference_under_sixteen_writers(primary: LocalServer, copies: Copies) -> None:
    with writers(primary.dsn(), 16, churn):
        prove_equal(primary, copies, rounds=10)


@pytest.mark.slow
@pytest.mark.parametrize("major", [15, 17])
def test_older_versions_compare_without_difference(new_server: ServerFactory, major: int) -> None:
    server = prepared(new_server, "logical", major)
    copies = Copies(server)
    try:
        with writers(server.dsn(), 8, churn):
            states = [primary_state(server.dsn(), method=method) for method in ("versions", "exact")]
            assert [state.databases[-1].method for state in states] == ["versions", "exact"]
            for state in states:
                copy = copies.at(state.lsn)
                result = compare(state, copy.dsn(), primary_dsn=server.dsn())
                assert result.verdict is Verdict.HELD, [finding.summary for finding in result.findings]
    finally:
        copies.stop()


def damage(copy: LocalServer, table: str, needle: bytes, replacement: bytes) -> None:
    """Change bytes in the copy's file behind its back."""
    with psycopg.connect(copy.dsn(), autocommit=True) as connection:
        row = connection.execute("select pg_relation_filepath(%s::regclass)", [table]).fetchone()
        assert row is not None
    copy.stop()
    copy.settings |= {"ignore_checksum_failure": "on"}
    flip_byte(copy.data_directory / str(row[0]), needle, replacement)
    copy.start(until="standby")


def test_one_changed_byte_is_named(primary: LocalServer, copies: Copies) -> None:
    dsn = primary.dsn()
    state = primary_state(dsn)
    copy = copies.at(state.lsn)
    damage(copy, '"Odd ""name"" %s"', b"value 1234", b"value 1274")
    [finding] = compare(state, copy.dsn(), primary_dsn=dsn).findings
    assert finding.location.relation == 'public."Odd ""name"" %s"'
    assert finding.location.key == '"Key %"=1234'
    assert finding.evidence["columns"] == {'"per cent %d"': {"primary": "value 1234", "copy": "value 1274"}}
    [blind] = compare(state, copy.dsn()).findings
    assert blind.location.relation == 'public."Odd ""name"" %s"'


def test_one_changed_byte_is_named_under_writers(new_server: ServerFactory) -> None:
    server = prepared(new_server, "replica")
    copies = Copies(server)
    try:
        with writers(server.dsn(), 8, churn):
            state = primary_state(server.dsn())
            copy = copies.at(state.lsn)
            # Far from the rows that the writers change: replay would bring their pages back whole.
            damage(copy, '"Odd ""name"" %s"', b"value 1234", b"value 1274")
            [finding] = compare(state, copy.dsn(), primary_dsn=server.dsn()).findings
        assert finding.evidence["columns"] == {
            '"per cent %d"': {"primary": "value 1234", "copy": "value 1274"}
        }
    finally:
        copies.stop()


@BOTH
def test_a_lost_row_a_lost_table_and_a_sequence_behind(primary: LocalServer, copies: Copies) -> None:
    """The primary has what was committed after the copy's position: all of it is told."""
    dsn = primary.dsn()
    early = primary_state(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("insert into parent values (9999, 1)")
        connection.execute("delete from parts where k = 7")
        connection.execute("create table later (a int)")
        connection.execute("insert into child (p, t) select 1, 'late' from generate_series(1, 100)")
    late = primary_state(dsn)
    copy = copies.at(early.lsn)
    findings = compare(late, copy.dsn(), primary_dsn=dsn).findings
    told = {finding.location.relation for finding in findings}
    assert {"public.parent", "public.later", "public.child", "public.child_id_seq"} <= told
    assert told & {"public.parts_0", "public.parts_1"}
    assert "id=9999" in {finding.location.key for finding in findings}


def test_what_cannot_be_read_is_not_checked(primary: LocalServer, copies: Copies) -> None:
    with psycopg.connect(primary.dsn(), autocommit=True) as connection:
        connection.execute("create role limited login")
        connection.execute("grant select on parent to limited")
    dsn = with_words(primary.dsn(), user="limited")
    state = primary_state(dsn, databases=("postgres",))
    result = compare(state, copies.at(state.lsn).dsn(), primary_dsn=dsn)
    verdicts = {table.table: table.verdict for table in result.tables}
    assert verdicts["public.parent"] is Verdict.HELD
    assert verdicts["public.child"] is Verdict.NOT_CHECKED
    assert result.verdict is Verdict.NOT_CHECKED
    assert not result.findings
