"""Where a restore is to end, and the plan to get there: never short of the target in silence.

Every target becomes the start LSN of a commit record that was read in the archive itself. The state a
plan leads to holds, whatever the target, exactly the commits up to that record (`inclusive`) or before it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from knockwood.errors import StorageUnavailableError, TargetUnreachableError, UsageError
from knockwood.host import clock
from knockwood.model.wal import Lsn, Timeline
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.repository import proved
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.backups.proofs import proved_clean, read_proofs
from knockwood.repository.choose import Choice, choose
from knockwood.repository.commits import ArchiveReader, Progress
from knockwood.repository.plans import (
    BeforeXid,
    Latest,
    Missing,
    RestorePlan,
    Target,
    ToLsn,
    ToTime,
    WalPiece,
)
from knockwood.repository.repository import Repository
from knockwood.repository.walk import Kept, workplace

_ATTEMPTS = 10
_BEFORE = re.compile(r"before[-:](?:xid[-:])?(\d+)\Z", re.IGNORECASE)


def parse_target(text: str) -> Target:
    """Read `latest`, `0/3000028`, `2026-11-21T04:45:00Z` or `before-1234`; raises UsageError.

    A time needs its zone: read as local or as UTC by mistake it would restore hours too much or too
    little, and nobody would notice.
    """
    words = text.strip()
    if words.lower() == "latest":
        return Latest()
    if match := _BEFORE.match(words):
        return _before(match[1])
    if "/" in words:
        try:
            return ToLsn(Lsn.parse(words))
        except ValueError:
            raise UsageError(f"not an LSN: {text!r}", hint="an LSN looks like 16/B374D848") from None
    try:
        moment = datetime.fromisoformat(re.sub(r"\s*UTC\Z", "+00:00", words, flags=re.IGNORECASE))
    except ValueError:
        raise UsageError(f"not a target: {text!r}", hint=_suggestion(words)) from None
    if moment.tzinfo is None:
        local = moment.astimezone()
        raise UsageError(
            f"the time has no zone: {text!r}",
            hint=f"did you mean {moment.isoformat()}Z (UTC) or {local.isoformat()} (local)?",
        )
    return ToTime(moment.astimezone(UTC))


def _before(digits: str) -> BeforeXid:
    # pg_current_xact_id() prints the epoch in the upper half; WAL has the lower only.
    xid = int(digits) & 0xFFFF_FFFF
    if xid < 3:
        raise UsageError(
            f"not the number of a transaction: {digits}", hint="ordinary transactions begin at 3"
        )
    return BeforeXid(xid)


def _suggestion(words: str) -> str:
    if words.isdigit():
        return f"did you mean before-{words} (the state before transaction {words})?"
    close = difflib.get_close_matches(
        words.lower(), ["latest", "last", "newest", "end", "now", "before"], 1, 0.6
    )
    if close:
        return "did you mean before-XID?" if close[0] == "before" else "did you mean latest?"
    return "give latest, an LSN (16/B374D848), a time with zone (2026-11-21T04:45:00Z) or before-XID"


def resolve(
    repository: Repository,
    target: Target,
    *,
    backup: str | None = None,
    timeline: Timeline | None = None,
    accept_loss: bool = False,
    prefer_proved: bool = True,
    unread: bool = False,
    programs_for: Callable[[int], Programs] = find_programs,
    progress: Progress | None = None,
    keep: Kept | None = None,
) -> RestorePlan:
    """Plan a restore to a target along the newest timeline's history (or the one given).

    All WAL from the backup to the target was read and checked, by this call or (objects unchanged since) by an
    earlier one with the same Repository object or an earlier `verify`. Raises TargetUnreachableError, naming the
    last reachable commit, where the target cannot be reached and `accept_loss` is not given, or where nothing
    can be restored at all; ObjectMissingError for an unknown backup; ProgramsMissingError, WrongKeyError.
    With `unread` (and no loss accepted) only the WAL at the target is read: for a clone that reads all of it
    itself, and calls `read_through` if it comes to nothing.
    The files that this call reads go to `keep`. Unless `prefer_proved` is off (for who is about to prove it), an
    incremental backup of which no proof held is taken only where no full one leads to the target.
    """
    for _ in range(_ATTEMPTS):
        asked = _Question(repository, programs_for, progress, keep, unread=unread and not accept_loss)
        asked.choose(target, timeline, backup, accept_loss=accept_loss, prefer_proved=prefer_proved)
        try:
            plan = asked.answer()
        except TargetUnreachableError:
            if not asked.overtaken():
                raise
        else:
            if not (asked.broken and asked.overtaken()):
                return plan
    raise StorageUnavailableError(
        "the archive changed faster than it could be read",
        where=repository.storage.url,
        hint="try again; is the storage very slow?",
    )


def read_through(
    repository: Repository, plan: RestorePlan, programs_for: Callable[[int], Programs] = find_programs
) -> RestorePlan:
    """The plan with all of its WAL read. Raises TargetUnreachableError, as `resolve`, where that is not whole."""
    if not plan.unread:
        return plan
    end = plan.target_lsn if plan.target_lsn is not None else plan.backup.stop_lsn
    found = resolve(
        repository, ToLsn(end), timeline=plan.timeline, backup=plan.backup.id, programs_for=programs_for
    )
    known = {piece.segment: piece for piece in found.wal}
    return replace(plan, wal=tuple(known.get(piece.segment, piece) for piece in plan.wal), unread=False)


class _Question:
    """One look at an archive that may be written to meanwhile."""

    def __init__(
        self,
        repository: Repository,
        programs_for: Callable[[int], Programs],
        progress: Progress | None,
        keep: Kept | None,
        *,
        unread: bool,
    ) -> None:
        self._repository = repository
        self._programs_for = programs_for
        self._progress = progress
        self._keep = keep
        self._unread = unread
        # Backups first: one that is listed has its WAL there already.
        self._backups = list_backups(repository)
        archive = WalArchive(repository)
        self._listing = archive.listing()
        self._inventory = archive.inventory_of(self._listing)
        self._readers: list[ArchiveReader] = []
        self._choice = Choice(Latest(), self._backups, self._inventory)

    def choose(
        self,
        target: Target,
        timeline: Timeline | None,
        backup: str | None,
        *,
        accept_loss: bool,
        prefer_proved: bool,
    ) -> None:
        """Say what is asked for."""
        known = None
        if prefer_proved and any(each.kind != "full" for each in self._backups):
            known = proved_clean(read_proofs(self._repository))
        self._choice = Choice(target, self._backups, self._inventory, timeline, backup, accept_loss, known)

    @property
    def broken(self) -> bool:
        """Whether some WAL that was listed could not be read."""
        return any(reader.breaks or reader.vanished for reader in self._readers)

    def answer(self) -> RestorePlan:
        state = proved.known(self._repository, self._listing)
        with workplace(self._keep) as folder:

            def lookup(major: int) -> ArchiveReader:
                programs = self._programs_for(major)
                self._readers.append(
                    ArchiveReader(
                        self._repository,
                        self._inventory,
                        self._listing,
                        programs,
                        folder,
                        state,
                        self._progress,
                        self._keep,
                        unread=self._unread,
                    )
                )
                return self._readers[-1]

            try:
                return replace(choose(self._choice, lookup), unread=self._unread)
            finally:
                self._remember()

    def _remember(self) -> None:
        """Keep what was read for the next question that is asked of this repository."""
        moment = clock.now()
        for reader in self._readers:
            self._repository.read_before.update({entry.name: entry for entry in reader.proved(moment)})

    def overtaken(self) -> bool:
        """Whether something listed was replaced by something longer while it was read.

        A receiver deletes a partial segment once a longer one is stored. Read as the end of the archive,
        that would end a restore early and in silence.
        """
        now = {info.name for info in self._repository.storage.list("wal/partial/")}
        return any(name.startswith("wal/partial/") and name not in now for name in self._listing)


__all__ = [
    "BeforeXid",
    "Latest",
    "Missing",
    "RestorePlan",
    "Target",
    "ToLsn",
    "ToTime",
    "WalPiece",
    "parse_target",
    "read_through",
    "resolve",
]
