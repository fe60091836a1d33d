"""The receiver's local folder, in the form pg_receivewal keeps it.

pg_receivewal goes on from the highest file it finds (segment number first, then timeline): after a
whole one, from the start of a `.partial` one. So the last whole segment stays until there is a newer
one, and an empty `.partial` file tells it where to begin, in every version and without a server's
help. What it writes is renamed only when it is whole and fsynced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from knockwood.errors import ObjectDamagedError, WrongSystemError
from knockwood.host import clock, files
from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalSegment
from knockwood.repository.walfile import check_header, valid_end

_SEGMENT = re.compile(r"([0-9A-F]{24})(\.partial)?\Z")
_HISTORY = re.compile(r"([0-9A-F]{8})\.history\Z")
_SUFFIX = ".partial"
_WISH_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class SpoolFile:
    """A segment in the spool, whole or partial."""

    segment: WalSegment
    partial: bool
    path: Path

    @property
    def rank(self) -> tuple[int, int, bool]:
        """The order in which pg_receivewal prefers files to go on from."""
        return (self.segment.number, self.segment.timeline, not self.partial)

    @property
    def next_start(self) -> Lsn:
        """Where pg_receivewal would go on after this file."""
        return self.segment.start if self.partial else self.segment.end

    def reached(self) -> Lsn:
        """The end of the WAL in the file, which nobody may be writing now."""
        return valid_end(self.path, self.segment) if self.partial else self.segment.end


@dataclass(frozen=True, slots=True)
class Spool:
    """A folder of segments not yet known to be in the repository."""

    folder: Path
    segment_bytes: int

    def files(self) -> list[SpoolFile]:
        """Every segment file, lowest rank first."""
        found: list[SpoolFile] = []
        with files.translated(self.folder):
            names = os.listdir(self.folder)
        for name in names:
            match = _SEGMENT.match(name)
            if match is None:
                continue
            try:
                segment = WalSegment.parse(match[1], self.segment_bytes)
            except ValueError:
                continue
            found.append(SpoolFile(segment, match[2] is not None, self.folder / name))
        return sorted(found, key=lambda file: file.rank)

    def histories(self) -> Iterator[tuple[Timeline, str]]:
        """The history files that pg_receivewal fetched, with their text."""
        with files.translated(self.folder):
            names = sorted(os.listdir(self.folder))
        for name in names:
            match = _HISTORY.match(name)
            if match is not None:
                with files.translated(self.folder / name):
                    text = (self.folder / name).read_text(encoding="utf-8", errors="surrogateescape")
                yield Timeline(int(match[1], 16)), text

    def history(self, timeline: Timeline) -> TimelineHistory | None:
        """A timeline's ancestry as far as the spool knows it."""
        for found, text in self.histories():
            if found == timeline:
                try:
                    return TimelineHistory.parse(timeline, text)
                except ValueError:
                    return None
        return None

    def mend(self) -> list[str]:
        """Make the folder one that pg_receivewal goes on with; says what was done.

        It is killed while it fills a new file with zeros, or the disk is full: then the file has a
        size that it refuses later. Zeros are removed; anything else is set aside, never deleted.
        """
        done: list[str] = []
        for file in self.files():
            with files.translated(file.path):
                size = file.path.stat().st_size
            if size == self.segment_bytes or (file.partial and size == 0):
                continue
            if not any(any(chunk) for chunk in files.read_chunks(file.path)):
                self.remove(file)
                done.append(f"removed {file.path.name}, which held only zeros")
                if file.partial:
                    # Its start is still where to go on from.
                    self.seed(file.segment)
                continue
            aside = file.path.with_name(f"{file.path.name}.aside-{file.path.stat().st_mtime_ns}")
            with files.translated(aside):
                file.path.rename(aside)
                files.fsync_file(self.folder)
            done.append(f"set {file.path.name} aside: {size} bytes instead of {self.segment_bytes}")
        return done

    def take_over(self, older: Path, system_identifier: int) -> None:
        """Move here what lies in another folder and is WAL of this cluster; the rest stays."""
        moved = False
        for file in Spool(older, self.segment_bytes).files():
            place = self.folder / file.path.name
            try:
                check_header(file.segment, file.path, system_identifier)
            except (WrongSystemError, ObjectDamagedError):
                continue
            if not place.exists():
                with files.translated(place):
                    file.path.rename(place)
                moved = True
        if moved:
            with files.translated(self.folder):
                files.fsync_file(self.folder)
                files.fsync_file(older)

    @property
    def _wish(self) -> Path:
        return self.folder / "hurry"

    def hurry(self) -> None:
        """Ask the receiver at work here to archive what it has at once; nothing happens where it cannot be asked."""
        with suppress(OSError):
            self._wish.touch()

    def hurried(self) -> bool:
        """Whether somebody asked a moment ago. A wish that was left behind is soon too old."""
        try:
            return abs(clock.now().timestamp() - self._wish.stat().st_mtime) < _WISH_SECONDS
        except OSError:
            return False

    def calm(self) -> None:
        """Take the wish back."""
        with suppress(OSError):
            self._wish.unlink(missing_ok=True)

    def seed(self, segment: WalSegment) -> None:
        """Make `segment` the one where pg_receivewal begins, provided nothing ranks higher."""
        path = self.folder / f"{segment.name}{_SUFFIX}"
        with files.translated(path):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            files.fsync_file(self.folder)

    def remove(self, file: SpoolFile) -> None:
        """Delete a file whose content is in the repository, or that has none."""
        with files.translated(file.path):
            file.path.unlink(missing_ok=True)
            files.fsync_file(self.folder)
