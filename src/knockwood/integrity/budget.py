"""How checks stay polite on a production server: they wait while it is loaded, and give way to locks."""

from __future__ import annotations

import os
from typing import Final

from knockwood.errors import LoadTooHighError
from knockwood.host import clock
from knockwood.integrity.check import Subject

LONGEST_WAIT: Final = 300.0
"""Seconds one wait may last; a machine loaded for longer is not checked, and that is said."""

_STEP: Final = 1.0


def load_per_core() -> float:
    """The load average of the last minute of this machine, per core."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def pace(subject: Subject, longest: float = LONGEST_WAIT) -> None:
    """Call between pieces of work: waits while the load per core is above the budget's `max_load`.

    Without `max_load` it returns at once. Hold no lock and no snapshot while waiting. Raises
    LoadTooHighError when the load stayed above it for `longest` seconds.
    """
    limit = subject.budget.max_load
    if limit is None:
        return
    deadline = clock.monotonic() + longest
    while (load := load_per_core()) > limit:
        if clock.monotonic() >= deadline:
            raise LoadTooHighError(
                f"the load per core stayed above {limit:g} for {longest:.0f} s (now {load:.1f})",
                hint="check at a quieter time, on a clone, or with a higher --max-load",
            )
        clock.sleep(_STEP)
