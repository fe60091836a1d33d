"""Rows of a table as of a point merged into the table that is there: one transaction, verified before its commit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from knockwood.errors import ObjectDamagedError, RefusedError
from knockwood.host import clock
from knockwood.postgres.connection import Connection, translated
from knockwood.postgres.copying import copy_rows
from knockwood.recover.table_definition import TableName
from knockwood.recover.tables_facts import Shape, ask, count, qualified, shape

REPLACED: Final = "knockwood_replaced"
_STAGE = "pg_temp.knockwood_stage"
_NAME_BYTES = 63
_EXAMPLES = 20


@dataclass(slots=True)
class Merged:
    """What a transaction that is about to commit did. `copy` is where the rows of before lie, if any were replaced."""

    rows: int = 0
    inserted: int = 0
    put_back: int = 0
    left: int = 0
    newer: int = 0
    copy: str = ""
    locked_at: float = 0.0
    notes: list[str] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "inserted": self.inserted,
            "put_back": self.put_back,
            "left": self.left,
            "newer": self.newer,
            "copy": self.copy,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Merge:
    """One merge: `then` is the table's shape on the clone (`source`), `mode` one of plan.table.MODES."""

    source: Connection
    live: Connection
    table: TableName
    then: Shape
    mode: str
    keep: Callable[[str, bytes], object]
    """Keeps evidence: a name and its content."""

    def run(self) -> Merged:
        """Do it within the caller's transaction on `live`; raises RefusedError where it would not be safe."""
        done = Merged()
        self._stage()
        done.locked_at = clock.monotonic()
        now = self._lock()
        self._triggers(now, enable=False)
        before = count(self.live, now.source)
        if self.mode == "replace":
            self._replace(now, done)
        else:
            self._conflicts(now, done)
            done.put_back = self._put_back(now, done) if self.mode == "keep-restored" else 0
            done.inserted = self._insert_missing(now)
        self._run("set constraints all immediate")
        self._verify(now, before, done)
        raise_sequences(self.source, self.live, self.then.oid, now.oid)
        self._triggers(now, enable=True)
        return done

    def _run(self, statement: str) -> int:
        return self.live.execute(statement.encode()).rowcount

    def _one(self, query: str) -> Any:
        row = self.live.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]

    def _stage(self) -> None:
        """The rows as of then, in a table of this session that goes with its transaction. Locks nothing."""
        columns = ", ".join(f"{name} {kind}" for name, kind, generated in self.then.columns if not generated)
        self._run(f"create temporary table knockwood_stage ({columns}) on commit drop")
        copy_rows(self.source, self.live, self.then.source, _STAGE, ", ".join(self.then.stored))
        if self.then.key and self.mode != "replace":
            self._run(f"create unique index on {_STAGE} ({', '.join(self.then.key)})")
        self._run(f"analyze {_STAGE}")
        expected = row_hash(self.source, self.then, self.then.source)
        arrived = row_hash(self.live, self.then, _STAGE)
        if arrived != expected:
            raise ObjectDamagedError(
                f"{arrived[0]} rows arrived of {expected[0]}, or not as they were; nothing was changed"
            )

    def _lock(self) -> Shape:
        """Lock out writers (readers go on), and look again at what the plan saw."""
        name = qualified(self.live, self.table.schema, self.table.table)[0]
        if shape(self.live, self.table) is None:
            raise RefusedError(f"there is no table {self.table} any more")
        self._run(f"lock table {name} in share row exclusive mode")
        now = shape(self.live, self.table)
        if now is None or (now.columns, now.rules) != (self.then.columns, False):
            raise RefusedError(f"{self.table} is not built as it was planned for any more")
        if self.mode != "replace" and (not now.key or now.key != self.then.key):
            raise RefusedError(f"the key of {self.table} is not what it was")
        return now

    def _triggers(self, now: Shape, *, enable: bool) -> None:
        """Hold the table's own triggers back: what they did then is in the rows. Foreign keys stay checked."""
        how = {"O": "enable", "R": "enable replica", "A": "enable always"}
        for name, enabled in now.triggers:
            self._run(f"alter table {now.name} {how[enabled] if enable else 'disable'} trigger {name}")

    # --- by key -----------------------------------------------------------------------------------

    def _joined(self, now: Shape) -> str:
        return " and ".join(f"t.{name} = s.{name}" for name in now.key)

    def _differs(self, now: Shape) -> str:
        # Between row constructors the operator *<> would be looked for column by column.
        return f"pg_catalog.record_image_ne({now.row('t.')}, {now.row('s.')})"

    def _conflicts(self, now: Shape, done: Merged) -> None:
        """Refuse, or say what is left, where rows of then have changed."""
        found = f"from {_STAGE} s join {now.source} t on {self._joined(now)} where {self._differs(now)}"
        changed = int(self._one(f"select pg_catalog.count(*) {found}"))
        if not changed:
            return
        key = "row(" + ", ".join(f"s.{name}" for name in now.key) + ")::text"
        rows = self.live.execute(f"select {key} {found} limit {_EXAMPLES}".encode()).fetchall()
        keys = [str(row[0]) for row in rows]
        if self.mode == "refuse":
            raise RefusedError(
                f"{changed} rows have changed since: {', '.join(keys)}",
                where=str(self.table),
                hint="--keep-current leaves them as they are, --keep-restored puts them back",
            )
        self.keep("changed-rows.json", json.dumps({"count": changed, "keys": keys}).encode())
        if self.mode == "keep-current":
            done.left = changed
            done.notes.append(f"{changed} rows that changed since were left as they are: {', '.join(keys)}")

    def _put_back(self, now: Shape, done: Merged) -> int:
        """Copy the changed rows away, then make them what they were."""
        others = [name for name in now.stored if name not in now.key]
        if not others:
            return 0
        done.copy = self._copy_away(
            f"select t.* from {now.source} t join {_STAGE} s on {self._joined(now)} where {self._differs(now)}"
        )
        changes = ", ".join(f"{name} = s.{name}" for name in others)
        return self._run(
            f"update {now.source} t set {changes} from {_STAGE} s"
            f" where {self._joined(now)} and {self._differs(now)}"
        )

    def _insert_missing(self, now: Shape) -> int:
        columns = ", ".join(now.stored)
        return self._run(
            f"insert into {now.name} ({columns}) overriding system value select {columns} from {_STAGE} s"
            f" where not exists (select from {now.source} t where {self._joined(now)})"
        )

    def _replace(self, now: Shape, done: Merged) -> None:
        """All rows out, with a copy, and those of then in; only where nothing refers to them."""
        if ask(self.live, "referring", oid=now.oid):
            raise RefusedError(f"foreign keys refer to {self.table} now")
        done.copy = self._copy_away(f"select * from {now.source}")
        self._run(f"delete from {now.source}")
        columns = ", ".join(now.stored)
        done.inserted = self._run(
            f"insert into {now.name} ({columns}) overriding system value select {columns} from {_STAGE}"
        )

    def _copy_away(self, query: str) -> str:
        """Keep rows in a table of their own, which nobody but this role may read."""
        ending = f"_{clock.stamp(clock.now()).lower()}"
        start = self.table.table.encode()[: _NAME_BYTES - len(ending)].decode(errors="ignore")
        name = qualified(self.live, REPLACED, start + ending)[0]
        self._run(f"create schema if not exists {REPLACED}")
        self._run(f"create table {name} as {query}")
        return name

    def _verify(self, now: Shape, before: int, done: Merged) -> None:
        """Every row of then is there, byte for byte, but those left on purpose; no other row came or went."""
        expected = before + done.inserted if self.mode != "replace" else done.inserted
        rows = count(self.live, now.source)
        if self.mode == "replace":
            wrong = 0 if row_hash(self.live, now, now.source) == row_hash(self.live, now, _STAGE) else 1
        else:
            wrong = int(
                self._one(
                    f"select pg_catalog.count(*) from {_STAGE} s where not exists (select from {now.source} t"
                    f" where {self._joined(now)} and not ({self._differs(now)}))"
                )
            )
        if rows != expected or wrong != done.left:
            raise ObjectDamagedError(
                f"after the merge there are {rows} rows ({expected} expected) and {wrong} of then are not there"
                f" ({done.left} expected); nothing was kept",
                where=str(self.table),
            )
        done.rows = rows
        done.newer = rows - count(self.live, _STAGE)


