"""WAL for sites that use archive_command and restore_command.

`archive_command = 'knockwood wal push %p'` and `restore_command = 'knockwood wal fetch %f %p'`.

The exit statuses decide what PostgreSQL does. archive_command: anything but 0 is tried again; above 125
the archiver also restarts. restore_command: 1 to 125 means "the archive has no such file", upon which
recovery takes it for the end of the archive and goes on (at the end of recovery it *promotes*); above 125 the
server stops. So only a file that is certainly not in the archive may end with 1: a damaged object, a
missing key or a storage that does not answer must end with FETCH_FAILED, or a server would come up
with less data and say nothing.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Final

from knockwood.errors import (
    KnockwoodError,
    ObjectDamagedError,
    ObjectExistsError,
    ObjectMissingError,
    UsageError,
)
from knockwood.host import files
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.repository.archive import WalArchive
from knockwood.repository.inventory import ArchiveInventory, Partial, history_object, segment_object
from knockwood.repository.repository import Repository
from knockwood.repository.walfile import valid_end

PUSHED: Final = 0
PUSH_FAILED: Final = 1
FETCHED: Final = 0
NOT_IN_ARCHIVE: Final = 1
# Above 125 (and not 126 or 127, which a shell says for a program it cannot start).
FETCH_FAILED: Final = 200

_LABEL = re.compile(r"[0-9A-F]{24}\.[0-9A-F]{8}\.backup\Z")
_ODD = re.compile(r"[0-9A-F]{24}(?:\.[0-9A-F]{8}\.backup|\.partial)?\Z")
_HISTORY = re.compile(r"([0-9A-F]{8})\.history\Z")


class Pushed(StrEnum):
    """What `push` did."""

    STORED = "stored"
    KNOWN = "stored before, with equal content"


class Fetched(StrEnum):
    """How `fetch` ended where it did not raise."""

    WRITTEN = "written"
    NOT_IN_ARCHIVE = "not in the archive"

    @property
    def exit_status(self) -> int:
        return FETCHED if self is Fetched.WRITTEN else NOT_IN_ARCHIVE


def push(repository: Repository, path: Path) -> Pushed:
    """Store a file that PostgreSQL wants archived: durable on return, and harmless when repeated.

    Takes segments, `.history`, `.partial` (the end of a timeline that was left) and `.backup` labels.
    Raises ObjectExistsError if other content has the name, UsageError for any other file,
    ObjectDamagedError or WrongSystemError if the file is not what its name says.
    """
    archive = WalArchive(repository)
    name = path.name
    history = _HISTORY.match(name)
    if history is not None:
        with files.translated(path):
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
        return _outcome(archive.put_history(Timeline(int(history[1], 16)), text))
    if _LABEL.match(name):
        return _push_label(repository, path)
    try:
        segment = WalSegment.parse(name.removesuffix(".partial"), archive.segment_bytes)
    except ValueError as error:
        raise UsageError(str(error), where=str(path), hint="archive_command gives %p") from error
    if not name.endswith(".partial"):
        return _outcome(archive.put_segment(segment, path))
    end = valid_end(path, segment)
    if end == segment.start:
        raise ObjectDamagedError("holds no WAL", where=str(path))
    return _outcome(archive.put_partial(segment, path, end))


def _push_label(repository: Repository, path: Path) -> Pushed:
    # Not needed to restore: our backups carry their own label. Kept because it tells a reader of the
    # archive that some other tool took a backup, and where.
    name = f"wal/label/{path.name}"
    with files.translated(path):
        data = path.read_bytes()
    if repository.find(name) is None:
        try:
            repository.put(name, [data])
            return Pushed.STORED
        except ObjectExistsError:
            pass
    return Pushed.KNOWN


def _outcome(stored: bool) -> Pushed:
    return Pushed.STORED if stored else Pushed.KNOWN


def fetch(repository: Repository, name: str, destination: Path) -> Fetched:
    """Write the segment or history that PostgreSQL asks for to `destination`, all or nothing.

    NOT_IN_ARCHIVE only if the archive certainly has no such file. Everything else raises, UsageError for
    a name that PostgreSQL never asks for; the caller then ends with FETCH_FAILED (see `exit_status_of`).
    A segment of which only the beginning was received is given filled with zeros: PostgreSQL replays up
    to its last whole record.
    """
    archive = WalArchive(repository)
    history = _HISTORY.match(name)
    if history is not None:
        timeline = Timeline(int(history[1], 16))
        if repository.find(history_object(timeline)) is None:
            return Fetched.NOT_IN_ARCHIVE
        text = archive.history_text(timeline)
        files.replace(destination, text.encode("utf-8", "surrogateescape"))
        return Fetched.WRITTEN
    try:
        segment = WalSegment.parse(name, archive.segment_bytes)
    except ValueError:
        if _ODD.match(name) is None:
            raise UsageError(
                f"not the name of a WAL file: {name!r}", hint="restore_command = 'knockwood wal fetch %f %p'"
            ) from None
        # PostgreSQL asks for .backup and .partial names too in old corners; we keep none to give.
        return Fetched.NOT_IN_ARCHIVE
    return _fetch_segment(archive, segment, destination)


def _fetch_segment(archive: WalArchive, segment: WalSegment, destination: Path) -> Fetched:
    repository = archive.repository
    if repository.find(segment_object(segment)) is not None:
        archive.fetch(segment, destination)
        return Fetched.WRITTEN
    longest: tuple[Lsn, str] | None = None
    for info in repository.storage.list("wal/partial/"):
        partial = Partial.parse(info.name, archive.segment_bytes)
        if partial is not None and partial.segment == segment:
            longest = max(longest or (partial.end, partial.name), (partial.end, partial.name))
    if longest is not None:
        archive.fetch_partial(longest[1], destination)
        return Fetched.WRITTEN
    # Between the two looks the whole segment may have replaced its last partial.
    if repository.find(segment_object(segment)) is not None:
        archive.fetch(segment, destination)
        return Fetched.WRITTEN
    _refuse_hole(archive, segment)
    return Fetched.NOT_IN_ARCHIVE


def _refuse_hole(archive: WalArchive, segment: WalSegment) -> None:
    """Raise ObjectMissingError if later WAL of the timeline is there: this is a gap and no end."""
    names = (info.name for info in archive.repository.storage.list(f"wal/{segment.name[:8]}/"))
    stock = ArchiveInventory.of_names(archive.segment_bytes, names)
    numbers = stock.segments.get(segment.timeline, ())
    if not numbers or numbers[-1] < segment.number:
        return
    if segment.timeline > 1:
        # PostgreSQL may ask a timeline for what is its parent's: that is no hole in it.
        known = archive.repository.find(history_object(segment.timeline)) is not None
        switches = archive.history(segment.timeline).switches if known else ()
        begin = switches[-1][1].value // segment.bytes if switches else numbers[0]
        if segment.number < begin:
            return
    raise ObjectMissingError(
        f"{segment} is missing, but the archive goes on after it: recovery must not end here",
        where=archive.repository.storage.url,
        hint="`knockwood verify` shows the gap; `knockwood restore --accept-loss` restores up to it",
    )


def exit_status_of(error: KnockwoodError) -> int:
    """The status `wal fetch` ends with for an error: always one that stops recovery."""
    del error
    return FETCH_FAILED
