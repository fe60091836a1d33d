"""amcheck's light checks of indexes: btree pages and order, GIN structure from 18."""

from __future__ import annotations

from collections.abc import Iterator

from psycopg import sql

from knockwood.integrity.check import Outcome, Subject, Weight
from knockwood.integrity.index_checks import check_indexes

_RETRIES = 2


class AmcheckIndex:
    """bt_index_check on every btree index; gin_index_check on every GIN index (18 and later)."""

    name = "amcheck_index"
    title = "Index structure and order (bt_index_check, gin_index_check)"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        calls = {"btree": sql.SQL("bt_index_check(%s::oid::regclass, false)")}
        if subject.facts.major >= 18:
            calls["gin"] = sql.SQL("gin_index_check(%s::oid::regclass)")
        yield from check_indexes(subject, self.name, calls, rounds=_RETRIES)


CHECK = AmcheckIndex()
