"""Constraints, triggers and policies that exist but are not applied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from knockwood.integrity.check import Outcome, Subject, Weight
from knockwood.integrity.databases import in_each_database, rows, sql_beside
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import Connection

_GAPS = sql_beside(__file__)

_REPLICATION_ROLE = b"""
select coalesce(r.rolname, ''), coalesce(d.datname, ''), c.setting
from pg_catalog.pg_db_role_setting s
left join pg_catalog.pg_roles r on r.oid = s.setrole
left join pg_catalog.pg_database d on d.oid = s.setdatabase
cross join lateral pg_catalog.unnest(s.setconfig) c (setting)
where c.setting ~ '^session_replication_role=' and c.setting <> 'session_replication_role=origin'
order by 1, 2
"""


@dataclass(frozen=True, slots=True)
class _Kind:
    severity: Severity
    summary: str
    meaning: str
    remedy: str


_KINDS: Final = {
    "not_valid": _Kind(
        Severity.HIGH,
        "constraint {object} of {relation} is NOT VALID",
        "rows from before it was added were never checked and may break it",
        "ALTER TABLE {relation} VALIDATE CONSTRAINT {object};",
    ),
    "not_enforced": _Kind(
        Severity.HIGH,
        "constraint {object} of {relation} is NOT ENFORCED",
        "PostgreSQL does not check it for any row, old or new",
        "ALTER TABLE {relation} ALTER CONSTRAINT {object} ENFORCED; or drop it",
    ),
    "constraint_trigger": _Kind(
        Severity.CRITICAL,
        "constraint {object} does not fire on {relation}: its trigger {more}",
        "PostgreSQL takes the constraint for valid and does not check it: orphans come in without an error",
        "ALTER TABLE {relation} ENABLE TRIGGER ALL; then run the check foreign_keys",
    ),
    "trigger": _Kind(
        Severity.HIGH,
        "trigger {object} of {relation} is disabled",
        "whatever it keeps true (audit rows, totals, checks) has not been kept since",
        "ALTER TABLE {relation} ENABLE TRIGGER {object};",
    ),
    "rule": _Kind(
        Severity.MEDIUM,
        "rule {object} of {relation} is disabled",
        "commands that it should rewrite are executed as they are",
        "ALTER TABLE {relation} ENABLE RULE {object};",
    ),
    "row_security": _Kind(
        Severity.MEDIUM,
        "{relation} has {object} row security policies that are not applied",
        "every role with SELECT sees all rows",
        "ALTER TABLE {relation} ENABLE ROW LEVEL SECURITY; or drop the policies",
    ),
}


class Constraints:
    """Nothing that guards the data is switched off."""

    name = "constraints"
    title = "Constraints, triggers and policies are applied"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        with subject.connect() as connection:
            settings = rows(connection, _REPLICATION_ROLE)
        for role, database, setting in settings:
            yield self._replication_role(role, database, setting)
        yield from in_each_database(subject, self.name, self._look)

    def _look(self, connection: Connection, database: str) -> Iterator[Outcome]:
        for kind, relation, name, more in rows(connection, _GAPS):
            words = _KINDS[kind]
            values = {"relation": relation, "object": name, "more": more}
            yield Finding(
                check=self.name,
                severity=words.severity,
                location=Location(database=database, relation=relation, key=name),
                summary=words.summary.format(**values),
                meaning=words.meaning,
                remedy=words.remedy.format(**values),
                evidence={"kind": kind, "object": name, "detail": more},
            )

    def _replication_role(self, role: str, database: str, setting: str) -> Finding:
        scope = " ".join(filter(None, [role and f"role {role}", database and f"database {database}"]))
        return Finding(
            check=self.name,
            severity=Severity.CRITICAL,
            location=Location(database=database or None, key=role or None),
            summary=f"{setting} is set on {scope or 'every role'}",
            meaning="its sessions fire no ordinary trigger: foreign keys are not checked",
            remedy=f"ALTER {'ROLE' if role else 'DATABASE'} ... RESET session_replication_role;"
            " then run the check foreign_keys",
            evidence={"setting": setting, "role": role, "database": database},
        )


CHECK = Constraints()
