"""Retention: a pure plan of what may go, and its execution in an order that a crash cannot spoil."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from knockwood.host import clock
from knockwood.model import Lsn, Verdict, WalRange, WalSegment
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.listing import COMMIT_MARK, age_order, scan_backups
from knockwood.repository.backups.model import Backup
from knockwood.repository.backups.proofs import proved_clean, read_proofs
from knockwood.repository.backups.take import LEASE, remove_leftovers, remove_objects
from knockwood.repository.inventory import ArchiveInventory
from knockwood.repository.leases import lease
from knockwood.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class ExpiryPlan:
    """What goes and why the rest stays.

    `remove` is ordered so that no backup goes before those that build on it. `remove_wal` holds whole
    segments, `remove_partials` names of objects without suffix; `kept` maps the id of each kept backup
    to the reason.
    """

    remove: tuple[Backup, ...]
    remove_wal: tuple[WalSegment, ...]
    remove_partials: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def wal_ranges(self) -> tuple[WalRange, ...]:
        """The WAL to be removed, neighbours joined."""
        ranges: list[WalRange] = []
        for segment in sorted(self.remove_wal):
            if ranges and ranges[-1].timeline == segment.timeline and ranges[-1].end == segment.start:
                ranges[-1] = WalRange(segment.timeline, ranges[-1].start, segment.end)
            else:
                ranges.append(WalRange(segment.timeline, segment.start, segment.end))
        return tuple(ranges)


def plan_expiry(
    backups: Sequence[Backup],
    proofs: Iterable[Any],
    inventory: ArchiveInventory,
    *,
    keep_time: timedelta | None,
    keep_count: int | None,
    now: datetime,
) -> ExpiryPlan:
    """Decide what retention no longer needs. Pure.

    `keep_time`: every moment of that long ago until now stays restorable, so the newest backup before
    it stays too. `keep_count`: so many of the newest full backups stay, with all that build on them.
    With both, what either keeps stays; with none, nothing goes. In any case the newest backup stays,
    the newest without known damage, the newest that a proof found clean, and every chain whole. WAL
    goes only if it is older than the start of every kept backup, on their own timelines and the
    timelines they came from.
    """
    kept = _wanted(backups, list(proofs), keep_time, keep_count, now)
    by_id = {backup.id: backup for backup in backups}
    for id in list(kept):
        parent = by_id[id].parent
        while parent is not None and parent in by_id:
            kept.setdefault(parent, f"{id} builds on it")
            parent = by_id[parent].parent
    gone = [backup for backup in sorted(backups, key=age_order, reverse=True) if backup.id not in kept]
    remove = tuple(sorted(gone, key=lambda backup: -_depth(backup, by_id)))
    remaining = [backup for backup in backups if backup.id in kept]
    if not remaining or (keep_time is None and keep_count is None):
        return ExpiryPlan(remove, (), (), kept)
    # Any kept backup may be restored along any timeline that branched off later, so only WAL before
    # the earliest start of all is free to go, whatever its timeline.
    earliest = min(backup.start_lsn for backup in remaining)
    partials = tuple(partial.name for partial in inventory.partials if partial.end <= earliest)
    return ExpiryPlan(remove, _wal(earliest, inventory), partials, kept)


def _depth(backup: Backup, known: Mapping[str, Backup]) -> int:
    """How many backups it builds on."""
    seen = {backup.id}
    parent = backup.parent
    while parent is not None and parent in known and parent not in seen:
        seen.add(parent)
        parent = known[parent].parent
    return len(seen)


def _wanted(
    backups: Sequence[Backup],
    proofs: list[Any],
    keep_time: timedelta | None,
    keep_count: int | None,
    now: datetime,
) -> dict[str, str]:
    if keep_time is None and keep_count is None:
        return {backup.id: "no retention is set" for backup in backups}
    ordered = sorted(backups, key=age_order)
    kept: dict[str, str] = {}
    if ordered:
        kept[ordered[-1].id] = "it is the newest"
        # A clock may have jumped: what was taken last by the clock stays as well.
        kept.setdefault(max(ordered, key=lambda backup: backup.finished_at).id, "it is the newest by time")
    healthy = [backup for backup in ordered if backup.health.verdict != Verdict.BROKEN]
    if healthy:
        kept.setdefault(healthy[-1].id, "it is the newest without known damage")
    clean = proved_clean(proofs)
    proved = [backup for backup in ordered if backup.id in clean]
    if proved:
        kept.setdefault(proved[-1].id, "it is the newest that was proved clean")
    if keep_time is not None:
        _keep_time(ordered, now - keep_time, kept)
    if keep_count is not None:
        _keep_count(ordered, keep_count, kept)
    return kept


def _keep_time(ordered: list[Backup], since: datetime, kept: dict[str, str]) -> None:
    for backup in ordered:
        if backup.finished_at >= since:
            kept.setdefault(backup.id, f"it was taken after {since:%Y-%m-%d %H:%M}")
    # Damage must not be all that is left to restore the oldest moment from.
    older = [backup for backup in ordered if backup.finished_at < since]
    sound = [backup for backup in older if backup.health.verdict != Verdict.BROKEN]
    for backup in (*older[-1:], *sound[-1:]):
        kept.setdefault(backup.id, f"{since:%Y-%m-%d %H:%M} is restored from it")


def _keep_count(ordered: list[Backup], count: int, kept: dict[str, str]) -> None:
    full = [backup for backup in ordered if backup.kind == "full"]
    if not full:
        return
    sound = [backup for backup in full if backup.health.verdict != Verdict.BROKEN]
    if count <= 0:
        return
    # Where there are fewer sound ones than wanted, the damaged are better than nothing.
    oldest = sound[-count] if len(sound) >= count else full[0]
    for backup in ordered[ordered.index(oldest) :]:
        kept.setdefault(backup.id, f"the newest {count} full backups stay")


def _wal(earliest: Lsn, inventory: ArchiveInventory) -> tuple[WalSegment, ...]:
    segments = (
        WalSegment(timeline, number, inventory.segment_bytes)
        for timeline, numbers in inventory.segments.items()
        for number in numbers
    )
    return tuple(sorted(segment for segment in segments if segment.end <= earliest))


def expire(
    repository: Repository,
    *,
    keep_time: timedelta | None = None,
    keep_count: int | None = None,
    apply: bool = False,
    on_removed: Callable[[str], None] | None = None,
    now: datetime | None = None,
) -> ExpiryPlan:
    """Plan the expiry, and with `apply` carry it out; a killed run is finished by the next.

    A backup's description goes first, so that one half gone is never listed; WAL goes last, when no
    listed backup needs it, the oldest first, so that what remains has no hole. Raises LockHeldError
    while a backup is taken or another expiry runs.
    """
    with lease(repository, LEASE, "expiring backups") as held:
        backups, unreadable = scan_backups(repository)
        inventory = WalArchive(repository).inventory()
        plan = plan_expiry(
            backups,
            read_proofs(repository),
            inventory,
            keep_time=keep_time,
            keep_count=keep_count,
            now=now or clock.now().astimezone(UTC),
        )
        if unreadable:
            # Which WAL an unreadable backup needs is unknown: none goes.
            plan = ExpiryPlan(plan.remove, (), (), plan.kept)
        if apply:
            for backup in plan.remove:
                held.assert_held()
                repository.storage.delete(backup.folder + COMMIT_MARK)
                if on_removed is not None:
                    on_removed(backup.id)
            for backup in plan.remove:
                remove_objects(repository, backup.id)
            remove_leftovers(repository)
            _remove_wal(repository, plan)
        return plan


def _remove_wal(repository: Repository, plan: ExpiryPlan) -> None:
    doomed = {segment.name for segment in plan.remove_wal}
    for info in list(repository.storage.list("wal/")):
        name = info.name.rsplit("/", 1)[-1].split(".", 1)[0]
        if name in doomed and not info.name.startswith("wal/partial/"):
            repository.storage.delete(info.name)
    _remove_derived(repository)
    for partial in plan.remove_partials:
        if (stored := repository.find(partial)) is not None:
            repository.storage.delete(stored)


def _remove_derived(repository: Repository) -> None:
    """Remove the history's index of segments that are gone, also of those an earlier, killed run removed."""
    kept = {info.name.rsplit("/", 1)[-1].split(".", 1)[0] for info in repository.storage.list("wal/")}
    for info in list(repository.storage.list("history/index/")):
        if info.name.rsplit("/", 1)[-1].split(".", 1)[0] not in kept:
            repository.storage.delete(info.name)
