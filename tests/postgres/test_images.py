"""Before and after images of many kinds of culprits, all in one archive, each compared with what is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from fix_clones import Protected, protected
from fix_history import committed
from fix_server import ServerFactory
from knockwood.errors import RefusedError
from knockwood.history.images import row_changes, whole_clones
from knockwood.history.reading import fetch_raw
from knockwood.history.standing import Position
from knockwood.history.touched import Decoded
from knockwood.history.transaction import RowChange, Transaction
from knockwood.integrity.tables import open_pinned
from knockwood.model import Lsn
from knockwood.postgres.connection import Connection, connect

_SCHEMA = """
create table account (id int primary key, owner text, balance numeric(12, 2), note text);
insert into account select i, 'owner ' || i, i * 10, null from generate_series(1, 300) i;
create table parent (id int primary key, name text);
create table child (id int primary key, parent int references parent on delete cascade, name text);
insert into parent select i, 'p' || i from generate_series(1, 5) i;
insert into child select i, (i - 1) / 3 + 1, 'c' || i from generate_series(1, 15) i;
create table part (id int, region text, amount int, primary key (id, region)) partition by list (region);
create table part_north partition of part for values in ('north');
create table part_south partition of part for values in ('south');
insert into part select i, case when i % 2 = 0 then 'north' else 'south' end, i from generate_series(1, 10) i;
create table nokey (a int, b text);
insert into nokey select i, 'b' from generate_series(1, 4) i;
insert into nokey values (1, 'b');
create table emptied (id int primary key, v text);
insert into emptied select i, 'e' || i from generate_series(1, 20) i;
create table retyped (id int primary key, n int);
insert into retyped select i, i from generate_series(1, 10) i;
create type mood as enum ('calm', 'angry');
create table kinds (
    id bigint generated always as identity primary key, gone int, c char(5), b bool, f float8, bin bytea, j jsonb,
    arr text[], span int4range, m mood, at timestamptz, every interval,
    twice int generated always as (id::int * 2) stored
);
alter table kinds drop column gone;
insert into kinds (c, b, f, bin, j, arr, span, m, at, every)
values ('x', true, 0.1, '\\xdeadbeef',
     '{"a": 1}', '{a,null,"b c"}', '[1,5)', 'calm', '2026-01-01 12:00+02', '1 day 2 h');
create unlogged table forgotten (a int);
create table big (id int primary key, body text);
insert into big select i, repeat(md5(i::text), 2000) from generate_series(1, 3) i;
"""

Culprit = Callable[[Connection], int]


def _xid(connection: Connection) -> int:
    row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
    assert row is not None
    return int(row[0])


def _in_one(*statements: str) -> Culprit:
    def run(connection: Connection) -> int:
        with connection.transaction():
            for statement in statements:
                connection.execute(statement.encode())
            return _xid(connection)

    return run


def _two_phase(connection: Connection) -> int:
    connection.execute("begin")
    connection.execute("update account set note = 'prepared' where id = 60")
    connection.execute("savepoint a")
    connection.execute("delete from account where id = 61")
    xid = _xid(connection)
    connection.execute("prepare transaction 'odd gid; rels: base/5/1'")
    connection.execute("update account set note = 'in between' where id = 62")
    connection.execute("commit prepared 'odd gid; rels: base/5/1'")
    return xid


def _copy(connection: Connection) -> int:
    with connection.transaction():
        with connection.cursor().copy("copy account (id, owner, balance) from stdin") as sink:
            for number in range(5000, 5100):
                sink.write_row((number, "copied", number))
        connection.execute("update account set note = 'right after' where id = 5001")
        connection.execute("delete from account where id = 5002")
        return _xid(connection)


def _locked_by_another(connection: Connection) -> int:
    """The row's xmax is a multixact: somebody else holds a key share lock on it."""
    with psycopg.connect(connection.info.dsn, autocommit=True) as other:
        other.execute("begin")
        other.execute("select 1 from parent where id = 5 for key share")
        xid = _in_one("update parent set name = 'under lock' where id = 5")(connection)
        other.execute("commit")
    return xid


