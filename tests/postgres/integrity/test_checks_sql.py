"""The checks in SQL: each finds its damage at its place, and all are silent on a healthy, odd database."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fix_checks import found, silent, subject_of
from fix_clones import protected
from fix_copy import Copies, writers
from fix_server import ServerFactory
from fix_standby import caught_up
from knockwood.host import privileges
from knockwood.integrity.check import Invariant, Role
from knockwood.integrity.compare import compare
from knockwood.integrity.primary_state import primary_state
from knockwood.integrity.run import run_checks
from knockwood.model import Finding, Lsn, Severity, Verdict
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import connect, current_insert_lsn
from knockwood.postgres.server import LocalServer

ODD = 'Odd "db" %s'

HEALTHY = """
create schema "My ""Schema"" %d";
create domain positive as int check (value > 0) not null;
create type mood as enum ('good', 'bad');
create type pair as (a int, b text);
create table "My ""Schema"" %d"."Übel %s ""T"" x" (
    "Id %" int generated always as identity primary key, "select" text unique, d positive default 1,
    check ("select" like '%x%' or "select" is null));
insert into "My ""Schema"" %d"."Übel %s ""T"" x" ("select") values ('x'), ('yxy'), (null), (null);
create table parent (a int, b text collate "C", c int default 0, primary key (a, b));
create table simple (id serial primary key, a int, b text, foreign key (a, b) references parent);
create table complete (a int, b text, foreign key (a, b) references parent match full);
insert into parent values (1, 'one'), (2, 'two');
insert into simple (a, b) values (1, 'one'), (2, null), (null, 'gone'), (null, null);
insert into complete values (2, 'two'), (null, null);
create table parted (k int primary key, p bigserial) partition by range (k);
create table parted_1 partition of parted for values from (0) to (100);
create table parted_2 partition of parted for values from (100) to (200);
insert into parted (k) select generate_series(0, 199);
create table refers (k int references parted);
insert into refers values (5), (150), (null);
create table booking (room int, during tsrange, exclude using gist (during with &&));
insert into booking values (1, '[2026-01-01, 2026-01-02)'), (1, '[2026-01-02, 2026-01-03)');
create table falls (id int primary key);
create sequence down increment -1 owned by falls.id;
alter table falls alter id set default nextval('down');
insert into falls select nextval('down') from generate_series(1, 5);
create sequence blocks increment 50;
create table hilo (id int primary key default nextval('blocks'));
insert into hilo select generate_series(1, 30);
select nextval('blocks');
create table base (id int primary key, v int check (v < 10));
create table derived (w int) inherits (base);
insert into base values (1, 1);
insert into derived values (1, 2, 3);
create unlogged table fast (id serial primary key, r int references base);
create table everything (
    id int primary key, a bool, b bytea, c "char", e name, f int8, g int2, h oid, i json, j jsonb, k xml_or_text,
    l point, m line, n lseg, o box, p path, q polygon, r circle, s float4, t float8, u money, v macaddr,
    w macaddr8, x inet, y cidr, z bpchar, aa char(5), ab varchar(5), ac date, ad time, ae timetz,
    af timestamp, ag timestamptz, ah interval, ai numeric, aj bit(3), ak varbit, al uuid, am tsvector,
    an tsquery, ao jsonpath, ap int4range, aq nummultirange, ar mood, at pair, au pair[], av mood[], aw int[],
    ax text[], ay xid, az cid, ba tid, bb pg_lsn, bc regclass, bd pg_snapshot, be xid8, bf aclitem, bg positive);
