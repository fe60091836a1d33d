"""The way through the archive to a timeline: which files hold it, and how far it can be followed.

Pure values: what is listed (ArchiveInventory) and what was read (WalFacts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from knockwood.model.proof import Commit
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.repository.inventory import ArchiveInventory, Partial

_PAGE = 8192
_SHORT_HEADER = 24
_LONG_HEADER = 40


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """The commit records that one segment (or partial) holds. Times tie and are not in LSN order.

    `makes_tablespace`: whether a record in it makes one at a path; None where nobody looked.
    """

    segment: WalSegment
    commits: int = 0
    first: Commit | None = None
    last: Commit | None = None
    earliest: datetime | None = None
    latest: datetime | None = None
    makes_tablespace: bool | None = None


@dataclass(frozen=True, slots=True)
class Break:
    """Damage: in the files of `timeline` WAL is valid up to `at` and, if known, again from `resumes`.

    `segment` is the file at fault, `object` its stored name.
    """

    timeline: Timeline
    at: Lsn
    resumes: Lsn | None
    segment: WalSegment
    object: str
    reason: str

    @property
    def until(self) -> Lsn:
        """The first position that may be whole again."""
        return self.resumes if self.resumes is not None else max(self.segment.end, self.at)


@dataclass(frozen=True, slots=True)
class WalFacts:
    """What was read of the archive. `ends` holds where the last whole record of a timeline's WAL ends."""

    segments: Mapping[WalSegment, SegmentFacts] = field(default_factory=dict)
    breaks: tuple[Break, ...] = ()
    ends: Mapping[Timeline, Lsn] = field(default_factory=dict)


