"""Transactions whose row changes are known, because the tables were read before and after them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knockwood.history.transaction import ColumnValue, RowChange, TableId
from knockwood.integrity.check import Invariant
from knockwood.integrity.tables import open_pinned
from knockwood.model.recovery import Outcome, Plan, Recovery, StepResult
from knockwood.postgres.connection import Connection, connect
from knockwood.postgres.server import LocalServer
from knockwood.recover.execute import execute
from knockwood.recover.plan.change import row_key
from knockwood.recover.plan.rows import Culprit, Mode, RowKey, cell
from knockwood.recover.revert_apply import RevertHandler
from knockwood.recover.revert_catalog import LiveTable, read_catalog
from knockwood.recover.revert_examine import Examined, Request, examine
from knockwood.recover.revert_plan import make_plan
from knockwood.recover.revert_rows import run, text_rows
from knockwood.recover.revert_spool import store

Rows = dict[str, ColumnValue]


def fingerprint(dsn: str, *without: str) -> dict[str, Any]:
    """Every row of every user table and partition as text, sorted; and every sequence."""
    found: dict[str, Any] = {}
    with connect(dsn) as connection:
        names = connection.execute(
            "select c.oid::regclass::text, c.relkind::text from pg_class c join pg_namespace n on n.oid = relnamespace"
            " where relkind in ('r', 'S') and nspname !~ '^(pg_|information_schema)' order by 1"
        ).fetchall()
        for name, kind in names:
            if name in without:
                continue
            order = " order by 1" if kind == "r" else ""
            found[name] = (
                [row[0] for row in connection.execute(f"select t::text from only {name} t{order}".encode())]
                if kind == "r"
                else connection.execute(f"select last_value from {name}".encode()).fetchall()
            )
    return found


def user_tables(connection: Connection) -> list[TableId]:
    """Plain and partitioned tables of the database's users, roots only."""
    found = connection.execute(
        "select n.nspname, c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence = 'p'"
        " and n.nspname !~ '^(pg_|information_schema)' order by 1, 2"
    ).fetchall()
    return [TableId(connection.info.dbname, *row) for row in found]


def everything(connection: Connection, tables: Sequence[TableId]) -> dict[TableId, dict[RowKey, list[Rows]]]:
    """All rows of the tables by key; of one without a key by the whole row."""
    catalog = read_catalog(connection, tables)
    return {table: _rows(connection, catalog.tables[table]) for table in tables}


def _rows(connection: Connection, table: LiveTable) -> dict[RowKey, list[Rows]]:
    columns = list(table.columns.values())
    texts = [f"t.{column.quoted}" for column in columns]
    images = [column.send.format(f"t.{column.quoted}") if column.send else "null" for column in columns]
    cursor = run(connection, f"select {', '.join(texts + images)} from {table.source} t", [])
    found: dict[RowKey, list[Rows]] = {}
    for values in text_rows(cursor):
        half = len(columns)
        row = {
            column.name: ColumnValue(text, None if image is None else bytes.fromhex(image[2:]))
            for column, text, image in zip(columns, values[:half], values[half:], strict=True)
        }
        found.setdefault(row_key(row, table.facts), []).append(row)
    return found


def differences(
    before: Mapping[TableId, Mapping[RowKey, list[Rows]]],
    after: Mapping[TableId, Mapping[RowKey, list[Rows]]],
    by_key: tuple[str, ...] = (),
) -> Iterator[RowChange]:
    """What lies between two states. Rows are the same by what is beside their key, where that is unique, else
    by key (in tables of `by_key` by that alone); without a key nothing is an update."""
    for table, old in before.items():
        left = [(key, row) for key, rows in old.items() for row in rows]
        right = [(key, row) for key, rows in after[table].items() for row in rows]
        equal = Counter(_cells(row) for _, row in left) & Counter(_cells(row) for _, row in right)
        left, right = _without(left, equal), _without(right, equal)
        for by_rest in (True, False):
            pairs = _paired(left, right, by_rest) if not by_rest or table.name not in by_key else []
            for was, is_now in pairs:
                yield RowChange(table, "update", {}, was[1], is_now[1])
            gone, come = {id(was[1]) for was, _ in pairs}, {id(now[1]) for _, now in pairs}
            left = [each for each in left if id(each[1]) not in gone]
            right = [each for each in right if id(each[1]) not in come]
        for _, was in left:
            yield RowChange(table, "delete", {}, was, None)
        for _, now in right:
            yield RowChange(table, "insert", {}, None, now)


