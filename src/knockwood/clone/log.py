"""What a server in recovery said in its log, told as an error that names the cause and the way out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from knockwood.clone.goal import GUARD_STATUS, Goal
from knockwood.errors import (
    NoSpaceError,
    PostgresError,
    RecoveryFailedError,
    WrongSystemError,
)
from knockwood.model.wal import Lsn

_STOP = re.compile(
    r"recovery stopping (?P<side>before|after) WAL location \(LSN\) \"(?P<lsn>[0-9A-F]+/[0-9A-F]+)\""
    r"|recovery stopping after reaching consistency"
)
_CONSISTENT = re.compile(r"consistent recovery state reached at ([0-9A-F]+/[0-9A-F]+)")
_GUARD = re.compile(rf"could not restore file \"[0-9A-F]{{8}}\.history\".* exit code {GUARD_STATUS}\b")
_LEVEL = re.compile(r"\] (?:FATAL|PANIC|ERROR|WARNING|LOG):  (.*)")
_BAD_WAL = re.compile(
    r"incorrect resource manager data checksum|invalid magic number|unexpected pageaddr|incorrect prev-link"
    r"|record with incorrect|invalid record length|invalid resource manager|invalid info bits"
    r"|there is no contrecord flag|invalid contrecord|contrecord is requested|unexpected timeline ID"
    r"|out-of-sequence timeline|invalid xlog|could not decompress"
)

_INSUFFICIENT = re.compile(
    r"(?P<name>\w+) = \d+ is a lower setting than on the primary server, where its value was (?P<value>\d+)"
)

VERIFY_HINT: Final = "`knockwood verify` shows what the archive holds, and which window can be restored"


@dataclass(frozen=True, slots=True)
class Stop:
    """Where recovery says it stopped. `lsn` is where the record starts, None at consistency."""

    lsn: Lsn | None
    side: str


def find_stop(log: str) -> Stop | None:
    """The last stop the log tells of, or None."""
    last = None
    for match in _STOP.finditer(log):
        last = Stop(Lsn.parse(match["lsn"]), match["side"]) if match["lsn"] else Stop(None, "after")
    return last


def stopped_by_guard(log: str) -> bool:
    """Whether the server reached its target and was about to promote instead of pausing."""
    return find_stop(log) is not None and _GUARD.search(log) is not None


def too_low(log: str) -> dict[str, int]:
    """Settings that are lower than the WAL says the primary had them, with the primary's values."""
    found: dict[str, int] = {}
    for match in _INSUFFICIENT.finditer(log):
        found[match["name"]] = max(int(match["value"]), found.get(match["name"], 0))
    return found


def messages(log: str) -> list[str]:
    """The log's messages without times and process ids."""
    return [match[1] for match in map(_LEVEL.search, log.splitlines()) if match]


def check_stop(log: str, goal: Goal) -> Stop:
    """The stop, proven to be the one asked for; raises RecoveryFailedError."""
    stop = find_stop(log)
    if stop is None:
        raise RecoveryFailedError(f"recovery paused without saying where; asked was {goal}")
    wanted = Stop(goal.lsn, "after" if goal.inclusive or goal.lsn is None else "before")
    if stop != wanted:
        raise RecoveryFailedError(
            f"recovery stopped {stop.side} {stop.lsn or 'consistency'}, asked was {goal}",
            hint="is the target the start of a record of this timeline? " + VERIFY_HINT,
        )
    return stop


def failure(log: str, goal: Goal, where: str) -> PostgresError | NoSpaceError:
    """The error that a log of a server that ended before its target tells of."""
    for pattern, make in _CAUSES:
        match = re.search(pattern, log)
        if match is not None:
            return make(match, log, goal, where)
    last = " / ".join(messages(log)[-3:]) or "the log is empty"
    return RecoveryFailedError(f"the server ended before {goal}: {last}", where=where)


def complaints(log: str) -> list[str]:
    """What replay found wrong with the WAL, also that it ends."""
    return [text for text in messages(log) if _BAD_WAL.search(text)]


