"""The scenarios, one file each."""

from __future__ import annotations

import difflib

from knockwood.drill.scenarios.bad_release import BAD_RELEASE
from knockwood.drill.scenarios.base import Scenario
from knockwood.drill.scenarios.corrupt_table import CORRUPT_TABLE
from knockwood.drill.scenarios.faulty_disk import FAULTY_DISK
from knockwood.drill.scenarios.rogue_script import ROGUE_SCRIPT
from knockwood.errors import UsageError

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario for scenario in (CORRUPT_TABLE, ROGUE_SCRIPT, BAD_RELEASE, FAULTY_DISK)
}


def find_scenario(name: str) -> Scenario:
    """The scenario of that name; raises UsageError with the nearest one."""
    if name not in SCENARIOS:
        near = difflib.get_close_matches(name, SCENARIOS, 1)
        raise UsageError(
            f"no scenario named {name}",
            hint=f"did you mean {near[0]}?" if near else f"there are: {', '.join(SCENARIOS)}",
        )
    return SCENARIOS[name]


__all__ = ["SCENARIOS", "Scenario", "find_scenario"]