insert into everything (id, bg) values (0, 1);
insert into everything values (
    1, true, 'a', 'c', 'n', 1, 2, 3, '{"a": 1}', '{"b": 1.00}', 'x', '(1,2)', '{1,2,3}', '[(0,0),(1,1)]',
    '((0,0),(1,1))', '((0,0),(1,1))', '((0,0),(1,1))', '<(0,0),1>', 1.5, '-0', 12.5, '08:00:2b:01:02:03',
    '08:00:2b:01:02:03:04:05', '10.0.0.1', '10.0.0.0/8', 'b ', 'ab', 'abc', 'infinity', '04:05',
    '04:05+02', '-infinity', 'infinity', '1 day 24:00', 'NaN', '101', '1011', gen_random_uuid(),
    'a b', 'a & b', '$.a', '[1,5)', '{[1.0,2.00)}', 'good', '(1,x)', '{"(1,y)"}', '{good,bad}',
    '{{1,2},{3,4}}', '{null,"a"}', '7', '8', '(1,2)', '0/3000028', 'pg_class', '10:20:10,14', '5',
    'postgres=r/postgres', 9);
"""

LIGHT = (
    "sequences",
    "constraints",
    "invalid_indexes",
    "collations",
    "invariants",
    "wraparound",
)
HEAVY = ("foreign_keys", "row_constraints", "unique_keys")


def make_odd(server: LocalServer) -> None:
    execute(server, 'create database "Odd ""db"" %s"', "postgres")
    execute(server, "create domain xml_or_text as text")
    execute(server, HEALTHY)


def execute(server: LocalServer, sql: str, database: str = ODD) -> None:
    with psycopg.connect(server.dsn(database), autocommit=True) as connection:
        connection.execute(sql.encode())


@pytest.fixture(scope="module")
def shared(
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
) -> Iterator[LocalServer]:
    """One server for the tests that change nothing outside their database."""
    account = privileges.server_account()
    folder = shared_folder / "checks-sql"
    folder.mkdir()
    privileges.give(folder, account)
    shutil.copytree(templates(18, 16), folder / "data", symlinks=True)
    privileges.give_tree(folder / "data", account)
    server = LocalServer(
        installations[18], folder / "data", account=account, settings={"fsync": "off", "autovacuum": "off"}
    )
    with server:
        make_odd(server)
        execute(server, 'alter database "Odd ""db"" %s" rename to healthy', "postgres")
        execute(server, "alter database healthy allow_connections false", "postgres")
        yield server
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def server(shared: LocalServer) -> Iterator[LocalServer]:
    """The shared server with a healthy database of the test's own."""
    execute(shared, 'create database "Odd ""db"" %s" template healthy', "postgres")
    yield shared
    execute(shared, 'drop database "Odd ""db"" %s" with (force)', "postgres")


@pytest.fixture
def alone(new_server: ServerFactory) -> LocalServer:
    """A server of the test's own."""
    server = new_server(18)
    make_odd(server)
    return server


@pytest.mark.parametrize(
    "major", [pytest.param(15, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow), 18]
)
def test_all_are_silent_on_a_healthy_database(new_server: ServerFactory, major: int) -> None:
    server = new_server(major)
    make_odd(server)
    rules = (Invariant("ids", "select * from parent where a < 0", ODD),)
    silent(server, *LIGHT, *HEAVY, invariants=rules)


def test_all_are_silent_under_writers(server: LocalServer) -> None:
    def work(connection: psycopg.Connection[tuple[object, ...]], turn: int) -> None:
        with connection.transaction():
            connection.execute("insert into parent values (%s, 'w')", [turn + 10])
            connection.execute("insert into simple (a, b) values (%s, 'w')", [turn + 10])
        if turn % 3 == 0:
            with connection.transaction():
                connection.execute("delete from simple where a = %s", [turn + 10])
                connection.execute("delete from parent where a = %s", [turn + 10])

    with writers(server.dsn(ODD), 8, work):
        for _ in range(3):
            silent(server, "sequences", "foreign_keys", "unique_keys", "row_constraints", "constraints")


