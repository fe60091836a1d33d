"""What WAL an archive holds, as pure values: segments, partial segments, histories, and their holes.

A position on a timeline that has ancestors is looked up along the ancestry: before the switch the
parent's files count, and so does the child's first segment, which PostgreSQL begins with a copy of
the parent's bytes.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalRange, WalSegment

_SEGMENT = re.compile(r"wal/[0-9A-F]{8}/[0-9A-F]{16}/([0-9A-F]{24})(?:\.zst(?:\.age)?)?\Z")
_PARTIAL = re.compile(r"(wal/partial/([0-9A-F]{24})\.([0-9A-F]{16}))(?:\.zst(?:\.age)?)?\Z")
_HISTORY = re.compile(r"wal/history/([0-9A-F]{8})\.history(?:\.zst(?:\.age)?)?\Z")


def segment_object(segment: WalSegment) -> str:
    """The object name of a whole segment, without the suffix that tells its encoding."""
    name = segment.name
    return f"wal/{name[:8]}/{name[:16]}/{name}"


def partial_object(segment: WalSegment, end: Lsn) -> str:
    """The object name of the first bytes of a segment, up to `end`."""
    return f"wal/partial/{segment.name}.{end.value:016X}"


def history_object(timeline: Timeline) -> str:
    """The object name of a timeline's history."""
    return f"wal/history/{timeline:08X}.history"


@dataclass(frozen=True, slots=True, order=True)
class Partial:
    """The beginning of a segment, from its start up to, not including, `end`. `name` has no suffix."""

    segment: WalSegment
    end: Lsn
    name: str

    @classmethod
    def parse(cls, name: str, segment_bytes: int) -> Partial | None:
        """Read an object name, with or without its suffix; None if it names no partial segment."""
        match = _PARTIAL.match(name)
        if match is None:
            return None
        try:
            segment = WalSegment.parse(match[2], segment_bytes)
        except ValueError:
            return None
        end = Lsn(int(match[3], 16))
        return cls(segment, end, match[1]) if segment.start < end <= segment.end else None


