"""What a drill tells while it runs: one line per step, with the seconds since it began."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from knockwood.host import clock


class Kind(StrEnum):
    """Who acts: the stage is set, the fault strikes, Knockwood finds or does something, a fact is proved."""

    SETUP = "setup"
    FAULT = "fault"
    FOUND = "found"
    DONE = "done"
    PROVED = "proved"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Line:
    """One step of the story; `at` is seconds since the scenario began."""

    at: float
    kind: Kind
    text: str


@dataclass(slots=True)
class Story:
    """Collects the lines and hands each to whoever shows them."""

    tell: Callable[[Line], None] = lambda _: None
    lines: list[Line] = field(default_factory=list)
    _began: float = field(default_factory=clock.monotonic)

    def say(self, kind: Kind, text: str) -> float:
        """Add a line; returns the moment (monotonic seconds)."""
        moment = clock.monotonic()
        line = Line(moment - self._began, kind, text)
        self.lines.append(line)
        self.tell(line)
        return moment
