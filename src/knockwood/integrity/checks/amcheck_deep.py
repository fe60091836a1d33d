"""amcheck's heavy check of btree indexes: every row has its entry, every entry is found from the root."""

from __future__ import annotations

from collections.abc import Iterator

from psycopg import sql

from knockwood.integrity.check import NotChecked, Outcome, Subject, Weight
from knockwood.integrity.index_checks import check_indexes


class AmcheckDeep:
    """bt_index_parent_check with heapallindexed and rootdescend, and checkunique from 17.

    It holds a ShareLock on each table while it looks, which keeps writers out: for a clone. Recovery
    does not give that lock: there bt_index_check with heapallindexed does what it can, and it says so.
    """

    name = "amcheck_deep"
    title = "Btree indexes against their tables and from the root (bt_index_parent_check)"
    weight = Weight.HEAVY

    def run(self, subject: Subject) -> Iterator[Outcome]:
        unique = ", true" if subject.facts.major >= 17 else ""
        if subject.facts.in_recovery:
            call = sql.SQL(f"bt_index_check(%s::oid::regclass, true{unique})")
        else:
            call = sql.SQL(f"bt_index_parent_check(%s::oid::regclass, true, true{unique})")
        yield from check_indexes(subject, self.name, {"btree": call}, rounds=1)
        if subject.facts.in_recovery:
            yield NotChecked(
                self.name,
                "parent links and the descent from the root need a lock that recovery does not give:"
                " promote the clone first",
            )


CHECK = AmcheckDeep()
