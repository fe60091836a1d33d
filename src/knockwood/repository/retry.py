"""When to try again what failed for a while."""

from __future__ import annotations

from knockwood.host import clock

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 15.0


class Retry:
    """When to try again after failures: soon at first, then less often, at most `longest` seconds apart."""

    def __init__(self, longest: float = _LONGEST_PAUSE) -> None:
        self._longest = longest
        self._at = 0.0
        self._pause = 0.0
        self._last = ""

    def due(self) -> bool:
        return clock.monotonic() >= self._at

    def failed(self, reason: str) -> bool:
        """Note a failure; True if it is another one than the last."""
        self._pause = min(self._longest, max(_FIRST_PAUSE, self._pause * 2))
        self._at = clock.monotonic() + self._pause
        new, self._last = reason != self._last, reason
        return new

    def reset(self) -> None:
        self._at = self._pause = 0.0
        self._last = ""
