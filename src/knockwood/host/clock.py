"""Time: UTC for what is written down, monotonic for what is measured."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def now() -> datetime:
    return datetime.now(UTC)


def monotonic() -> float:
    """Seconds that never jump; for durations and timeouts only."""
    return time.monotonic()


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def stamp(moment: datetime) -> str:
    """`20261121T044453Z`: sorts as text and fits into file and object names."""
    return moment.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
