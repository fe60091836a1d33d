"""One amcheck function over every index of its access method, with what it says made into findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import psycopg
from psycopg import sql

from knockwood.integrity.amcheck import index_block, is_damage, is_gone, row_without_entry, unreadable_block
from knockwood.integrity.budget import pace
from knockwood.integrity.catalog import Relation, relations, stake
from knockwood.integrity.check import Outcome, Subject
from knockwood.integrity.databases import attempt, in_each_database
from knockwood.integrity.extensions import absent, schema_of
from knockwood.model import Finding, Location
from knockwood.postgres.connection import Connection

Calls = Mapping[str, sql.SQL]
"""Access method to the call of its function, with `%s` for the index's OID."""

_USABLE = "select indexrelid::int8 from pg_catalog.pg_index where indisvalid and indisready and indislive"


def check_indexes(subject: Subject, check: str, calls: Calls, rounds: int) -> Iterator[Outcome]:
    """Call the function for every usable index of each method in every database.

    An index counts as damaged if `rounds` calls one after the other say so.
    """

    def look(connection: Connection, database: str) -> Iterator[Outcome]:
        schema = schema_of(subject, connection, "amcheck")
        if schema is None:
            yield absent(check, database, "amcheck")
            return
        usable = {row[0] for row in connection.execute(_USABLE).fetchall()}
        for index in relations(connection, database):
            call = calls.get(index.method or "")
            if call is None or index.oid not in usable or _unreadable(index, subject):
                continue
            pace(subject)
            query = sql.SQL("select {}.{}").format(sql.Identifier(schema), call)
            yield from attempt(
                check,
                f"database {database}, index {index.name}",
                partial(_one, connection, check, index, query, rounds),
            )

    yield from in_each_database(subject, check, look)


def _unreadable(index: Relation, subject: Subject) -> bool:
    return index.persistence == "t" or (index.persistence == "u" and subject.facts.in_recovery)


def _one(
    connection: Connection, check: str, index: Relation, query: sql.Composed, rounds: int
) -> Iterator[Finding]:
    said: psycopg.Error | None = None
    for _ in range(rounds):
        try:
            connection.execute(query, [index.oid])
            return
        except psycopg.Error as error:
            if connection.closed:
                raise
            if is_gone(connection, index):
                return
            if not is_damage(error):
                raise
            said = error
    if said is not None:
        yield _finding(check, index, said)


def _finding(check: str, index: Relation, error: psycopg.Error) -> Finding:
    message = error.diag.message_primary or str(error)
    detail = error.diag.message_detail
    what = stake(index, "main")
    meaning, remedy = what.meaning, what.remedy
    place = index.location(index.path, index_block(error))
    unreadable, row = unreadable_block(error), row_without_entry(error)
    if unreadable is not None:
        place = _place(index, *unreadable)
    elif row is not None:
        place = index.location(index.path, key=f"ctid {row}")
        meaning = (
            "a row is missed by queries through the index; if the table's page is an old one, the row may be"
            " one that was deleted"
        )
        remedy = f"check the table's page first (lost_writes), then {remedy}"
    return Finding(
        check,
        what.severity,
        place,
        message,
        meaning,
        remedy,
        {"message": message} | ({"detail": detail} if detail else {}),
    )


def _place(index: Relation, path: str, block: int) -> Location:
    if path == index.path:
        return index.location(path, block)
    # The table's page, read to look for the entries of its rows.
    return Location(database=index.database, relation=index.owner, file=path, block=block)