_SAVEPOINTS = (
    "update account set note = 'kept' where id = 1",
    "savepoint one",
    "update account set note = 'undone' where id = 2",
    "delete from account where id = 3",
    "rollback to one",
    "savepoint two",
    "insert into account values (1000, 'sub', 5)",
    "update account set note = 'twice' where id = 1",
    "release two",
)
_COME_AND_GONE = (
    "insert into account values (2000, 'short', 1)",
    "delete from account where id = 2000",
    "update account set balance = 1 where id = 10",
    "update account set balance = balance where id = 11",
    "update account set balance = 2 where id = 10",
    "delete from account where id = 12",
    "insert into account values (12, 'again', 12)",
)

CULPRITS: dict[str, Culprit] = {
    "savepoints": _in_one(*_SAVEPOINTS),
    "come and gone": _in_one(*_COME_AND_GONE),
    "locked by another": _locked_by_another,
    "cascade": _in_one("delete from parent where id = 2"),
    "move": _in_one(
        "update part set region = 'south', amount = -2 where id = 2",
        "update part set id = 400, region = 'south' where id = 4",
        "update part set region = 'south' where id = 6",
        "update part set region = 'north' where id = 6",
    ),
    "copy": _copy,
    "two-phase": _two_phase,
    "toast": _in_one(
        "update big set body = body || 'x' where id = 1",
        "update big set id = 20 where id = 2",
    ),
    "key change": _in_one("update account set id = id + 9000 where id in (100, 101)"),
    "kinds": _in_one(
        "update kinds set c = 'y', f = f * 3, j = null, arr = '{}', m = 'angry', every = '24 h'",
    ),
    "truncate": _in_one(
        "update emptied set v = 'first' where id = 1",
        "truncate emptied",
        "insert into emptied values (7, 'new')",
    ),
    "no key": _in_one("delete from nokey where a = 1", "update nokey set b = 'c' where a = 2"),
    "retype": _in_one("alter table retyped alter n type bigint, add column extra text default 'e'"),
    "drop": _in_one("update nokey set b = 'z'", "drop table nokey"),
    "new table": _in_one(
        "create table fresh as select i from generate_series(1, 3) i", "create temp table x (a int)"
    ),
    "on conflict": _in_one(
        "insert into account values (20, 'q', 1), (7777, 'q', 1) on conflict (id) do update set note = 'conflict'"
    ),
    "unlogged": _in_one("insert into forgotten values (1)", "update account set note = 'seen' where id = 30"),
}


EXPECTED: dict[str, list[tuple[Any, ...]]] = {
    "savepoints": [
        ("account", "update", ("1",), {"note": None}, {"note": "twice"}),
        (
            "account",
            "insert",
            ("1000",),
            None,
            {"id": "1000", "owner": "sub", "balance": "5.00", "note": None},
        ),
    ],
    "come and gone": [
        ("account", "update", ("10",), {"balance": "100.00"}, {"balance": "2.00"}),
        (
            *("account", "update", ("12",)),
            *({"owner": "owner 12", "balance": "120.00"}, {"owner": "again", "balance": "12.00"}),
        ),
    ],
    "locked by another": [("parent", "update", ("5",), {"name": "p5"}, {"name": "under lock"})],
    "cascade": [
        ("parent", "delete", ("2",), {"id": "2", "name": "p2"}, None),
        *(("child", "delete", (i,), {"id": i, "parent": "2", "name": f"c{i}"}, None) for i in "456"),
    ],
    "move": [
        (
            *("part_north", "update", ("2", "north")),
            *({"region": "north", "amount": "2"}, {"region": "south", "amount": "-2"}),
        ),
        (
            *("part_north", "update", ("4", "north")),
            *({"id": "4", "region": "north"}, {"id": "400", "region": "south"}),
        ),
    ],
    "two-phase": [
        ("account", "update", ("60",), {"note": None}, {"note": "prepared"}),
        (
            "account",
            "delete",
            ("61",),
            {"id": "61", "owner": "owner 61", "balance": "610.00", "note": None},
            None,
        ),
    ],
    "key change": [
        ("account", "update", ("100",), {"id": "100"}, {"id": "9100"}),
        ("account", "update", ("101",), {"id": "101"}, {"id": "9101"}),
    ],
    "no key": [
        ("nokey", "delete", (), {"a": "1", "b": "b"}, None),
        ("nokey", "delete", (), {"a": "1", "b": "b"}, None),
        ("nokey", "update", (), {"b": "b"}, {"b": "c"}),
    ],
    "drop": [],
    "unlogged": [("account", "update", ("30",), {"note": None}, {"note": "seen"})],
}