def test_all_are_silent_on_a_clone(new_server: ServerFactory) -> None:
    """A paused standby: unlogged tables cannot be read there, and nothing can be written."""
    server = new_server(18, archive_mode="on", segment_megabytes=1)
    make_odd(server)
    copies = Copies(server)
    try:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
        assert row is not None
        clone = copies.at(Lsn.parse(row[0]))
        about_data = [name for name in (*LIGHT, *HEAVY) if name != "invalid_indexes"]
        silent(clone, *about_data, role=Role.CLONE)
        about_the_server = ["configuration", "invalid_indexes", "wal_archive", "proof_age"]
        report = run_checks(subject_of(clone, role=Role.CLONE), about_the_server)
        assert [result.verdict for result in report.results] == [Verdict.NOT_CHECKED] * 4
        state = primary_state(server.dsn())
        result = compare(state, copies.at(state.lsn).dsn(), primary_dsn=server.dsn())
        assert [finding.summary for finding in result.findings] == []
        assert [t.table for t in result.tables if t.verdict is not Verdict.HELD] == ["public.fast"]
        hidden = primary_state(server.dsn(), method="versions")
        assert compare(hidden, copies.at(hidden.lsn).dsn()).verdict is Verdict.HELD
    finally:
        copies.stop()


def one(server: LocalServer, name: str, **more: Any) -> Finding:
    [finding] = found(server, name, **more)
    return finding


def test_sequences_behind_their_columns_are_found(server: LocalServer) -> None:
    execute(server, "insert into simple (id, a, b) values (99, null, null)")
    finding = one(server, "sequences")
    assert (finding.location.database, finding.location.relation) == (ODD, "public.simple")
    assert finding.location.key == "id=99"
    execute(server, "select setval('simple_id_seq', 99); insert into falls values (-40)")
    assert one(server, "sequences").location.relation == "public.falls"


def test_orphans_are_found_in_every_kind_of_foreign_key(server: LocalServer) -> None:
    off = "set session_replication_role = replica; "
    execute(server, off + "insert into simple (a, b) values (7, 'orphan')")
    finding = one(server, "foreign_keys")
    assert finding.location.relation == "public.simple"
    assert finding.location.key == "(a, b)=(7, orphan)"
    execute(server, off + "delete from simple where a = 7; insert into complete values (null, 'half')")
    assert one(server, "foreign_keys").location.relation == "public.complete"
    execute(server, off + "truncate complete; delete from parted where k = 150")
    assert one(server, "foreign_keys").location.key == "(k)=(150)"


def test_temporal_foreign_keys_need_the_whole_period(server: LocalServer) -> None:
    execute(
        server,
        """create table stay (room int4range, during tsrange, primary key (room, during without overlaps));
        create table visit (room int4range, during tsrange,
            foreign key (room, period during) references stay (room, period during));
        insert into stay values ('[1,2)', '[2026-01-01,2026-01-05)'), ('[1,2)', '[2026-01-05,2026-01-09)');
        insert into visit values ('[1,2)', '[2026-01-02,2026-01-08)');""",
    )
    silent(server, "foreign_keys", "unique_keys")
    execute(
        server, "set session_replication_role = replica; delete from stay where upper(during) = '2026-01-09'"
    )
    assert one(server, "foreign_keys").location.relation == "public.visit"


@pytest.mark.parametrize(
    ("damage", "severity", "words"),
    [
        ("alter table simple disable trigger all", Severity.CRITICAL, "does not fire"),
        ("alter table simple add constraint c check (a < 5) not valid", Severity.HIGH, "NOT VALID"),
        ("alter table base add constraint c check (v < 5) not enforced", Severity.HIGH, "NOT ENFORCED"),
        ("create policy p on base using (true)", Severity.MEDIUM, "row security"),
        ("alter role postgres set session_replication_role = replica", Severity.CRITICAL, "role postgres"),
    ],
)
def test_what_is_switched_off_is_found(
    server: LocalServer, damage: str, severity: Severity, words: str
) -> None:
    execute(server, damage)
    try:
        findings = found(server, "constraints")
    finally:
        execute(server, "alter role postgres reset all")
    assert {finding.severity for finding in findings} == {severity}
    assert all(words in finding.summary for finding in findings)


