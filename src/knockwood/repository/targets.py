"""Where a restore is to end, and the plan to get there: never short of the target in silence.

Every target becomes the start LSN of a commit record that was read in the archive itself. The state a
plan leads to holds, whatever the target, exactly the commits up to that record (`inclusive`) or before it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from datetime import UTC, datetime

from knockwood.errors import UsageError
from knockwood.model.wal import Lsn, Timeline
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.repository import proved
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.listing import list_backups
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
from knockwood.repository.walk import workplace

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
    programs_for: Callable[[int], Programs] = find_programs,
    progress: Progress | None = None,
) -> RestorePlan:
    """Plan a restore to a target along the newest timeline's history (or the one given).

    All WAL from the backup to the target was read and checked, by this call or (objects unchanged
    since) by an earlier `verify`. Raises TargetUnreachableError, naming the last reachable commit, where
    the target cannot be reached and `accept_loss` is not given, or where nothing can be restored at all;
    ObjectMissingError for an unknown backup; ProgramsMissingError, WrongKeyError.
    """
    backups = list_backups(repository)
    inventory = WalArchive(repository).inventory()
    listing = {info.name: info for info in repository.storage.list("wal/")}
    state = proved.load(repository, repository.storage.list(proved.FOLDER))
    with workplace() as folder:

        def lookup(major: int) -> ArchiveReader:
            programs = programs_for(major)
            return ArchiveReader(repository, inventory, listing, programs, folder, state, progress)

        return choose(Choice(target, backups, inventory, timeline, backup, accept_loss), lookup)


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
    "resolve",
]