@dataclass(frozen=True, slots=True)
class ArchiveInventory:
    """What the archive lists: names only, so it promises presence and not content.

    `segments` holds the sorted numbers of the whole segments per timeline.
    """

    segment_bytes: int
    segments: Mapping[Timeline, tuple[int, ...]] = field(default_factory=dict)
    partials: tuple[Partial, ...] = ()
    histories: Mapping[Timeline, TimelineHistory] = field(default_factory=dict)

    @classmethod
    def of_names(
        cls,
        segment_bytes: int,
        names: Iterable[str],
        histories: Mapping[Timeline, TimelineHistory] | None = None,
    ) -> ArchiveInventory:
        """Sort object names into an inventory; names of other things are passed over."""
        numbers: dict[Timeline, set[int]] = {}
        partials: set[Partial] = set()
        for name in names:
            match = _SEGMENT.match(name)
            partial = None if match else Partial.parse(name, segment_bytes)
            if match is not None:
                try:
                    segment = WalSegment.parse(match[1], segment_bytes)
                except ValueError:
                    continue
                numbers.setdefault(segment.timeline, set()).add(segment.number)
            elif partial is not None:
                partials.add(partial)
        return cls(
            segment_bytes,
            {timeline: tuple(sorted(found)) for timeline, found in sorted(numbers.items())},
            tuple(sorted(partials)),
            dict(sorted((histories or {}).items())),
        )

    @property
    def timelines(self) -> tuple[Timeline, ...]:
        """Every timeline of which the archive has WAL, ascending."""
        return tuple(sorted({*self.segments, *(partial.segment.timeline for partial in self.partials)}))

    @property
    def without_history(self) -> tuple[Timeline, ...]:
        """Timelines after the first whose history is missing: nothing ties them to their ancestors."""
        return tuple(
            timeline for timeline in self.timelines if timeline > 1 and timeline not in self.histories
        )

    def history(self, timeline: Timeline) -> TimelineHistory:
        """The ancestry of a timeline; a timeline without a history file stands alone."""
        return self.histories.get(timeline) or TimelineHistory(timeline)

    def has(self, segment: WalSegment) -> bool:
        """Whether the whole segment is there."""
        numbers = self.segments.get(segment.timeline, ())
        index = bisect_left(numbers, segment.number)
        return index < len(numbers) and numbers[index] == segment.number

    def source(self, segment: WalSegment) -> Literal["segment"] | Partial | None:
        """Where the segment's bytes come from: the whole, else its longest partial, else nowhere."""
        if self.has(segment):
            return "segment"
        return max((p for p in self.partials if p.segment == segment), default=None, key=lambda p: p.end)

    def covers(self, wanted: WalRange) -> bool:
        """Whether every byte of the range is there, on its timeline or (before a switch) its ancestors."""
        return wanted.start == wanted.end or self.end_from(wanted.timeline, wanted.start) >= wanted.end

    def end_from(self, timeline: Timeline, lsn: Lsn) -> Lsn:
        """The end of the WAL contiguous from `lsn` along the timeline's ancestry; `lsn` itself if none."""
        path = self.history(timeline).path()
        position = lsn
        while True:
            reached = max(self._reach(step, position) for step in path)
            if reached <= position:
                return position
            position = reached

    def _reach(self, step: tuple[Timeline, Lsn, Lsn | None], lsn: Lsn) -> Lsn:
        """How far the files of one timeline of a path go on from `lsn`."""
        timeline, begin, until = step
        number = lsn.value // self.segment_bytes
        if number < begin.value // self.segment_bytes or (until is not None and lsn >= until):
            return lsn
        end = Lsn(max(lsn.value, self._run_end(timeline, number) * self.segment_bytes))
        source = self.source(WalSegment(timeline, end.value // self.segment_bytes, self.segment_bytes))
        if isinstance(source, Partial):
            end = max(end, source.end)
        return end if until is None else min(end, until)

    def _run_end(self, timeline: Timeline, number: int) -> int:
        """The number after the run of whole segments that `number` starts; `number` if it is missing."""
        numbers = self.segments.get(timeline, ())
        first = bisect_left(numbers, number)
        if first == len(numbers) or numbers[first] != number:
            return number
        # In a sorted run numbers[i] - i is constant and grows at each hole: bisect for the hole.
        low, high = first, len(numbers)
        while high - low > 1:
            middle = (low + high) // 2
            if numbers[middle] - middle == number - first:
                low = middle
            else:
                high = middle
        return numbers[low] + 1

    def gaps(self) -> tuple[WalRange, ...]:
        """The holes: missing WAL with some before it and some after it on the same ancestry.

        What is missing before the oldest WAL was expired or never received, and is no hole. A hole
        is told on the timeline whose WAL is missing; overlapping ones are merged.
        """
        found: set[WalRange] = set()
        for timeline in self.timelines:
            found.update(self._holes(timeline))
        return merged(found)

    def _holes(self, timeline: Timeline) -> Iterator[WalRange]:
        path = self.history(timeline).path()
        starts = sorted({start for step in path for start in self._starts(step)})
        if not starts:
            return
        position = self.end_from(timeline, starts[0])
        while True:
            index = bisect_left(starts, position)
            if index == len(starts):
                return
            if starts[index] > position:
                yield from split(path, position, starts[index])
            position = self.end_from(timeline, starts[index])
            if position == starts[index]:
                return

    def _starts(self, step: tuple[Timeline, Lsn, Lsn | None]) -> Iterator[Lsn]:
        """Where the runs of files of one timeline of a path begin, as far as they belong to the path."""
        timeline, begin, until = step
        numbers = self.segments.get(timeline, ())
        run_starts = {n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1}
        run_starts |= {p.segment.number for p in self.partials if p.segment.timeline == timeline}
        for number in run_starts:
            start = Lsn(number * self.segment_bytes)
            if number >= begin.value // self.segment_bytes and (until is None or start < until):
                yield start


def split(path: list[tuple[Timeline, Lsn, Lsn | None]], start: Lsn, end: Lsn) -> Iterator[WalRange]:
    """Cut a range of positions at the switches of a path, each piece on the timeline it belongs to."""
    for timeline, begin, until in path:
        low = max(start, begin)
        high = end if until is None else min(end, until)
        if low < high:
            yield WalRange(timeline, low, high)


def merged(ranges: Iterable[WalRange]) -> tuple[WalRange, ...]:
    """The same positions in as few ranges as can be, by timeline and start."""
    result: list[WalRange] = []
    for piece in sorted(ranges, key=lambda r: (r.timeline, r.start, r.end)):
        last = result[-1] if result else None
        if last is not None and last.timeline == piece.timeline and piece.start <= last.end:
            result[-1] = WalRange(last.timeline, last.start, max(last.end, piece.end))
        elif piece.start < piece.end:
            result.append(piece)
    return tuple(result)


def subtracted(piece: WalRange, others: Iterable[WalRange]) -> tuple[WalRange, ...]:
    """What is left of a range without the others of its timeline."""
    left: list[WalRange] = []
    position = piece.start
    for other in merged(o for o in others if o.timeline == piece.timeline):
        if other.end <= position or other.start >= piece.end:
            continue
        if position < other.start:
            left.append(WalRange(piece.timeline, position, other.start))
        position = max(position, other.end)
    if position < piece.end:
        left.append(WalRange(piece.timeline, position, piece.end))
    return tuple(left)