Rows = Counter[tuple[str, tuple[str | None, ...]]]


def _begin(made: Protected) -> Lsn:
    made.execute(_SCHEMA)
    return made.backup().start_lsn


def all_rows(dsn: str) -> Rows:
    """Every row of every logged table, as text."""
    found: Rows = Counter()
    with open_pinned(dsn, None) as connection:
        names = connection.execute(
            "select relname from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace"
            " and relpersistence = 'p'"
        ).fetchall()
        for (name,) in names:
            for row in fetch_raw(connection, f'select * from only public."{name}"', [], name):
                found[name, tuple(None if value is None else value.decode() for value in row)] += 1
    return found


@dataclass
class History:
    """Culprits by name, and what each took out of the tables and put into them."""

    made: Protected
    transactions: dict[str, Transaction]
    gone: dict[str, Rows]
    came: dict[str, Rows]
    good: dict[str, Transaction]


def play(made: Protected, culprits: dict[str, Culprit]) -> History:
    """Run the culprits with good work in between, on the same tables."""
    since = _begin(made)
    xids: dict[str, int] = {}
    goods: dict[str, int] = {}
    gone: dict[str, Rows] = {}
    came: dict[str, Rows] = {}
    dsn = made.server.dsn()
    with connect(dsn) as connection:
        for number, (name, culprit) in enumerate(culprits.items()):
            before = all_rows(dsn)
            xids[name] = culprit(connection)
            after = all_rows(dsn)
            gone[name], came[name] = before - after, after - before
            good = f"update account set owner = 'good {number}' where id = {200 + number}"
            goods[name] = _in_one(good)(connection)
    found = committed(made, since)
    return History(
        made,
        {name: found[xid] for name, xid in xids.items()},
        gone,
        came,
        {name: found[xid] for name, xid in goods.items()},
    )


@pytest.fixture(scope="module", params=[18, *(pytest.param(v, marks=pytest.mark.slow) for v in (15, 17))])
def history(request: pytest.FixtureRequest, new_server_of_module: ServerFactory) -> Iterator[History]:
    server = new_server_of_module(request.param, segment_megabytes=1, max_prepared_transactions="5")
    with protected(server, server.data_directory.parent / "kw") as made:
        yield play(made, CULPRITS)


@pytest.fixture(scope="module")
def position(history: History) -> Iterator[Position]:
    """One clone for all tests of the module, which go through the archive forwards."""
    with Position(whole_clones(history.made.repository, registry=history.made.registry)) as position:
        yield position
    assert history.made.registry.records() == []


def short(change: RowChange) -> tuple[Any, ...]:
    """Table, kind, key, and of the changed columns what they were and are."""

    def texts(row: Any) -> Any:
        return None if row is None else {name: row[name].text for name in change.changed if name in row}

    key = tuple(value.text for value in change.key.values())
    return change.table.name, change.kind, key, texts(change.before), texts(change.after)


def side(changes: list[RowChange], which: str) -> Rows:
    """The rows before or after of all changes."""
    rows: Rows = Counter()
    for change in changes:
        row = change.before if which == "before" else change.after
        if row is not None:
            table = change.details.get("moved_to", change.table) if which == "after" else change.table
            rows[table.name, tuple(value.text for value in row.values())] += 1
    return rows