class Stop(StrEnum):
    """Why WAL cannot be followed further: the archive ends there, or lacks a file, or holds a damaged one."""

    END = "end"
    MISSING = "missing"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Reach:
    """How far WAL can be followed from a position, and what stops it there."""

    end: Lsn
    stop: Stop
    timeline: Timeline
    segment: WalSegment
    reason: str
    resumes: Lsn | None = None
    object: str | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """The ancestry of `timeline` through an archive."""

    inventory: ArchiveInventory
    timeline: Timeline

    @property
    def path(self) -> list[tuple[Timeline, Lsn, Lsn | None]]:
        return self.inventory.history(self.timeline).path()

    @property
    def segment_bytes(self) -> int:
        return self.inventory.segment_bytes

    def leaves(self, timeline: Timeline) -> Lsn | bool | None:
        """Where the route leaves an ancestor; None if it stays on it; False if it never is on it."""
        for step, _, until in self.path:
            if step == timeline:
                return until
        return False

    def holds(self, timeline: Timeline, lsn: Lsn) -> bool:
        """Whether a position of a timeline lies on the route (the very point of leaving does)."""
        until = self.leaves(timeline)
        return until is None or (isinstance(until, Lsn) and lsn <= until)

    def timeline_at(self, lsn: Lsn) -> Timeline:
        return self.inventory.history(self.timeline).timeline_at(lsn)

    def piece(self, number: int) -> tuple[WalSegment, Partial | None] | None:
        """The file that PostgreSQL would read for a segment number: the newest timeline's that has one."""
        start = Lsn(number * self.segment_bytes)
        for timeline, begin, until in reversed(self.path):
            if number < begin.value // self.segment_bytes or (until is not None and start >= until):
                continue
            segment = WalSegment(timeline, number, self.segment_bytes)
            source = self.inventory.source(segment)
            if source is not None:
                return segment, source if isinstance(source, Partial) else None
        return None

    def pieces(self, start: Lsn, end: Lsn) -> list[tuple[WalSegment, Partial | None]]:
        """The files that hold a range, as far as they are there."""
        first = start.value // self.segment_bytes
        last = max(end.value - 1, start.value) // self.segment_bytes
        found = (self.piece(number) for number in range(first, last + 1))
        return [piece for piece in found if piece is not None]

    def archive_end(self) -> Lsn:
        """The end of the last WAL on the route, whether it can be reached or not."""
        ends = [Lsn(0)]
        for timeline, begin, until in self.path:
            beyond = (end for end in self._file_ends(timeline) if end > begin)
            ends.extend(end if until is None else min(end, until) for end in beyond)
        return max(ends)

    def _file_ends(self, timeline: Timeline) -> Iterator[Lsn]:
        if numbers := self.inventory.segments.get(timeline):
            yield Lsn((numbers[-1] + 1) * self.segment_bytes)
        yield from (p.end for p in self.inventory.partials if p.segment.timeline == timeline)

    def archive_start(self) -> Lsn | None:
        """Where the oldest WAL on the route begins; None without any."""
        starts: list[Lsn] = []
        for timeline, begin, until in self.path:
            numbers = (
                *self.inventory.segments.get(timeline, ())[:1],
                *(p.segment.number for p in self.inventory.partials if p.segment.timeline == timeline),
            )
            for number in numbers:
                start = max(Lsn(number * self.segment_bytes), begin)
                if until is None or start < until:
                    starts.append(start)
        return min(starts, default=None)

    def reach(self, lsn: Lsn, facts: WalFacts) -> Reach:
        """How far the WAL from `lsn` on is whole, as far as is known."""
        covered = self.inventory.end_from(self.timeline, lsn)
        damage = self._first_break(lsn, covered, facts)
        if damage is not None:
            return Reach(
                max(damage.at, lsn),
                Stop.DAMAGED,
                damage.timeline,
                damage.segment,
                damage.reason,
                damage.until,
                damage.object,
            )
        timeline = self.timeline_at(covered)
        segment = WalSegment.containing(timeline, covered, self.segment_bytes)
        if covered < self.archive_end():
            return Reach(covered, Stop.MISSING, timeline, segment, f"{segment} is missing")
        return Reach(self._exact(lsn, covered, facts), Stop.END, timeline, segment, "the archive ends here")

    def _exact(self, lsn: Lsn, covered: Lsn, facts: WalFacts) -> Lsn:
        piece = self.piece(max(covered.value - 1, 0) // self.segment_bytes)
        end = facts.ends.get(piece[0].timeline) if piece is not None else None
        if piece is None or end is None or not piece[0].start <= end <= covered:
            return covered
        return max(end, lsn)

    def _first_break(self, lsn: Lsn, covered: Lsn, facts: WalFacts) -> Break | None:
        hits = [b for b in facts.breaks if self._meets(b, lsn, covered)]
        return min(hits, key=lambda b: b.at, default=None)

    def _meets(self, damage: Break, lsn: Lsn, covered: Lsn) -> bool:
        if not (damage.at < covered and lsn < max(damage.until, damage.at + 1)):
            return False
        if damage.at == lsn and damage.resumes == lsn:
            return False
        piece = self.piece(damage.segment.number)
        until = self.leaves(damage.timeline)
        on_route = until is None or (isinstance(until, Lsn) and damage.at < until)
        return on_route and piece is not None and piece[0] == damage.segment


def newest_holding(inventory: ArchiveInventory, timeline: Timeline, lsn: Lsn) -> Timeline:
    """The newest timeline that went on from `timeline` at `lsn` or later; `timeline` itself if none did.

    After a promotion it is often the only one whose WAL reaches the archive, that before it included.
    """
    later = sorted((other for other in inventory.histories if other > timeline), reverse=True)
    return next((other for other in later if Route(inventory, other).holds(timeline, lsn)), timeline)


def record_floor(lsn: Lsn, segment_bytes: int) -> Lsn:
    """The page's start where `lsn` lies in or right after its header: no record can begin before that.

    Servers print such positions as their insert position at a page's beginning.
    """
    offset = lsn.value % _PAGE
    header = _LONG_HEADER if lsn.value % segment_bytes < _PAGE else _SHORT_HEADER
    return Lsn(lsn.value - offset) if offset <= header else lsn


def last_commit_time(facts: WalFacts, segments: Iterator[WalSegment], before: Lsn) -> datetime | None:
    """The time of the last commit known before a position, among segments given newest first."""
    for segment in segments:
        known = facts.segments.get(segment)
        if known is not None and known.last is not None and known.last.lsn < before:
            return known.last.time
    return None