Keyed = tuple[RowKey, Rows]


def _cells(row: Rows) -> tuple[Any, ...]:
    return tuple(cell(value) for value in row.values())


def _without(rows: list[Keyed], equal: Counter[tuple[Any, ...]]) -> list[Keyed]:
    left = Counter(equal)
    kept = []
    for key, row in rows:
        if left[_cells(row)] > 0:
            left[_cells(row)] -= 1
        else:
            kept.append((key, row))
    return kept


def _paired(left: list[Keyed], right: list[Keyed], by_rest: bool) -> list[tuple[Keyed, Keyed]]:
    def identity(each: Keyed) -> tuple[Any, ...]:
        cells = _cells(each[1])
        return tuple(each_cell for each_cell in cells if each_cell not in each[0]) if by_rest else each[0]

    counts = Counter(identity(each) for each in left), Counter(identity(each) for each in right)
    known = {identity(each): each for each in right}
    return [
        (each, known[name])
        for each in left
        if (name := identity(each))
        and counts[0][name] == counts[1][name] == 1
        and len(each[0]) < len(each[1])
    ]


@dataclass
class Reverter:
    """A database in which transactions are run, told and reverted."""

    server: LocalServer
    state: Path
    database: str = "postgres"
    invariants: tuple[Invariant, ...] = ()
    role: str | None = None
    by_key: tuple[str, ...] = ()
    results: list[StepResult] = field(default_factory=list)

    @property
    def dsn(self) -> str:
        return self.server.dsn(self.database)

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        with connect(self.dsn) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def culprit(self, *statements: str) -> Culprit:
        """Run the statements as one transaction: what it changed."""
        with open_pinned(self.dsn, None) as reader:
            tables = user_tables(reader)
            before = everything(reader, tables)
            with connect(self.dsn) as connection, connection.transaction():
                for statement in statements:
                    connection.execute(statement.encode())
                row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
                assert row is not None
            after = everything(reader, tables)
        return Culprit(int(row[0]), tuple(differences(before, after, self.by_key)))

    def request(
        self, *culprits: Culprit, mode: Mode = Mode.STRICT, counters: tuple[str, ...] = ()
    ) -> Request:
        return Request(culprits, mode, counters)

    def examine(self, request: Request) -> Examined:
        with open_pinned(self.dsn, None) as connection:
            connection.execute("begin isolation level repeatable read, read only")
            return examine(connection, request)

    def plan(self, request: Request, wait: float = 5.0) -> Plan:
        return make_plan(
            "shop", request, self.examine(request), store(self.state / "rows", request.culprits), wait
        )

    def apply(self, plan: Plan, **options: Any) -> Recovery:
        dsn = self.server.dsn(self.database) + (f" user={self.role}" if self.role else "")
        handler = RevertHandler(dsn, self.invariants, **options)
        return execute(plan, [handler], self.state, approve=plan.id)

    def revert(self, *culprits: Culprit, **options: Any) -> StepResult:
        """Plan and apply; the step must have been done."""
        plan = self.plan(self.request(*culprits, **options))
        assert plan.steps, plan.refused
        [result] = self.apply(plan).results
        assert result.outcome is Outcome.DONE, result
        return result

    def conflicts(self, *culprits: Culprit, **options: Any) -> list[tuple[str, str, tuple[str, ...]]]:
        """Kind, table and columns of what refuses the revert."""
        examined = self.examine(self.request(*culprits, **options))
        return [(str(each.kind), each.table.name, each.columns) for each in examined.conflicts]


@contextmanager
def unchanged(dsn: str, *without: str) -> Iterator[None]:
    """Everything in the database is afterwards as it was, save the tables named."""
    before = fingerprint(dsn, *without)
    yield
    assert fingerprint(dsn, *without) == before
