"""Choose the backup and the commit record for a target. Pure: it asks a CommitLookup for what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from knockwood.errors import ObjectMissingError, TargetUnreachableError
from knockwood.model.finding import Verdict
from knockwood.model.proof import Commit
from knockwood.model.wal import Lsn, Timeline
from knockwood.repository.backups.model import Backup, chain
from knockwood.repository.backups.proofs import is_unproved
from knockwood.repository.commits import CommitLookup
from knockwood.repository.inventory import ArchiveInventory
from knockwood.repository.plans import (
    Latest,
    Missing,
    RestorePlan,
    Target,
    ToLsn,
    ToTime,
    WalPiece,
)
from knockwood.repository.route import Reach, Route, Stop, record_floor


@dataclass(frozen=True, slots=True)
class Choice:
    """What is asked for, and what there is. `backup` and `timeline` narrow the choice.

    `proved` are backups of which a proof held; None: it makes no difference.
    """

    target: Target
    backups: Sequence[Backup]
    inventory: ArchiveInventory
    timeline: Timeline | None = None
    backup: str | None = None
    accept_loss: bool = False
    proved: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class _End:
    """Where a restore from one backup can end: at the target (`short` is None), or short of it."""

    backup: Backup
    reach: Reach
    stop_at: Commit | None
    inclusive: bool
    last: Commit | None
    short: Missing | None


def newest_timeline(choice: Choice) -> Timeline:
    """The newest timeline known by WAL, history or backup."""
    inventory = choice.inventory
    known = {*inventory.timelines, *inventory.histories, *(b.timeline for b in choice.backups)}
    return max(known, default=Timeline(1))


def choose(choice: Choice, lookup_for: Callable[[int], CommitLookup]) -> RestorePlan:
    """The plan for a target; `lookup_for` gives the reader for a major version's WAL.

    Raises TargetUnreachableError where the target lies past what can be restored (and the loss is not
    accepted) or no backup can be used; ObjectMissingError for an unknown backup.
    """
    route = Route(choice.inventory, choice.timeline or newest_timeline(choice))
    candidates, reasons = _candidates(choice, route)
    if not candidates:
        why = "; ".join(reasons) or "there is none"
        raise TargetUnreachableError(
            f"no backup can be restored on timeline {route.timeline}: {why}",
            hint="take a base backup now: `knockwood backup`",
        )
    chooser = _Chooser(choice, route, lookup_for(candidates[0].major), reasons)
    ends: list[_End] = []
    for backup in candidates:
        end = chooser.attempt(backup)
        if end is None:
            continue
        if end.short is None:
            return chooser.plan(end)
        ends.append(end)
    return chooser.fall_short(ends)


def _candidates(choice: Choice, route: Route) -> tuple[list[Backup], list[str]]:
    """Backups on the route, the sound and newest first; and why others are out.

    An incremental backup that nobody has proved comes after all full ones, which need more WAL: PostgreSQL may leave
    pages out of it (decision 13).
    """
    if choice.backup is not None and all(b.id != choice.backup for b in choice.backups):
        raise ObjectMissingError(
            f"there is no complete backup {choice.backup}", hint="`knockwood backups` lists those there are"
        )
    found: list[Backup] = []
    reasons: list[str] = []
    for backup in choice.backups:
        if choice.backup not in (None, backup.id):
            continue
        if not route.holds(backup.timeline, backup.stop_lsn):
            reasons.append(f"{backup.id} lies on timeline {backup.timeline}, past where it was left")
            continue
        try:
            chain(choice.backups, backup.id)
        except TargetUnreachableError as error:
            reasons.append(error.what)
            continue
        found.append(backup)
    found.sort(key=lambda b: (b.stop_lsn, b.finished_at), reverse=True)
    found.sort(key=lambda b: (_broken(choice.backups, b), _unproved(choice, b)))
    return found, reasons


def _unproved(choice: Choice, backup: Backup) -> bool:
    return choice.proved is not None and is_unproved(backup, choice.proved)


def _broken(backups: Sequence[Backup], backup: Backup) -> bool:
    return any(link.health.verdict is Verdict.BROKEN for link in chain(backups, backup.id))


class _Chooser:
    """One route and one reader; tries backup after backup."""

    def __init__(self, choice: Choice, route: Route, lookup: CommitLookup, reasons: list[str]) -> None:
        self._choice = choice
        self._route = route
        self._lookup = lookup
        self._reasons = reasons

    # --- one backup --------------------------------------------------------------------------------

    def attempt(self, backup: Backup) -> _End | None:
        """Where a restore from this backup can end; None if it is not suited at all (with a reason)."""
        target = self._choice.target
        if isinstance(target, ToLsn) and target.lsn < backup.stop_lsn:
            self._reasons.append(f"{backup.id} is consistent only from {backup.stop_lsn}")
            return None
        facts = self._lookup.read(self._route, backup.start_lsn, backup.stop_lsn)
        reach = self._route.reach(backup.start_lsn, facts)
        if reach.end < backup.stop_lsn:
            self._reasons.append(
                f"{backup.id} needs WAL {backup.start_lsn}..{backup.stop_lsn} for consistency: {reach.reason}"
            )
            return None
        if isinstance(target, Latest):
            return self._latest(backup)
        if isinstance(target, ToLsn):
            return self._to_lsn(backup, target.lsn)
        if isinstance(target, ToTime):
            return self._to_time(backup, target.time)
        return self._before(backup, target.xid)

    def _reach(self, backup: Backup, until: Lsn) -> Reach:
        facts = self._lookup.read(self._route, backup.start_lsn, min(until, self._route.archive_end()))
        return self._route.reach(backup.start_lsn, facts)

    def _last(self, backup: Backup, until: Lsn, before: Lsn | None = None) -> tuple[Reach, Commit | None]:
        """How far the WAL up to `until` can be followed, and the last commit there, starting before `before`.

        Where the WAL is not read otherwise, looking for the commit may be what shows damage.
        """
        reach = self._reach(backup, until)
        while True:
            end = reach.end if before is None else min(before, reach.end)
            last = self._lookup.last(self._route, backup.stop_lsn, end)
            again = self._reach(backup, until)
            if again == reach:
                return reach, last
            reach = again

    def _latest(self, backup: Backup) -> _End:
        reach, last = self._last(backup, self._route.archive_end())
        short = None
        if reach.stop is not Stop.END:
            short = self._missing(reach, last, self._route.archive_end(), None, reach.reason)
        return _End(backup, reach, last, True, self._contained(backup, last), short)

    def _to_lsn(self, backup: Backup, lsn: Lsn) -> _End:
        # A commit record that begins at the target may go on into the next segment.
        reach, last = self._last(backup, lsn + self._route.segment_bytes, lsn + 1)
        wanted = record_floor(lsn, self._route.segment_bytes)
        short = self._missing(reach, last, lsn, None, reach.reason) if reach.end < wanted else None
        return _End(backup, reach, last, True, self._contained(backup, last), short)

    def _to_time(self, backup: Backup, moment: datetime) -> _End | None:
        inside = self._lookup.last(self._route, backup.start_lsn, backup.stop_lsn)
        later = self._lookup.first_after(self._route, moment, backup.start_lsn, backup.stop_lsn)
        if later is not None or (inside is None and backup.finished_at > moment):
            self._reasons.append(f"{backup.id} is later (it ended at {backup.finished_at.isoformat()})")
            return None
        whole = self._route.inventory.end_from(self._route.timeline, backup.start_lsn)
        first = self._lookup.first_after(self._route, moment, backup.stop_lsn, whole)
        if first is not None:
            reach = self._reach(backup, first.lsn + 1)
            if first.lsn < reach.end:
                last = self._lookup.last(self._route, backup.stop_lsn, first.lsn)
                return _End(backup, reach, first, False, self._contained(backup, last), None)
        reach = self._reach(backup, self._route.archive_end())
        last = self._lookup.last(self._route, backup.stop_lsn, reach.end)
        contained = self._contained(backup, last)
        if last is not None and last.time == moment and reach.stop is Stop.END:
            return _End(backup, reach, last, True, contained, None)
        reason = reach.reason
        if reach.stop is Stop.END:
            reason = f"no commit later than {moment.isoformat()} has reached the archive"
        end = self._route.archive_end() if reach.stop is not Stop.END else None
        return _End(backup, reach, last, True, contained, self._missing(reach, last, end, moment, reason))

    def _before(self, backup: Backup, xid: int) -> _End | None:
        reach = self._reach(backup, self._route.archive_end())
        found = self._lookup.of(self._route, xid, backup.stop_lsn, reach.end)
        if found is not None:
            last = self._lookup.last(self._route, backup.stop_lsn, found.lsn)
            return _End(backup, reach, found, False, self._contained(backup, last), None)
        if reach.stop is Stop.END:
            self._reasons.append(f"no commit of transaction {xid} after backup {backup.id}")
            return None
        beyond = self._lookup.of(self._route, xid, reach.end, self._route.archive_end())
        if beyond is None:
            self._reasons.append(
                f"no commit of transaction {xid} from backup {backup.id} to {reach.end}, where {reach.reason}"
            )
            return None
        last = self._lookup.last(self._route, backup.stop_lsn, reach.end)
        short = self._missing(reach, last, beyond.lsn, beyond.time, reach.reason)
        return _End(backup, reach, last, True, self._contained(backup, last), short)

    def _contained(self, backup: Backup, last: Commit | None) -> Commit | None:
        return last or self._lookup.last(self._route, backup.start_lsn, backup.stop_lsn)

    def _missing(
        self, reach: Reach, last: Commit | None, end: Lsn | None, moment: datetime | None, reason: str
    ) -> Missing:
        archive_end = self._route.archive_end()
        beyond = min(end, archive_end) if end is not None else archive_end
        begin = reach.end if reach.stop is not Stop.END else beyond
        lost = 0
        if begin < beyond:
            self._lookup.read(self._route, begin, beyond)
            lost = self._lookup.count(self._route, begin, beyond)
            final = self._lookup.last(self._route, begin, beyond)
            moment = moment or (final.time if final is not None else None)
        return Missing(
            reach.timeline, reach.end, end, last.time if last is not None else None, moment, lost, reason
        )

    # --- the answer --------------------------------------------------------------------------------

    def plan(self, end: _End) -> RestorePlan:
        """The plan that ends there."""
        links = chain(self._choice.backups, end.backup.id)
        stop_at = end.stop_at
        # The record may go on into the next segment; the backup itself needs all up to its stop.
        until = end.backup.stop_lsn if stop_at is None else stop_at.lsn + self._route.segment_bytes
        until = max(min(until, end.reach.end), end.backup.stop_lsn)
        pieces = self._route.pieces(end.backup.start_lsn, until)
        known = self._lookup.read(self._route, end.backup.start_lsn, until).segments
        histories = [step[0] for step in self._route.path if step[0] in self._route.inventory.histories]
        return RestorePlan(
            chain=links,
            timeline=self._route.timeline,
            target_lsn=stop_at.lsn if stop_at is not None else None,
            inclusive=end.inclusive if stop_at is not None else True,
            wal=tuple(
                WalPiece(
                    segment,
                    partial.name if partial else None,
                    facts.makes_tablespace if (facts := known.get(segment)) is not None else None,
                )
                for segment, partial in pieces
            ),
            histories=tuple(histories),
            last_commit=end.last,
            missing=end.short,
            warnings=_warnings(links, unproved=_unproved(self._choice, end.backup)),
        )

    def fall_short(self, ends: Sequence[_End]) -> RestorePlan:
        """No backup leads to the target: refuse, or (if the loss is accepted) go as far as can be."""
        target = self._choice.target
        if not ends:
            raise TargetUnreachableError(
                f"{target} cannot be restored: {'; '.join(self._reasons) or 'no backup leads there'}",
                hint="`knockwood verify` lists what can be restored",
            )
        best = max(ends, key=lambda end: end.reach.end)
        if self._choice.accept_loss:
            return self.plan(best)
        raise TargetUnreachableError(_refusal(target, best), hint=_way_out(best))


def _refusal(target: Target, end: _End) -> str:
    assert end.short is not None
    short = end.short
    last = _named(end.last) if end.last else "no commit after the backup is known"
    text = f"{target} cannot be reached: the WAL ends at {short.start} on timeline {short.timeline}"
    text += f" ({short.reason}); the last reachable commit is {last}"
    if end.reach.stop is not Stop.END:
        seen = f", with {short.commits} commits seen" if short.commits else ""
        later = f" of up to {short.end_time.isoformat()}" if short.end_time else ""
        text += f"; there is later WAL{later} up to {short.end}{seen} that cannot be reached"
    return text


def _named(commit: Commit) -> str:
    return f"transaction {commit.xid} at {commit.lsn}, {commit.time.isoformat()}"


def _way_out(end: _End) -> str:
    if end.reach.stop is Stop.END:
        return "`--to latest` restores all there is; has the primary's newest WAL arrived?"
    return (
        "is the missing or damaged WAL still on the primary or in another copy? push it, or restore with "
        "--accept-loss up to the last reachable commit"
    )


def _warnings(links: Sequence[Backup], *, unproved: bool) -> tuple[str, ...]:
    found = [
        f"backup {link.id} has {link.health.bad_page_count} bad pages and no better one leads to the target"
        for link in links
        if link.health.verdict is Verdict.BROKEN
    ]
    if unproved:
        found.append(
            f"backup {links[-1].id} is incremental and was never proved: PostgreSQL may have left pages out of it"
        )
    return tuple(found)
