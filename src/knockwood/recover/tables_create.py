"""A table that is gone made again in its place, with all that `pg_dump` knows of it, in one transaction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from knockwood.clone.spawn import Clone
from knockwood.errors import ObjectDamagedError, RefusedError
from knockwood.host import clock, processes
from knockwood.postgres.connection import Connection
from knockwood.postgres.copying import copy_rows
from knockwood.recover.table_definition import TableName, pin
from knockwood.recover.tables_facts import Shape, ask, qualified, required_shape, shape
from knockwood.recover.tables_merge import Merged, row_hash

_HEAD_LINES = 60
# Only psql understands the first kind; the others would undo what this session is set to.
_NOT_OURS = re.compile(
    r"\\(un)?restrict \w+\Z|SET (statement_timeout|lock_timeout|transaction_timeout"
    r"|idle_in_transaction_session_timeout) = 0;\Z|SET client_encoding = '\w+';\Z"
)
_GONE = (
    psycopg.errors.UndefinedObject,
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.InvalidSchemaName,
)


@dataclass(frozen=True, slots=True)
class Create:
    """One table (with its partitions) brought back from a clone."""

    clone: Clone
    source: Connection
    live: Connection
    table: TableName
    then: Shape

    def run(self) -> Merged:
        """Do it within the caller's transaction on `live`; raises RefusedError where it cannot be whole."""
        done = Merged()
        if shape(self.live, self.table) is not None:
            raise RefusedError(f"there is a table {self.table} again")
        tree = [(TableName(self.table.database, s, t), kind) for _, s, t, kind in self._tree()]
        oids = [row[0] for row in self._tree()]
        views = [(schema, name) for schema, name, _ in ask(self.source, "views", oids=oids)]
        lost = [view for view in views if not qualified(self.live, *view)[1]]
        members = [(member.schema, member.table) for member, _ in tree] + lost
        self._script("pre-data", members)
        for member, kind in tree:
            if kind == "r":
                done.rows += self._load(member)
        done.inserted = done.rows
        self._sequences(oids)
        done.locked_at = clock.monotonic()
        self._script("post-data", members)
        pin(self.live)
        self._foreign_keys_to(done)
        self.live.execute(b"set constraints all immediate")
        for name in ask(self.source, "publications", oids=oids):
            done.notes.append(
                f"publication {name[0]} does not hold it: alter publication {name[0]} add table"
            )
        if lost:
            done.notes.append(f"views made again: {', '.join('.'.join(view) for view in lost)}")
        return done

    def _tree(self) -> list[tuple[Any, ...]]:
        return ask(self.source, "tree", oid=self.then.oid)

    def _script(self, section: str, members: list[tuple[str, str]]) -> None:
        """Run a section of what pg_dump writes of the tables and views."""
        # In a pattern a quoted name stands for itself.
        patterns = [".".join('"' + part.replace('"', '""') + '"' for part in member) for member in members]
        command: list[str | Path] = [
            self.clone.programs.path("pg_dump"),
            "-d",
            self.clone.dsn(self.table.database),
        ]
        command += [
            f"--section={section}",
            "--no-publications",
            "--no-subscriptions",
            "--lock-wait-timeout=60s",
        ]
        command += [f"--table={pattern}" for pattern in patterns]
        encoding = self.source.info.parameter_status("client_encoding") or "UTF8"
        environment = {"LC_ALL": "C", "PGCLIENTENCODING": encoding}
        text = processes.run(command, env=environment, errors="surrogateescape").out
        lines = text.split("\n")
        ours = [
            line
            for number, line in enumerate(lines)
            if not ((number < _HEAD_LINES or number > len(lines) - 10) and _NOT_OURS.match(line))
        ]
        try:
            self.live.execute("\n".join(ours).encode("utf-8", "surrogateescape"))
        except psycopg.errors.ForeignKeyViolation as error:
            raise RefusedError(
                f"its rows refer to rows that are gone: {error.diag.message_detail}",
                where=str(self.table),
                hint="bring those back first, or this table beside (without --in-place)",
            ) from error
        except _GONE as error:
            raise RefusedError(
                f"something that it needs is gone too: {error.diag.message_primary}",
                where=str(self.table),
                hint="make it again, then run this again",
            ) from error
        pin(self.live)

    def _load(self, member: TableName) -> int:
        """Copy one table's rows; how many, proven to be those of the clone."""
        then = required_shape(self.source, member)
        copy_rows(self.source, self.live, then.source, then.name, ", ".join(then.stored))
        expected = row_hash(self.source, then, then.source)
        arrived = row_hash(self.live, then, then.source)
        if arrived != expected:
            raise ObjectDamagedError(
                f"{arrived[0]} rows arrived of {expected[0]}, or not as they were; nothing was kept",
                where=then.name,
            )
        return expected[0]

    def _sequences(self, oids: list[int]) -> None:
        """Set the sequences that were made again to where they stood."""
        for schema, name in ask(self.source, "sequences", oids=oids):
            quoted = qualified(self.source, schema, name)[0]
            row: Any = self.source.execute(f"select last_value, is_called from {quoted}".encode()).fetchone()
            self.live.execute("select pg_catalog.setval(%s::regclass, %s, %s)", [quoted, *row])

    def _foreign_keys_to(self, done: Merged) -> None:
        """Tie the tables that referred to it to it again; where rows refer to nothing, for new rows only."""
        for name, referring, definition in ask(self.source, "foreign_keys_to", oid=self.then.oid):
            there = self.live.execute(
                "select pg_catalog.to_regclass(%s) is not null and not exists (select from"
                " pg_catalog.pg_constraint where conrelid = pg_catalog.to_regclass(%s)"
                " and pg_catalog.quote_ident(conname) = %s)",
                [referring, referring, name],
            ).fetchone()
            if there is None or not there[0]:
                done.notes.append(f"foreign key {name} of {referring} was not made: see whether it is wanted")
                continue
            add = f"alter table {referring} add constraint {name} {definition}"
            try:
                with self.live.transaction():
                    self.live.execute(add.encode())
            except psycopg.errors.ForeignKeyViolation as error:
                valid = "" if definition.endswith(" NOT VALID") else " not valid"
                self.live.execute(f"{add}{valid}".encode())
                done.notes.append(
                    f"foreign key {name} of {referring} holds for new rows only (not valid):"
                    f" {error.diag.message_detail}"
                )