def test_each_culprit_has_exactly_its_rows(history: History, position: Position) -> None:
    """What is read from the archive is what the tables of the live server lost and got."""
    for name in CULPRITS:
        with row_changes(history.made.repository, [history.transactions[name]], position=position) as changes:
            found = list(changes)
            assert found == list(changes)
        if name in EXPECTED:
            assert [short(change) for change in found] == EXPECTED[name], name
        gone, came = history.gone[name], history.came[name]
        if name == "two-phase":  # somebody else's commit while it was prepared
            gone = Counter({row: n for row, n in gone.items() if row[1][0] != "62"})
            came = Counter({row: n for row, n in came.items() if row[1][0] != "62"})
        if name == "drop":
            assert [(str(each.table), each.rows) for each in changes.unread] == [("public.nokey", 3)]
            assert (
                "dropped table public.nokey (owner postgres, persistence p, access method heap)"
                in changes.ddl
            )
            continue
        assert changes.complete, name
        assert side(found, "before") == gone, name
        assert side(found, "after") == came, name
        assert bool(changes.ddl) == (name in ("retype", "new table")), changes.ddl
        for change in found:
            assert change.table.database == "postgres"
            shape = changes.shape(change.table)
            assert [column.name for column in shape.columns] == list(
                (change.before or change.after or {}).keys()
            )
            assert (shape.root is not None) == change.table.name.startswith("part_")
            values = [*(change.before or {}).values(), *(change.after or {}).values()]
            assert all((value.image is None) == (value.text is None) for value in values)
        if name == "retype":
            assert changes.ddl == (
                "created column public.retyped.extra (text, default 'e'::text)",
                "changed column public.retyped.n: integer -> bigint",
            )
        if name == "kinds":
            shape = changes.shape(found[0].table)
            assert [
                (c.name, c.identity, c.generated) for c in shape.columns if c.identity or c.generated
            ] == [
                ("id", "a", ""),
                ("twice", "", "s"),
            ]
            assert found[0].before is not None
            assert found[0].before["bin"].image == b"\xde\xad\xbe\xef"
        if name == "move":
            assert {str(change.details["moved_to"]) for change in found} == {"public.part_south"}
        if name == "unlogged":
            assert "public.forgotten" in changes.notes[0]


def test_a_range_is_the_net_of_its_transactions(history: History) -> None:
    """All commits from one culprit to another as one; a clone of its own, since it begins earlier."""
    names = list(CULPRITS)
    chosen = names[: names.index("two-phase")]
    inside = [history.transactions[name] for name in chosen] + [history.good[name] for name in chosen]
    with row_changes(history.made.repository, inside, registry=history.made.registry) as changes:
        found = list(changes)
    gone: Rows = Counter()
    came: Rows = Counter()
    for number, name in enumerate(chosen):
        gone += history.gone[name]
        came += history.came[name]
        came["account", (str(200 + number), f"good {number}", f"{(200 + number) * 10}.00", None)] += 1
        gone["account", (str(200 + number), f"owner {200 + number}", f"{(200 + number) * 10}.00", None)] += 1
    common = gone & came
    assert side(found, "before") == gone - common
    assert side(found, "after") == came - common


def test_one_table_only_and_limits(history: History) -> None:
    transaction = history.transactions["cascade"]
    made = history.made
    with row_changes(
        made.repository, [transaction], table=(None, "parent"), registry=made.registry
    ) as changes:
        assert [short(change)[:3] for change in changes] == [("parent", "delete", ("2",))]
    with pytest.raises(RefusedError, match="more than 3 rows"):
        row_changes(
            made.repository, [transaction], decoded=Decoded(made.repository, 3), registry=made.registry
        )
    truncated = history.transactions["truncate"]
    with row_changes(made.repository, [truncated], whole_limit=5, registry=made.registry) as changes:
        assert list(changes) == []
        assert [(str(each.table), each.rows) for each in changes.unread] == [("public.emptied", 20)]
