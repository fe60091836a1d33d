"""A repair that could be done: what it heals, takes and costs; the smallest safe ones become the plan."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import IntEnum

from knockwood.model.finding import Finding
from knockwood.model.recovery import ExpectedLoss, Step


class Rank(IntEnum):
    """Kinds of repair, the smallest first."""

    STATEMENT = 0
    REINDEX = 1
    PAGE_REPAIR = 2
    ROW_REVERT = 3
    TABLE_RESTORE = 4
    REPLICA_RESYNC = 5
    RESTORE_BESIDE = 6
    RESTORE_IN_PLACE = 7


class Turn(IntEnum):
    """When a step is carried out: an index is built from a table that is whole, a sequence is set after the
    rows are back, a constraint is checked last."""

    PAGES = 0
    MAPS = 1
    TABLES = 2
    ROWS = 3
    INDEXES = 4
    SEQUENCES = 5
    CONSTRAINTS = 6


def key(finding: Finding) -> str:
    """What a finding is known by: two that say the same of the same place are one."""
    return json.dumps(finding.as_json(), sort_keys=True, default=str)


@dataclass(frozen=True, slots=True)
class Offer:
    """One repair. `heals` holds the keys of the findings it mends; `refused` why it cannot be done after all.

    `sound_table` names a (database, table) that must hold no unhealed damage when the repair runs. `gone`: it is
    refused because the damage is not there any more, so that it hinders no other repair.
    """

    rank: Rank
    turn: Turn
    title: str
    heals: frozenset[str]
    steps: tuple[Step, ...] = ()
    expected_loss: ExpectedLoss = field(default_factory=ExpectedLoss)
    sound_table: tuple[str | None, str | None] | None = None
    refused: str | None = None
    gone: bool = False

    @property
    def seconds(self) -> float | None:
        """How long its steps last together; None where that is not known of one."""
        each = [step.seconds for step in self.steps]
        known = [value for value in each if value is not None]
        return round(sum(known), 1) if len(known) == len(each) else None

    @property
    def locks(self) -> str:
        return "; ".join(dict.fromkeys(step.locks for step in self.steps)) or "nothing"

    @property
    def order(self) -> tuple[bool, int, str, str, list[str], str]:
        """Lossless before lossy, then the smaller, then anything that is the same each time."""
        content = json.dumps([step.as_json() for step in self.steps], sort_keys=True)
        lossy = not self.expected_loss.nothing
        return (lossy, self.rank, self.title, content, sorted(self.heals), self.refused or "")
