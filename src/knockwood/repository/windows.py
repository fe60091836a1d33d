"""From backups, the archive's list and what was read of it: what can be restored, and what cannot. Pure.

A position can be restored if a usable backup ends before it and the WAL from that backup's start up to
the position is whole. Windows follow histories: one that began on timeline 1 goes on along timeline 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalSegment
from knockwood.repository.backups.model import Backup
from knockwood.repository.inventory import ArchiveInventory
from knockwood.repository.route import Reach, Route, Stop, WalFacts, last_commit_time


@dataclass(frozen=True, slots=True)
class Window:
    """A range that can be restored from `backup` on (its oldest) along `timeline`.

    `start_time` is when that backup ended, or for a branch the time of the switch's last commit;
    `end_time` is the last commit's. None where no commit is known.
    """

    timeline: Timeline
    start: Lsn
    start_time: datetime | None
    end: Lsn
    end_time: datetime | None
    backup: str

    def as_json(self) -> dict[str, Any]:
        return {
            "timeline": self.timeline,
            "backup": self.backup,
            "from": _point(self.start, self.start_time),
            "to": _point(self.end, self.end_time),
        }


@dataclass(frozen=True, slots=True)
class Gap:
    """A range that cannot be restored, and why. `start_time` is the last commit's that can be, `end_time`
    that of the next restorable point; None where there is none."""

    timeline: Timeline
    start: Lsn
    end: Lsn
    start_time: datetime | None
    end_time: datetime | None
    reason: str
    segment: str | None = None
    object: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "timeline": self.timeline,
            "from": _point(self.start, self.start_time),
            "to": _point(self.end, self.end_time),
            "reason": self.reason,
            "segment": self.segment,
            "object": self.object,
        }


@dataclass(frozen=True, slots=True)
class Unusable:
    """A backup that no restore can begin with, and why."""

    backup: str
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {"backup": self.backup, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Map:
    """All of it: windows, gaps and unusable backups."""

    windows: tuple[Window, ...]
    gaps: tuple[Gap, ...]
    unusable: tuple[Unusable, ...]


@dataclass(frozen=True, slots=True)
class _Stretch:
    start: Lsn
    end: Lsn
    first: Backup
    reach: Reach


def survey(
    backups: Sequence[Backup],
    inventory: ArchiveInventory,
    facts: WalFacts,
    broken: Mapping[str, str] | None = None,
) -> Map:
    """Map what can be restored. `broken` names backups whose own objects are damaged, with the reason."""
    unusable = dict(broken or {})
    unusable.update(_broken_chains(backups, unusable))
    for backup in backups:
        if backup.id not in unusable and (reason := inconsistent(backup, inventory, facts)):
            unusable[backup.id] = reason
    usable = [backup for backup in backups if backup.id not in unusable]
    windows: list[Window] = []
    gaps: list[Gap] = []
    done: list[Route] = []
    known = {*inventory.timelines, *(b.timeline for b in backups), *inventory.histories}
    for timeline in sorted(known, reverse=True):
        route = Route(inventory, timeline)
        told = shared(route, done)
        done.append(route)
        on_route = [b for b in backups if route.holds(b.timeline, b.stop_lsn)]
        stretches = _stretches(route, [b for b in usable if b in on_route], facts)
        windows.extend(_windows(route, stretches, facts, told))
        gaps.extend(_gaps(route, stretches, on_route, facts, told, unusable))
    return Map(tuple(windows), tuple(gaps), tuple(Unusable(k, v) for k, v in sorted(unusable.items())))


def inconsistent(backup: Backup, inventory: ArchiveInventory, facts: WalFacts) -> str | None:
    """Why a backup lacks the WAL without which it is not consistent, or None if it is all there."""
    reach = Route(inventory, backup.timeline).reach(backup.start_lsn, facts)
    if reach.end >= backup.stop_lsn:
        return None
    return (
        f"the WAL that makes it consistent ({backup.start_lsn}..{backup.stop_lsn} on timeline"
        f" {backup.timeline}) is not whole: {reach.reason}"
    )


def _broken_chains(backups: Sequence[Backup], broken: Mapping[str, str]) -> dict[str, str]:
    known = {backup.id: backup for backup in backups}
    found: dict[str, str] = {}
    for backup in backups:
        link, seen = backup, {backup.id}
        while link.kind == "incremental" and backup.id not in found:
            parent = link.parent or "?"
            if parent not in known or parent in seen:
                found[backup.id] = f"it builds on {parent}, which is not in the repository"
            elif parent in broken:
                found[backup.id] = f"it builds on {parent}, which cannot be used: {broken[parent]}"
            else:
                seen.add(parent)
                link = known[parent]
    return {id: reason for id, reason in found.items() if id not in broken}


def shared(route: Route, others: Sequence[Route]) -> Lsn:
    """Up to where a route is the same as one of the others: what lies before was told with that one."""
    furthest = Lsn(0)
    for other in others:
        for timeline, begin, until in route.path:
            left = other.leaves(timeline)
            if left is False:
                break
            ends = [end for end in (until, left) if isinstance(end, Lsn)]
            furthest = max(furthest, begin, min(ends, default=begin))
    return furthest


def _stretches(route: Route, usable: Sequence[Backup], facts: WalFacts) -> list[_Stretch]:
    merged: list[_Stretch] = []
    for backup in sorted(usable, key=lambda b: b.stop_lsn):
        reach = route.reach(backup.start_lsn, facts)
        if reach.end < backup.stop_lsn:
            continue
        last = merged[-1] if merged else None
        if last is not None and backup.stop_lsn <= last.end:
            if reach.end > last.end:
                merged[-1] = _Stretch(last.start, reach.end, last.first, reach)
        else:
            merged.append(_Stretch(backup.stop_lsn, reach.end, backup, reach))
    return merged


def _windows(route: Route, stretches: Sequence[_Stretch], facts: WalFacts, told: Lsn) -> Iterator[Window]:
    for stretch in stretches:
        start = max(stretch.start, told)
        if stretch.end < start or (told.value and stretch.end == start):
            continue
        begun = stretch.first.finished_at if start == stretch.start else _time(route, start, facts)
        ended = _time(route, stretch.end, facts, stretch.first.start_lsn)
        yield Window(route.timeline, start, begun, stretch.end, ended, stretch.first.id)


def _gaps(
    route: Route,
    stretches: Sequence[_Stretch],
    on_route: Sequence[Backup],
    facts: WalFacts,
    told: Lsn,
    unusable: Mapping[str, str],
) -> Iterator[Gap]:
    end = route.archive_end()
    oldest = min(on_route, key=lambda b: b.start_lsn, default=None)
    if not stretches:
        yield from _all_lost(route, oldest, facts, told, unusable, end)
        return
    if oldest is not None and oldest.id in unusable and oldest.start_lsn < stretches[0].start:
        gap = _lost_backup(oldest, stretches[0], unusable)
        if gap.end > told:
            yield gap
    for index, stretch in enumerate(stretches):
        following = stretches[index + 1] if index + 1 < len(stretches) else None
        until = following.start if following else end
        if stretch.reach.stop is Stop.END or until <= max(stretch.end, told):
            continue
        yield Gap(
            route.timeline,
            max(stretch.end, told),
            until,
            _time(route, stretch.end, facts),
            following.first.finished_at if following else None,
            stretch.reach.reason,
            stretch.reach.segment.name,
            stretch.reach.object,
        )


def _lost_backup(oldest: Backup, first: _Stretch, unusable: Mapping[str, str]) -> Gap:
    reason = f"backup {oldest.id} cannot be used: {unusable[oldest.id]}"
    return Gap(oldest.timeline, oldest.start_lsn, first.start, None, first.first.finished_at, reason)


def _all_lost(
    route: Route,
    oldest: Backup | None,
    facts: WalFacts,
    told: Lsn,
    unusable: Mapping[str, str],
    end: Lsn,
) -> Iterator[Gap]:
    first = route.archive_start()
    start = oldest.start_lsn if oldest is not None else first
    if start is None or end <= max(start, told):
        return
    if oldest is None:
        reason = "no base backup lies on this timeline's ancestry"
    else:
        reason = f"backup {oldest.id} cannot be used: {unusable.get(oldest.id, 'its WAL is not whole')}"
    yield Gap(route.timeline, max(start, told), end, None, None, reason)


def _time(route: Route, before: Lsn, facts: WalFacts, since: Lsn | None = None) -> datetime | None:
    """The time of the last commit before a position, from what was read."""
    return last_commit_time(facts, _backwards(route, before, since or Lsn(0)), before)


def _backwards(route: Route, before: Lsn, since: Lsn) -> Iterator[WalSegment]:
    number = max(before.value - 1, 0) // route.segment_bytes
    while number >= since.value // route.segment_bytes:
        piece = route.piece(number)
        if piece is None:
            return
        yield piece[0]
        number -= 1


def _point(lsn: Lsn, time: datetime | None) -> dict[str, Any]:
    return {"lsn": str(lsn), "time": time.isoformat() if time else None}


def disagreements(histories: Mapping[Timeline, TimelineHistory]) -> Iterator[tuple[Timeline, str]]:
    """Histories that tell another ancestry than their parent's own history does."""
    for timeline, history in histories.items():
        for index, (parent, _) in enumerate(history.switches):
            known = histories.get(parent)
            if known is not None and known.switches != history.switches[:index]:
                yield timeline, f"tells another past than the history of timeline {parent}"
