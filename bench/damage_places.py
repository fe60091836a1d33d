"""Where a damage is, where a finding is, and whether the one names the other. Nothing here asks a server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ABOUT_THE_SERVER = frozenset({"configuration"})
"""What it finds is true of a server made for a bench, damaged or not: told apart, never an alarm."""

_PARTS = ("database", "relation", "index", "file", "block", "lsn")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a damage is. A finding names it when all parts given are the same; `key` must be in the finding's,
    and `check` is the only check whose word counts (None: any)."""

    database: str | None = None
    relation: str | None = None
    index: str | None = None
    file: str | None = None
    block: int | None = None
    key: str | None = None
    lsn: str | None = None
    check: str | None = None

    def named_by(self, finding: Mapping[str, Any]) -> bool:
        """Whether a finding (as JSON) names this place."""
        location = finding["location"]
        if self.check is not None and finding["check"] != self.check:
            return False
        if self.key is not None and self.key not in str(location.get("key", "")):
            return False
        wanted = {part: getattr(self, part) for part in _PARTS}
        return all(location.get(part) == value for part, value in wanted.items() if value is not None)

    def __str__(self) -> str:
        parts = [f"{part} {getattr(self, part)}" for part in _PARTS if getattr(self, part) is not None]
        return ", ".join([*parts, *([self.key] if self.key else [])])


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage done: every way to name it right (one is enough), and what else it truly harms.

    `harmed` are relations of the database in which the damage has consequences, such as an index's table or
    a table's TOAST table; `breaks_rules`: it may break invariants, and foreign keys of or to what is harmed.
    """

    line: str
    database: str
    places: tuple[Place, ...]
    harmed: frozenset[str] = frozenset()
    breaks_rules: bool = False
    note: str = ""

    def named_by(self, finding: Mapping[str, Any]) -> bool:
        return any(place.named_by(finding) for place in self.places)

    def explains(self, finding: Mapping[str, Any]) -> bool:
        """Whether a finding is a consequence of this damage, though it may not name it exactly."""
        location = finding["location"]
        if location.get("database", self.database) != self.database:
            return False
        touched = {location.get("relation"), finding.get("evidence", {}).get("toast_of")}
        if touched & self.harmed:
            return True
        if not self.breaks_rules:
            return False
        rule = finding["check"] in ("foreign_keys", "row_constraints")
        return finding["check"] == "invariants" or (
            rule and finding.get("evidence", {}).get("referenced") in self.harmed
        )


@dataclass(slots=True)
class Outcome:
    """What became of one damage: who named it, in the order in which they were asked."""

    damage: Damage
    checks: list[str] = field(default_factory=list)
    consequences: list[str] = field(default_factory=list)
    first: str = ""

    @property
    def found(self) -> bool:
        return bool(self.checks)


def judge(damages: Sequence[Damage], findings: Iterable[Mapping[str, Any]]) -> Judgement:
    """Put each finding where it belongs."""
    judgement = Judgement([Outcome(damage) for damage in damages])
    for finding in findings:
        judgement.add(finding)
    return judgement


@dataclass(slots=True)
class Judgement:
    """The outcomes of the damages of one cluster, and the findings that none of them explains."""

    outcomes: list[Outcome]
    false_alarms: list[Mapping[str, Any]] = field(default_factory=list)
    about_the_server: list[Mapping[str, Any]] = field(default_factory=list)

    def add(self, finding: Mapping[str, Any]) -> None:
        check = str(finding["check"])
        if check in ABOUT_THE_SERVER:
            self.about_the_server.append(finding)
            return
        known = False
        for outcome in self.outcomes:
            if outcome.damage.named_by(finding):
                known = True
                if check not in outcome.checks:
                    outcome.checks.append(check)
                outcome.first = outcome.first or str(finding["summary"])
            elif outcome.damage.explains(finding):
                known = True
                if check not in outcome.consequences:
                    outcome.consequences.append(check)
        if not known:
            self.false_alarms.append(finding)

    @property
    def all_found(self) -> bool:
        return all(outcome.found for outcome in self.outcomes)