def row_hash(connection: Connection, table: Shape, source: str) -> tuple[int, int]:
    """Count and sum of one 64-bit hash per row, whatever their order; the session must be pinned."""
    with translated():
        row: Any = connection.execute(
            "select pg_catalog.count(*), coalesce(pg_catalog.sum(pg_catalog.hashtextextended("
            f"{table.row()}::text, 0)), 0) from {source}".encode()
        ).fetchone()
    return int(row[0]), int(row[1])


def raise_sequences(source: Connection, live: Connection, then: int, now: int) -> None:
    """Move a table's own sequences on to where they stood then; never back."""
    for schema, name in ask(source, "sequences", oids=[then]):
        target = qualified(source, schema, name)[0]
        if not qualified(live, schema, name)[1] or (schema, name) not in ask(live, "sequences", oids=[now]):
            continue
        stood, called, step, size = _position(source, target)
        if not _behind(live, target, stood, step):
            continue
        # Any ALTER SEQUENCE holds up nextval until the commit: without it a number drawn meanwhile would be
        # handed out again.
        live.execute(f"alter sequence {target} cache {size}".encode())
        if _behind(live, target, stood, step):
            live.execute("select pg_catalog.setval(%s::regclass, %s, %s)", [target, stood, called])


def _position(connection: Connection, name: str) -> tuple[int, bool, int, int]:
    row: Any = connection.execute(
        f"select q.last_value, q.is_called, s.seqincrement, s.seqcache from {name} q,"
        " pg_catalog.pg_sequence s where s.seqrelid = %s::regclass".encode(),
        [name],
    ).fetchone()
    return int(row[0]), bool(row[1]), int(row[2]), int(row[3])


def _behind(live: Connection, name: str, stood: int, step: int) -> bool:
    value = _position(live, name)[0]
    return value < stood if step > 0 else value > stood