def test_rows_that_break_their_own_rules_are_found(server: LocalServer) -> None:
    execute(
        server,
        """set allow_system_table_mods = on;
        update pg_constraint set conbin = null, contype = 'x' where false;
        alter table base drop constraint base_v_check;
        update only base set v = 50;
        alter table base add constraint late check (v < 10) not valid;
        update pg_constraint set convalidated = true where conname = 'late';
        alter table parent alter c drop not null;
        insert into parent values (3, 'three', null);
        update pg_attribute set attnotnull = true where attrelid = 'parent'::regclass and attname = 'c';
        alter domain positive drop constraint positive_check;
        update everything set bg = -1 where id = 1;
        alter domain positive add constraint late_domain check (value > 0) not valid;
        update pg_constraint set convalidated = true where conname = 'late_domain';""",
    )
    findings = found(server, "row_constraints")
    kinds = {(f.location.relation, f.evidence["kind"]) for f in findings}
    assert kinds == {("public.base", "check"), ("public.parent", "not_null"), ("public.everything", "domain")}


def test_duplicate_keys_are_found_without_the_index(server: LocalServer) -> None:
    execute(
        server,
        """set allow_system_table_mods = on;
        update pg_index set indisready = false, indisunique = false where indexrelid = 'parted_1_pkey'::regclass;
        insert into parted_1 (k, p) values (5, 500);
        update pg_index set indisready = true, indisunique = true where indexrelid = 'parted_1_pkey'::regclass;""",
    )
    finding = one(server, "unique_keys")
    assert (finding.location.relation, finding.location.index) == ("public.parted_1", "public.parted_1_pkey")
    assert finding.location.key == "(k)=(5)"
    assert len(finding.evidence["examples"][0]["ctids"]) == 2


def test_exclusion_constraints_are_checked_pair_by_pair(server: LocalServer) -> None:
    execute(
        server,
        """set allow_system_table_mods = on;
        update pg_index set indisready = false where indrelid = 'booking'::regclass;
        insert into booking values (2, '[2026-01-01 12:00, 2026-01-01 13:00)');
        update pg_index set indisready = true where indrelid = 'booking'::regclass;""",
    )
    assert one(server, "unique_keys").location.relation == "public.booking"


