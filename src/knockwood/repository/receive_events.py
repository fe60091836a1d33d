"""What a receiver tells the world."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from knockwood.errors import KnockwoodError
from knockwood.model.wal import WalRange, WalSegment


class EventKind(StrEnum):
    """What the receiver reports."""

    STREAMING = "streaming"
    ARCHIVED = "archived"
    PARTIAL = "partial"
    MENDED = "mended"
    SLOT_LOST = "slot lost"
    GAP = "gap"
    FORKED = "forked"
    SERVER_PROBLEM = "server problem"
    REPOSITORY_PROBLEM = "repository problem"
    INDEX_PROBLEM = "index problem"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ReceiverEvent:
    """Something happened. Problems carry the `error`; they repeat only when they change.

    `segment` is the one that was archived. Trouble with the history's index is nothing to the WAL.
    """

    kind: EventKind
    text: str
    error: KnockwoodError | None = None
    gap: WalRange | None = None
    segment: WalSegment | None = None


def ignore(event: ReceiverEvent) -> None:
    del event
