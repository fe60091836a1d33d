"""Random transactions over the foreign schema: what a statement does is drawn, and so is how it commits."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from knockwood.postgres.connection import Connection
from round_schema import SCHEMA as S
from round_schema import Made, World
from round_types import words

Statement = Callable[["Mover"], None]


@dataclass
class Case:
    """One transaction: its number (None: nothing was written), and what it was made of."""

    xid: int | None = None
    said: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


class Mover:
    """Draws transactions and runs them over one connection in autocommit mode; `without` one kind of statement."""

    def __init__(self, connection: Connection, world: World, rng: random.Random, without: str = "") -> None:
        self._connection = connection
        self.world = world
        self.rng = rng
        self._case = Case()
        self._kinds = [each for each in _ALL if each[0] != without]

    def transaction(self, name: str, body: Statement | None = None) -> Case:
        """Run one, of the statements of `body` or of random ones.

        Random ones that fail (a taken key, say) are rolled back to a savepoint, like some others.
        """
        case = self._case = Case()
        self._plainly("begin")
        try:
            (body or Mover._body)(self)
            row = self._connection.execute("select pg_current_xact_id_if_assigned()::text::bigint").fetchone()
            case.xid = row[0] & 0xFFFF_FFFF if row and row[0] is not None else None
            # Deferred constraints speak before the commit, where that can still be undone.
            self._plainly("set constraints all immediate")
        except BaseException:
            self._plainly("rollback")
            raise
        if self.rng.random() < 0.08:
            self._plainly(f"prepare transaction '{name}'")
            self._plainly(f"commit prepared '{name}'")
            case.kinds["two-phase commit"] += 1
        else:
            self._plainly("commit")
        return case

    def _body(self) -> None:
        rng = self.rng
        few = rng.sample(self._kinds, rng.randint(1, 3))
        for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
            kind, statement = rng.choice(few)
            self._plainly("savepoint s")
            try:
                statement(self)
                self._plainly("set constraints all immediate")
                self._plainly("set constraints all deferred")
            except psycopg.Error as error:
                self._case.said.append(f"  failed: {error.diag.message_primary}")
                self._case.kinds["statement failed in a savepoint"] += 1
                self._plainly("rollback to s")
                continue
            end = rng.random()
            if end < 0.12:
                self._plainly("rollback to s")
                self._case.kinds["rolled back to a savepoint"] += 1
            else:
                self._case.kinds[kind] += 1
                if end < 0.8:
                    self._plainly("release s")

    def _plainly(self, statement: str) -> None:
        self._case.said.append(statement)
        self._connection.execute(statement.encode())

    def run(self, statement: str, values: list[Any] | None = None) -> int:
        """Execute; how many rows it was about."""
        shown = statement if not values else f"{statement} -- {[str(v)[:60] for v in values]}"
        self._case.said.append(shown[:1500])
        return self._connection.execute(statement.encode(), values).rowcount

    def count(self, kind: str) -> None:
        """Note what a statement was."""
        self._case.kinds[kind] += 1

    def one(self, statement: str) -> Any:
        row = self._connection.execute(statement.encode()).fetchone()
        return row[0] if row else None

    def copy(self, table: str, columns: list[str], rows: list[list[str | None]]) -> None:
        self._case.said.append(f"copy {table} ({', '.join(columns)}): {len(rows)} rows")
        listed = sql.SQL(", ").join(map(sql.Identifier, columns))
        target = sql.SQL("copy {} ({}) from stdin").format(sql.Identifier(*table.split(".")), listed)
        with self._connection.cursor() as cursor, cursor.copy(target) as copy:
            for row in rows:
                copy.write_row(row)

    def pick(self, table: str, most: int = 3, of: str = "id") -> str:
        """A condition that a few random rows meet."""
        salt = self.rng.getrandbits(30)
        if of != "ctid":
            count = self.rng.randint(1, most)
            return f"{of} in (select {of} from {table} order by md5({of}::text || '{salt}') limit {count})"
        # Rows without a key, or with one whose type has no equality to search by.
        return (
            f"ctid = any (array(select ctid from {table} order by md5(ctid::text || '{salt}')"
            f" limit {self.rng.randint(1, most)}))"
        )


# --- tables of many types --------------------------------------------------------------------------------


def _typed(mover: Mover) -> Made:
    # A few tables at a time, so that transactions meet the same rows.
    return mover.rng.choice(mover.world.typed)


def _some(mover: Mover, made: Made, most: int = 10) -> dict[str, str | None]:
    """New values for some columns, by name; for whole rows for most of them."""
    least = most // 2 if most >= len(made.columns) else 1
    chosen = mover.rng.sample(made.columns, mover.rng.randint(least, min(most, len(made.columns))))
    return {name: mover.world.values.taken(mover.rng, each) for name, each in chosen}


def _casts(made: Made, names: list[str]) -> list[str]:
    types = dict(made.columns)
    return [f"%s::{types[name].sql}" for name in names]


def insert_typed(mover: Mover) -> None:
    made = _typed(mover)
    for _ in range(mover.rng.randint(1, 3)):
        row = _some(mover, made, len(made.columns))
        names = list(row)
        identity = made.make in ("identity", "default")
        key = [] if identity else ["id"]
        first = [] if identity else [f"(select coalesce(max(id), 0) + 1 from {made.name})"]
        mover.run(
            f"insert into {made.name} ({', '.join(key + names)}) values ({', '.join(first + _casts(made, names))})",
            list(row.values()),
        )


def copy_typed(mover: Mover) -> None:
    made = _typed(mover)
    names = list(_some(mover, made, len(made.columns)))
    types = dict(made.columns)
    begin = mover.one(f"select coalesce(max(id), 0) + 1000 from {made.name}")
    rows: list[list[str | None]] = []
    for number in range(mover.rng.randint(1, 5)):
        values = [mover.world.values.taken(mover.rng, types[name]) for name in names]
        rows.append([str(begin + number), *values])
    mover.copy(made.name, ["id", *names], rows)


def update_typed(mover: Mover) -> None:
    made = _typed(mover)
    for _ in range(mover.rng.choice((1, 1, 2))):
        row = _some(mover, made)
        sets = ", ".join(f"{n} = {c}" for n, c in zip(row, _casts(made, list(row)), strict=True))
        mover.run(f"update {made.name} set {sets} where {mover.pick(made.name)}", list(row.values()))


def touch_typed(mover: Mover) -> None:
    """An update that changes nothing, or one row several times, also under a lock of a subtransaction."""
    made = _typed(mover)
    where = mover.pick(made.name, 1)
    if mover.rng.random() < 0.5:
        mover.run(f"select 1 from {made.name} where {where} for {mover.rng.choice(('share', 'key share'))}")
        mover.run("savepoint deeper")
    for _ in range(2):
        row = _some(mover, made, 3)
        sets = ", ".join(f"{n} = {c}" for n, c in zip(row, _casts(made, list(row)), strict=True))
        mover.run(f"update {made.name} set {sets} where {where}", list(row.values()))
    mover.run(f"update {made.name} set {made.columns[0][0]} = {made.columns[0][0]} where {where}")


def delete_typed(mover: Mover) -> None:
    made = _typed(mover)
    mover.run(f"delete from {made.name} where {mover.pick(made.name)}")


def rekey_typed(mover: Mover) -> None:
    made = _typed(mover)
    if made.make == "identity":
        return delete_typed(mover)
    if made.make == "composite" and mover.rng.random() < 0.5:
        mover.run(f"update {made.name} set sub = %s where {mover.pick(made.name, 2)}", [words(mover.rng, 9)])
        return None
    mover.run(f"update {made.name} set id = -id where {mover.pick(made.name)}")
    return None


def replace_typed(mover: Mover) -> None:
    """Rows deleted and inserted again under their key, with something changed."""
    made = _typed(mover)
    row = _some(mover, made, 4)
    names = ", ".join(name for name, _ in made.columns if name not in row)
    key = "id, sub" if made.make == "composite" else "id"
    more = f", {names}" if names else ""
    columns, casts = ", ".join(row), ", ".join(_casts(made, list(row)))
    mover.run(
        f"with gone as (delete from {made.name} where {mover.pick(made.name)} returning {key}{more})"
        f" insert into {made.name} ({key}{more}, {columns}) overriding system value"
        f" select {key}{more}, {casts} from gone",
        list(row.values()),
    )


def move_keyed(mover: Mover) -> None:
    """Keys of telling types: inserted, changed to an equal value that looks different, deleted, put back."""
    made = mover.rng.choice(mover.world.keyed)
    each = made.columns[0][1]
    for _ in range(mover.rng.randint(1, 4)):
        value = mover.world.values.taken(mover.rng, each, 0)
        what = mover.rng.random()
        other = [value, words(mover.rng), str(mover.rng.randint(0, 9))]
        if what < 0.5:
            mover.run(
                f"insert into {made.name} values (%s::{each.sql}, %s, %s::numeric) on conflict (k) do update"
                " set k = excluded.k, v = excluded.v",
                other,
            )
        elif what < 0.75:
            mover.run(
                f"update {made.name} set k = %s::{each.sql} where {mover.pick(made.name, 1, 'ctid')}", [value]
            )
        elif what < 0.85:
            mover.run(
                f"update {made.name} set n = %s::numeric where {mover.pick(made.name, 4, 'ctid')}", other[2:]
            )
        else:
            mover.run(f"delete from {made.name} where {mover.pick(made.name, 1, 'ctid')}")


def same_key(mover: Mover) -> None:
    """A key becomes another value that compares as equal to it."""
    found = {each.columns[0][1].short: each.name for each in mover.world.keyed}
    changes = {
        "numeric": "k::text || '0'" if mover.rng.random() < 0.5 else "trim_scale(k)::text",
        "float8": "(- k)::text",
        "interval": "case when k = interval '1 day' then '24:00:00' else justify_interval(k)::text end",
        "jsonb": "replace(k::text, '1.0', '1.00')",
        "bpchar": "k::text || '  '",
    }
    short = mover.rng.choice([name for name in changes if name in found])
    sql_type = "float8" if short == "float8" else short
    name = found[short]
    chosen = "k::text ~ '[.]'" if short == "numeric" else "k = '0'" if short == "float8" else "true"
    mover.run(
        f"update {name} set k = ({changes[short]})::{sql_type} where {chosen} and {mover.pick(name, 2, 'ctid')}"
    )


def sweep(world: World, groups: int) -> list[Statement]:
    """Transactions that fill every column of every table of types, then change each, then delete the rows."""
    parts = [world.typed[number::groups] for number in range(groups)]

    def over(tables: list[Made], change: Callable[[Mover, Made], None]) -> Statement:
        def body(mover: Mover) -> None:
            for made in tables:
                change(mover, made)

        return body

    return [over(part, change) for change in (_fill, _change, _empty) for part in parts]


def _full(mover: Mover, made: Made) -> dict[str, str | None]:
    return {name: mover.world.values.taken(mover.rng, each, 0) for name, each in made.columns}


def _fill(mover: Mover, made: Made) -> None:
    for number in (1, 2):
        row = _full(mover, made)
        key = [] if made.make in ("identity", "default") else [f"{-number}"]
        if key:
            # A key change may have brought a row there.
            mover.run(f"delete from {made.name} where id = {-number}")
        columns = ", ".join((["id"] if key else []) + list(row))
        values = ", ".join(key + _casts(made, list(row)))
        mover.run(f"insert into {made.name} ({columns}) values ({values})", list(row.values()))
    mover.count("every column filled")


def _change(mover: Mover, made: Made) -> None:
    row = _full(mover, made)
    sets = ", ".join(f"{n} = {c}" for n, c in zip(row, _casts(made, list(row)), strict=True))
    mover.run(f"update {made.name} set {sets}", list(row.values()))
    mover.count("every column changed")


def _empty(mover: Mover, made: Made) -> None:
    mover.run(f"delete from {made.name}")
    mover.count("every row deleted")


# --- related tables ----------------------------------------------------------------------------------------


def insert_family(mover: Mover) -> None:
    base = mover.one(f"select coalesce(max(id), 0) + 1 from {S}.parent")
    count = mover.rng.randint(1, 4)
    mover.run(
        f"insert into {S}.parent (id, k, body) select i, i * 10, md5(i::text)"
        f" from generate_series({base}, {base + count}) i"
    )
    mover.run(
        f"insert into {S}.child (p, k, body) select p.id, case when i = 1 then p.k end, to_jsonb(p)"
        f" from {S}.parent p, generate_series(1, 2) i where p.id >= {base - 2}"
    )
    mover.run(
        f"insert into {S}.grandchild select coalesce((select max(id) from {S}.grandchild), 0) + c.id, i, c.id"
        f" from {S}.child c, generate_series(1, 2) i where c.p >= {base} on conflict do nothing"
    )


def cascade(mover: Mover) -> None:
    what = mover.rng.randrange(4)
    where = mover.pick(f"{S}.parent", 2)
    if what == 0:
        mover.run(f"delete from {S}.parent where {where}")
    elif what == 1:
        mover.run(f"update {S}.parent set id = id + 100000, body = body || '!' where {where}")
    elif what == 2:
        mover.run(f"update {S}.parent set k = -k where {where}")
    else:
        mover.run(
            f"update {S}.child set p = (select min(id) from {S}.parent) where {mover.pick(f'{S}.child')}"
        )


def grow_tree(mover: Mover) -> None:
    base = mover.one(f"select coalesce(max(id), 0) + 1 from {S}.tree")
    what = mover.rng.random()
    if what < 0.5:
        mover.run(
            f"insert into {S}.tree select i, case when i > {base} then i - 1"
            f" else (select min(id) from {S}.tree) end, i / 3.0"
            f" from generate_series({base}, {base + mover.rng.randint(0, 4)}) i"
        )
    elif what < 0.75:
        mover.run(f"delete from {S}.tree where {mover.pick(f'{S}.tree', 2)}")
    else:
        mover.run(f"update {S}.tree set boss = null, v = v + 1 where {mover.pick(f'{S}.tree')}")


def swap(mover: Mover) -> None:
    base = mover.one(f"select coalesce(max(id), 0) + 1 from {S}.swapped")
    if base < 4 or mover.rng.random() < 0.3:
        mover.run(
            f"insert into {S}.swapped select i, i, nullif(i, {base}), i from generate_series({base}, {base + 3}) i"
        )
    total = f"(select max(d) + min(d) from {S}.swapped)"
    if mover.rng.random() < 0.5:
        mover.run(
            f"update {S}.swapped set d = {total} - d"
            f" where d in (select max(d) from {S}.swapped union select min(d) from {S}.swapped)"
        )
    if mover.rng.random() < 0.5:
        mover.run(f"update {S}.swapped set n = null where {mover.pick(f'{S}.swapped')}")
        mover.run(f"update {S}.swapped set n = id + 7 where n is null")
    if mover.rng.random() < 0.5:
        mover.run(f"update {S}.swapped set h = -h")
        mover.run(f"update {S}.swapped set h = (select max(-h) + min(-h) from {S}.swapped) + h")
    if mover.rng.random() < 0.3:
        mover.run(f"delete from {S}.swapped where {mover.pick(f'{S}.swapped', 2)}")


def partitions(mover: Mover) -> None:
    what = mover.rng.random()
    region = mover.rng.choice(("a", "b", "c", "it's"))
    if what < 0.4:
        mover.run(
            f"insert into {S}.part select i, %s, repeat('v', (i %% 3) * 1000), i from generate_series("
            f"(select coalesce(max(id), 0) + 1 from {S}.part), (select coalesce(max(id), 0) + 4 from {S}.part)) i",
            [region],
        )
    elif what < 0.7:
        mover.run(
            f"update {S}.part set region = %s, v = v || 'x' where {mover.pick(f'{S}.part', 4)}", [region]
        )
    elif what < 0.85:
        mover.run(f"update {S}.part set id = -id, w = 1 where {mover.pick(f'{S}.part', 2)}")
    else:
        mover.run(f"delete from {S}.part where {mover.pick(f'{S}.part', 3)}")


def loose_partitions(mover: Mover) -> None:
    """Partitions without a key; rows are told apart by their text."""
    what = mover.rng.random()
    if what < 0.5:
        rows = [
            [str(mover.rng.randint(0, 1000)), "a", mover.rng.randbytes(8).hex(), None]
            for _ in range(mover.rng.randint(1, 5))
        ]
        mover.copy(f"{S}.loose", ["id", "region", "v", "w"], rows)  # type: ignore[arg-type]
    elif what < 0.8:
        mover.run(f"update {S}.loose set id = 1000 - id where {mover.pick(f'{S}.loose', 3, 'v')}")
    else:
        mover.run(f"delete from {S}.loose where {mover.pick(f'{S}.loose', 3, 'v')}")


def reshape(mover: Mover) -> None:
    """Rows from before columns were added and dropped."""
    what = mover.rng.random()
    if what < 0.4:
        mover.run(f"insert into {S}.reshaped (id) select coalesce(max(id), 0) + 1 from {S}.reshaped")
    elif what < 0.8:
        mover.run(
            f"update {S}.reshaped set v = reverse(v), late = late + 1 where {mover.pick(f'{S}.reshaped')}"
        )
    else:
        mover.run(f"delete from {S}.reshaped where {mover.pick(f'{S}.reshaped')}")


def watch(mover: Mover) -> None:
    base = mover.one(f"select coalesce(max(id), 0) + 1 from {S}.watched")
    mover.run(
        f"insert into {S}.watched select i, %s from generate_series({base}, {base + 2}) i", [words(mover.rng)]
    )
    mover.run(f"update {S}.watched set v = %s where {mover.pick(f'{S}.watched')}", [words(mover.rng)])
    if mover.rng.random() < 0.5:
        mover.run(f"delete from {S}.watched where {mover.pick(f'{S}.watched')}")


def truncate(mover: Mover) -> None:
    table = mover.rng.choice((f"{S}.grandchild", f"{S}.tree", f"{S}.part", f"{S}.loose", _typed(mover).name))
    mover.run(f"truncate {table}")
    if "typed" not in table and mover.rng.random() < 0.5:
        {"tree": grow_tree, "part": partitions, "loose": loose_partitions}.get(
            table.split(".")[1], grow_tree
        )(mover)


EXCHANGE = "unique values exchanged"
TRIGGERS = "triggers"

_ALL: list[tuple[str, Statement]] = [
    ("insert", insert_typed),
    ("insert", insert_typed),
    ("COPY", copy_typed),
    ("update of some columns", update_typed),
    ("update of some columns", update_typed),
    ("one row several times, locked before", touch_typed),
    ("delete", delete_typed),
    ("key change", rekey_typed),
    ("deleted and inserted again", replace_typed),
    ("keys of telling types", move_keyed),
    ("keys of telling types", move_keyed),
    ("key becomes an equal one", same_key),
    ("parents with children", insert_family),
    ("cascade", cascade),
    ("self reference", grow_tree),
    (EXCHANGE, swap),
    ("partition moves", partitions),
    ("partitions without a key", loose_partitions),
    ("rows older than their columns", reshape),
    (TRIGGERS, watch),
    ("TRUNCATE", truncate),
]
