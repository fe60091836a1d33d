"""The server's stream of a base backup as members with the paths of one data directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO

from knockwood.host import clock
from knockwood.postgres.replication import (
    ArchiveStarted,
    BackupEnded,
    BackupStarted,
    Event,
    ManifestStarted,
)
from knockwood.repository.backups.model import Progress
from knockwood.repository.backups.tar import Member, read_tar

OnProgress = Callable[[Progress], None]


class ServerStream:
    """Turns the server's events into members under the data directory's own paths; keeps the manifest."""

    def __init__(self, manifest: IO[bytes], progress: OnProgress | None) -> None:
        self.started: BackupStarted | None = None
        self.ended: BackupEnded | None = None
        self._manifest = manifest
        self._progress = progress
        self._pending: Event | None = None
        self._done = 0
        self._told = 0.0

    def entries(self, events: Iterator[Event], on_start: Callable[[], None]) -> Iterator[Member | memoryview]:
        for event in self._events(events):
            if isinstance(event, BackupStarted):
                self.started = event
                on_start()
            elif isinstance(event, ArchiveStarted):
                prefix = f"pg_tblspc/{event.oid}" if event.oid is not None else ""
                if prefix:
                    yield Member(prefix, mode=0o700, kind="folder")
                for entry in read_tar(self._data(events)):
                    yield self._placed(entry, prefix)
            elif isinstance(event, ManifestStarted):
                for view in self._data(events):
                    self._manifest.write(view)
            elif isinstance(event, BackupEnded):
                self.ended = event
        self._tell("", 0.0)

    def _events(self, events: Iterator[Event]) -> Iterator[Event]:
        while True:
            event, self._pending = self._pending, None
            if event is None:
                event = next(events, None)
            if event is None:
                return
            yield event

    def _data(self, events: Iterator[Event]) -> Iterator[memoryview]:
        for event in events:
            if not isinstance(event, memoryview):
                self._pending = event
                return
            self._done += len(event)
            yield event

    def _placed(self, entry: Member | memoryview, prefix: str) -> Member | memoryview:
        if not isinstance(entry, Member):
            return entry
        self._tell(entry.path, 0.1)
        return replace(entry, path=f"{prefix}/{entry.path}") if prefix else entry

    def _tell(self, path: str, every: float) -> None:
        now = clock.monotonic()
        if self._progress is not None and now - self._told >= every:
            self._told = now
            total = self.started.bytes if self.started is not None else 0
            self._progress(Progress(self._done, max(total, self._done), path))