def test_invalid_indexes_are_found(server: LocalServer) -> None:
    with psycopg.connect(server.dsn(ODD), autocommit=True) as connection:
        connection.execute("insert into refers values (5)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            connection.execute('create unique index concurrently "Bad %s" on refers (k)')
    finding = one(server, "invalid_indexes")
    assert finding.location.index == 'public."Bad %s"'
    assert finding.evidence["indisunique"]


def test_changed_collation_versions_are_found(alone: LocalServer) -> None:
    execute(alone, "update pg_database set datcollversion = '0.9' where datname = 'postgres'", "postgres")
    finding = one(alone, "collations")
    assert finding.location.database == "postgres"
    assert finding.evidence["recorded"] == "0.9"


INVARIANTS = (
    Invariant("no twos", "select a, b, 100 %% 7 from parent where b like 't%'; -- comment", ODD),
    Invariant("wrong", "select nothing from nowhere", ODD),
    Invariant("sly", "select 1; drop table parent", ODD),
    Invariant("writes", "delete from parent returning 1", ODD),
    Invariant("slow", "select pg_sleep(60)", ODD),
    Invariant("no database", "select 1", "gone"),
    Invariant("holds", "select 1 where false", ODD, Severity.CRITICAL),
    Invariant("odd values", "select 'infinity'::date as d, null::int as n", ODD, Severity.CRITICAL),
)


def test_invariants_answer_each_for_itself(server: LocalServer) -> None:
    subject = subject_of(server, invariants=INVARIANTS)
    subject = replace(subject, budget=replace(subject.budget, statement_timeout=subject.budget.lock_timeout))
    report = run_checks(subject, ["invariants"])
    broken = {finding.evidence["invariant"]: finding for finding in report.findings}
    assert set(broken) == {"odd values"}
    assert broken["odd values"].evidence["examples"] == [{"d": "infinity", "n": None}]
    assert broken["odd values"].severity is Severity.CRITICAL
    reasons = " ".join(gap.reason for gap in report.not_checked)
    for name in ("wrong", "sly", "writes", "slow", "no database"):
        assert f'"{name}"' in reasons
    execute(server, "select count(*) from parent")


def test_an_unreadable_database_is_not_checked(alone: LocalServer) -> None:
    execute(alone, "create role limited login; revoke connect on database postgres from public", "postgres")
    subject = replace(subject_of(alone), dsn=alone.dsn(ODD, user="limited"))
    [result] = run_checks(subject, ["sequences"]).results
    assert result.verdict is Verdict.NOT_CHECKED
    assert any("postgres" in gap.reason for gap in result.not_checked)


def test_rows_hidden_by_row_security_are_not_called_healthy(alone: LocalServer) -> None:
    execute(
        alone,
        """create role limited login; grant usage on schema public to limited;
        grant select on all tables in schema public to limited;
        alter table simple enable row level security""",
    )
    subject = replace(subject_of(alone), dsn=alone.dsn(ODD, user="limited"))
    [result] = run_checks(subject, ["foreign_keys"]).results
    assert any("simple" in gap.reason for gap in result.not_checked)


@pytest.fixture
def careful(new_server: ServerFactory) -> LocalServer:
    return new_server(
        18, fsync="on", autovacuum="on", archive_mode="on", archive_command="test ! -f x && cp %p x"
    )


def test_a_careful_configuration_is_silent(careful: LocalServer) -> None:
    silent(careful, "configuration")


def test_dangerous_settings_are_found(new_server: ServerFactory) -> None:
    server = new_server(18, full_page_writes="off", track_counts="off")
    execute(server, "alter database postgres set zero_damaged_pages = on", "postgres")
    execute(server, "create table p (a int); create publication x for table p", "postgres")
    keys = {finding.location.key for finding in found(server, "configuration")}
    assert keys >= {"fsync", "full_page_writes", "track_counts", "autovacuum", "zero_damaged_pages"}
    assert keys >= {"no_archiving", "published_without_identity"}


def test_a_standby_that_may_drop_wal_when_it_is_promoted_is_found(
    new_server: ServerFactory, standby_of: Callable[[LocalServer], LocalServer], shared_folder: Path
) -> None:
    def told(server: LocalServer) -> bool:
        keys = {finding.location.key for finding in found(server, "configuration")}
        return "no_wal_kept_for_a_promotion" in keys

    server = new_server(18, segment_megabytes=1, full_page_writes="off")
    with protected(server, shared_folder / "kept-wal"):
        assert not told(server)  # a receiver alone
    standby = standby_of(server)
    with connect(server.dsn()) as connection:
        caught_up(standby, current_insert_lsn(connection))
    assert told(server)
    execute(server, "alter system set wal_keep_size = '64MB'", "postgres")
    execute(server, "select pg_reload_conf()", "postgres")
    assert not told(server)


def test_wal_archive_without_repository_still_looks_at_the_server(new_server: ServerFactory) -> None:
    server = new_server(18, archive_mode="on", archive_command="cp %p /nowhere/%f || true")
    report = run_checks(subject_of(server), ["wal_archive"])
    [finding] = report.findings
    assert finding.severity is Severity.CRITICAL
    assert "always succeeds" in finding.summary
    assert [gap.reason for gap in report.not_checked] == ["no repository is set for this cluster"]
