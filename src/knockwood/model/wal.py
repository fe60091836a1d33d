"""Positions in the write-ahead log: LSN, timeline, segment, range, and the history of timelines."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from functools import total_ordering
from typing import NewType

Timeline = NewType("Timeline", int)

DEFAULT_SEGMENT_BYTES = 16 * 1024 * 1024

_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})\Z")
_SEGMENT = re.compile(r"[0-9A-F]{24}\Z")


@total_ordering
@dataclass(frozen=True, slots=True)
class Lsn:
    """A byte position in the WAL, printed as PostgreSQL prints it (`16/B374D848`)."""

    value: int

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """Read `X/Y`; raises ValueError for anything else."""
        match = _LSN.match(text.strip())
        if match is None:
            raise ValueError(f"not an LSN: {text!r}")
        return cls((int(match[1], 16) << 32) | int(match[2], 16))

    def __str__(self) -> str:
        return f"{self.value >> 32:X}/{self.value & 0xFFFFFFFF:08X}"

    def __lt__(self, other: Lsn) -> bool:
        return self.value < other.value

    def __add__(self, count: int) -> Lsn:
        return Lsn(self.value + count)

    def __sub__(self, other: Lsn) -> int:
        """Bytes between two positions."""
        return self.value - other.value


@dataclass(frozen=True, slots=True, order=True)
class WalSegment:
    """One WAL file: a timeline, a segment number counted from the start of the WAL, and its size."""

    timeline: Timeline
    number: int
    bytes: int = DEFAULT_SEGMENT_BYTES

    @classmethod
    def parse(cls, name: str, segment_bytes: int = DEFAULT_SEGMENT_BYTES) -> WalSegment:
        """Read the 24 hexadecimal digits of a WAL file name; raises ValueError for anything else."""
        if not _SEGMENT.match(name):
            raise ValueError(f"not a WAL segment name: {name!r}")
        per_log = 0x1_0000_0000 // segment_bytes
        low = int(name[16:], 16)
        if low >= per_log:
            raise ValueError(f"not a WAL segment name for segments of {segment_bytes} bytes: {name!r}")
        return cls(Timeline(int(name[:8], 16)), int(name[8:16], 16) * per_log + low, segment_bytes)

    @classmethod
    def containing(
        cls, timeline: Timeline, lsn: Lsn, segment_bytes: int = DEFAULT_SEGMENT_BYTES
    ) -> WalSegment:
        return cls(timeline, lsn.value // segment_bytes, segment_bytes)

    @property
    def name(self) -> str:
        per_log = 0x1_0000_0000 // self.bytes
        return f"{self.timeline:08X}{self.number // per_log:08X}{self.number % per_log:08X}"

    @property
    def start(self) -> Lsn:
        return Lsn(self.number * self.bytes)

    @property
    def end(self) -> Lsn:
        """The first position after the segment."""
        return Lsn((self.number + 1) * self.bytes)

    def next(self) -> WalSegment:
        return WalSegment(self.timeline, self.number + 1, self.bytes)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class WalRange:
    """WAL of one timeline from `start` up to, not including, `end`."""

    timeline: Timeline
    start: Lsn
    end: Lsn

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise ValueError(f"range ends before it starts: {self.start}..{self.end}")

    def __contains__(self, lsn: Lsn) -> bool:
        return self.start <= lsn < self.end

    def segments(self, segment_bytes: int = DEFAULT_SEGMENT_BYTES) -> list[WalSegment]:
        """The segments that hold the range, in order; none for an empty range."""
        if self.start == self.end:
            return []
        first = self.start.value // segment_bytes
        last = (self.end.value - 1) // segment_bytes
        return [WalSegment(self.timeline, number, segment_bytes) for number in range(first, last + 1)]

    def __str__(self) -> str:
        return f"{self.start}..{self.end} on timeline {self.timeline}"


@dataclass(frozen=True, slots=True)
class TimelineHistory:
    """The ancestry of a timeline, as its `.history` file tells it.

    `switches` holds (parent timeline, LSN where it was left), oldest first.
    """

    timeline: Timeline
    switches: tuple[tuple[Timeline, Lsn], ...] = field(default=())

    @classmethod
    def parse(cls, timeline: Timeline, text: str) -> TimelineHistory:
        """Read a history file; raises ValueError on a line PostgreSQL would not have written."""
        switches: list[tuple[Timeline, Lsn]] = []
        for line in text.splitlines():
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            words = line.split(None, 2)
            if len(words) < 2 or not words[0].isdigit():
                raise ValueError(f"not a line of a timeline history: {line!r}")
            switches.append((Timeline(int(words[0])), Lsn.parse(words[1])))
        if any(a[0] >= b[0] for a, b in itertools.pairwise(switches)):
            raise ValueError("timelines of a history do not ascend")
        return cls(timeline, tuple(switches))

    def path(self) -> list[tuple[Timeline, Lsn, Lsn | None]]:
        """Per timeline (id, from, to), oldest first; the last `to` is None: still open."""
        start = Lsn(0)
        steps: list[tuple[Timeline, Lsn, Lsn | None]] = []
        for parent, switch in self.switches:
            steps.append((parent, start, switch))
            start = switch
        steps.append((self.timeline, start, None))
        return steps

    def timeline_at(self, lsn: Lsn) -> Timeline:
        """The timeline whose WAL holds `lsn` on this ancestry."""
        for parent, switch in self.switches:
            if lsn < switch:
                return parent
        return self.timeline