def waits(log: str) -> list[str]:
    """That replay of a standby has come to the end of what it was given."""
    return [text for text in messages(log) if text.startswith("waiting for WAL to become available")]


def _reached(log: str) -> str:
    """The last thing replay knew before it ran out, for the text of an error."""
    bad = complaints(log)
    return f": {bad[-1]}" if bad else ""


def _short(match: re.Match[str], log: str, goal: Goal, where: str) -> RecoveryFailedError:
    return RecoveryFailedError(f"the WAL ends before {goal}{_reached(log)}", where=where, hint=VERIFY_HINT)


def _too_early(match: re.Match[str], log: str, goal: Goal, where: str) -> RecoveryFailedError:
    return RecoveryFailedError(
        f"{goal} lies before the end of the backup ({goal.consistent}), where it is not consistent yet",
        where=where,
        hint="restore from an older backup",
    )


def _wrong_system(match: re.Match[str], log: str, goal: Goal, where: str) -> WrongSystemError:
    return WrongSystemError(
        f"the WAL is of cluster {match[1]}, the backup of cluster {match[2]}",
        where=where,
        hint="two clusters write into one archive: give each its own repository",
    )


def _no_start(match: re.Match[str], log: str, goal: Goal, where: str) -> RecoveryFailedError:
    return RecoveryFailedError(
        f"the WAL that makes the backup consistent is missing or damaged{_reached(log)}",
        where=where,
        hint=VERIFY_HINT,
    )


def _no_history(match: re.Match[str], log: str, goal: Goal, where: str) -> RecoveryFailedError:
    return RecoveryFailedError(
        f"timeline {goal.timeline} does not descend from the backup, or its history is missing: {match[0]}",
        where=where,
        hint=VERIFY_HINT,
    )


def _library(match: re.Match[str], log: str, goal: Goal, where: str) -> RecoveryFailedError:
    return RecoveryFailedError(
        f"a library that the server should load is not installed here: {match[1]}",
        where=where,
        hint="install the extension's package of this PostgreSQL version on this machine",
    )


def _manager(match: re.Match[str], log: str, goal: Goal, where: str) -> RecoveryFailedError:
    return RecoveryFailedError(
        f"the WAL holds records of an extension that is not loaded (resource manager {match[1]})",
        where=where,
        hint="name its library: shared_preload_libraries is empty on clones unless it is overridden",
    )


def _full_disk(match: re.Match[str], log: str, goal: Goal, where: str) -> NoSpaceError:
    return NoSpaceError(
        "the disk filled up during recovery", where=where, hint="free some space, or name another folder"
    )


def _bad_backup(match: re.Match[str], log: str, goal: Goal, where: str) -> RecoveryFailedError:
    return RecoveryFailedError(
        "the WAL speaks of pages that the backup does not have: files are missing from it",
        where=where,
        hint="restore from another backup; `knockwood verify` tells which are whole",
    )


def _copy_failed(match: re.Match[str], log: str, goal: Goal, where: str) -> RecoveryFailedError:
    return RecoveryFailedError(
        f"WAL could not be copied out of the spool: {match[1]}", where=where, hint="is the disk well?"
    )


_CAUSES: Final = (
    (r"No space left on device", _full_disk),
    (r"system identifier is (\d+), pg_control database system identifier is (\d+)", _wrong_system),
    (r"resource manager with ID (\d+) not registered", _manager),
    (r"could not access file \"([^\"]+)\": No such file", _library),
    (r"WAL contains references to invalid pages", _bad_backup),
    (r"requested recovery stop point is before consistent recovery point", _too_early),
    (r"requested timeline \d+ (?:is not a child|does not contain)[^\n]*", _no_history),
    (r"recovery target timeline \d+ does not exist", _no_history),
    (r"could not (?:locate (?:a valid|required) checkpoint record|find redo location)", _no_start),
    (r"WAL ends before end of online backup", _no_start),
    (r"could not restore file \"(\w{24})\" from archive", _copy_failed),
    (r"recovery ended before configured recovery target was reached", _short),
)
