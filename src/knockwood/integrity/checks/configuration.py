"""Settings and states that let damage in, hide it, or make it unrecoverable."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from knockwood.integrity.check import Outcome, Role, Subject, Weight
from knockwood.integrity.configuration_rules import QUERIES, ROLE_SETTINGS, SETTINGS, QueryRule, SettingRule
from knockwood.integrity.databases import about_the_server, attempt, in_each_database, rows
from knockwood.model import Finding, Location
from knockwood.postgres.connection import Connection

_TRUE = ("on", "true", "yes", "1", "t", "y")


class Configuration:
    """Each row of the audit (`configuration_rules`) in turn."""

    name = "configuration"
    title = "Settings that endanger data"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        if subject.role is Role.CLONE:
            yield from about_the_server(subject, self.name)
            return
        with subject.connect() as connection:
            yield from self._settings(connection)
            for rule in QUERIES:
                if not rule.each:
                    look = partial(self._query, rule, connection, None)
                    yield from attempt(self.name, rule.name, look, connection)
        for rule in QUERIES:
            if rule.each:
                yield from in_each_database(subject, self.name, partial(self._query, rule))

    def _settings(self, connection: Connection) -> Iterator[Outcome]:
        current = dict(rows(connection, "select name, setting from pg_catalog.pg_settings"))
        for rule in SETTINGS:
            # Not every version knows every setting, and a role without pg_read_all_settings sees fewer.
            if current.get(rule.setting) in rule.bad:
                yield self._setting(rule, current[rule.setting], "", "")
        by_name = {rule.setting: rule for rule in SETTINGS}
        for role, database, name, value in rows(connection, ROLE_SETTINGS):
            known = by_name.get(name)
            if known is not None and _normal(value) in known.bad:
                yield self._setting(known, value, role, database)

    def _setting(self, rule: SettingRule, value: str, role: str, database: str) -> Finding:
        scope = " ".join(filter(None, [role and f"role {role}", database and f"database {database}"]))
        return self._finding(
            rule,
            Location(database=database or None, key=rule.setting),
            f"{rule.setting} is {value}" + (f" for {scope}" if scope else ""),
            {"setting": rule.setting, "value": value, "role": role, "database": database},
        )

    def _query(self, rule: QueryRule, connection: Connection, database: str | None) -> Iterator[Outcome]:
        for (text,) in rows(connection, rule.query):
            yield self._finding(
                rule,
                Location(database=database, relation=text if rule.each else None, key=rule.name),
                f"{rule.name.replace('_', ' ')}: {text}",
                {"rule": rule.name, "detail": text},
            )

    def _finding(
        self, rule: SettingRule | QueryRule, location: Location, summary: str, evidence: dict[str, Any]
    ) -> Finding:
        return Finding(self.name, rule.severity, location, summary, rule.why, rule.remedy, evidence)


def _normal(value: str) -> str:
    return (
        "on" if value.lower() in _TRUE else "off" if value.lower() in ("off", "false", "no", "0") else value
    )


CHECK = Configuration()
