"""Rows that break a check constraint, NOT NULL or a domain that PostgreSQL takes for valid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import psycopg

from knockwood.integrity.check import Outcome, Subject, Weight
from knockwood.integrity.databases import EXAMPLES, attempt, heap_only, in_each_database, rows, sql_beside
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import Connection

_CONSTRAINTS = sql_beside(__file__)

Rule = tuple[str, str, str, str]
"""Kind, name, expression (or domain), base type."""


def condition(rule: Rule) -> str:
    """SQL that is true for a row that breaks the rule.

    A check that is null holds. NOT NULL is asked through a function: from 17 on the planner takes
    `column is null` on a NOT NULL column for false without looking.
    """
    kind, name, expression, _ = rule
    return f"({expression}) is false" if kind == "check" else f"pg_catalog.num_nulls({name}) > 0"


class RowConstraints:
    """Every row is checked again, in one scan of each table."""

    name = "row_constraints"
    title = "Rows keep their check constraints, NOT NULL and domains"
    weight = Weight.HEAVY

    def run(self, subject: Subject) -> Iterator[Outcome]:
        return in_each_database(subject, self.name, self._look)

    def _look(self, connection: Connection, database: str) -> Iterator[Outcome]:
        heap_only(connection)
        tables: dict[str, list[Rule]] = defaultdict(list)
        for kind, table, name, expression, base in rows(connection, _CONSTRAINTS):
            tables[table].append((kind, name, expression, base))
        for table, rules in tables.items():
            plain = [rule for rule in rules if rule[0] != "domain"]
            if plain:
                look = partial(self._scan, connection, database, table, plain)
                yield from attempt(self.name, f"{table} in database {database}", look, connection)
            for rule in (rule for rule in rules if rule[0] == "domain"):
                look = partial(self._domain, connection, database, table, rule)
                yield from attempt(self.name, f"{table} in database {database}", look, connection)

    def _scan(
        self, connection: Connection, database: str, table: str, rules: list[Rule]
    ) -> Iterator[Outcome]:
        tests = [condition(rule) for rule in rules]
        counts = ", ".join(f"pg_catalog.count(*) filter (where {test})" for test in tests)
        for rule, test, count in zip(
            rules, tests, rows(connection, f"select {counts} from only {table}")[0], strict=True
        ):
            if count:
                examples = rows(
                    connection, f"select ctid::text from only {table} where {test} limit {EXAMPLES}"
                )
                yield self._finding(database, table, rule, count, [row[0] for row in examples])

    def _domain(self, connection: Connection, database: str, table: str, rule: Rule) -> Iterator[Outcome]:
        _, column, domain, base = rule
        try:
            # Cast to the base type and back: only a cast makes PostgreSQL look at the domain's rules.
            rows(connection, f"select pg_catalog.count(({column}::{base})::{domain}) from only {table}")
        except (psycopg.errors.CheckViolation, psycopg.errors.NotNullViolation) as error:
            yield self._finding(database, table, rule, None, [str(error).splitlines()[0]])

    def _finding(
        self, database: str, table: str, rule: Rule, count: int | None, examples: list[str]
    ) -> Finding:
        kind, name, expression, _ = rule
        what = {
            "check": f"check constraint {name}",
            "not_null": f"NOT NULL of column {name}",
            "domain": f"the domain {expression} of column {name}",
        }[kind]
        return Finding(
            check=self.name,
            severity=Severity.HIGH,
            location=Location(
                database=database, relation=table, key=f"ctid={examples[0]}" if count and examples else name
            ),
            summary=f"{count if count is not None else 'some'} row(s) of {table} break {what}",
            meaning="the rows came in while it was not checked, or were damaged; a dump may not load",
            remedy="compare the rows with a clone from before, then correct or revert them",
            evidence={
                "kind": kind,
                "name": name,
                "expression": expression,
                "rows": count,
                "examples": examples,
            },
        )


CHECK = RowConstraints()
