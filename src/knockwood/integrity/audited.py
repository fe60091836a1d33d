"""What WAL was already compared with the disk and held: remembered on this machine, for this server's run.

That a page was right says nothing of the disk once the machine's cache is gone: a disk that lost a write
shows it only after the next start. So what is remembered counts for this boot of the machine and this run
of the server only, and lies in the state folder, never in the repository, which other machines read.
Losing it costs reading the same WAL again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

from knockwood.errors import HostError
from knockwood.host import files
from knockwood.integrity.check import Subject
from knockwood.integrity.last_changes import LastChanges
from knockwood.model import Lsn
from knockwood.postgres.connection import translated

Span = tuple[Lsn, Lsn]
"""WAL from the first position up to, not including, the second."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def united(spans: Sequence[Span]) -> list[Span]:
    """The same WAL as spans in order that neither overlap nor touch."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        elif start < end:
            result.append((start, end))
    return result


def without(whole: Span, spans: Sequence[Span]) -> list[Span]:
    """What is left of `whole` without `spans`, in order."""
    left: list[Span] = []
    at = whole[0]
    for start, end in united(spans):
        if at < min(start, whole[1]):
            left.append((at, min(start, whole[1])))
        at = max(at, end)
    if at < whole[1]:
        left.append((at, whole[1]))
    return left


@dataclass(frozen=True, slots=True)
class Memory:
    """The spans that held, in one file, and the last changes of blocks in them, in another beside it; `path` is
    None where nothing can be remembered."""

    path: Path | None
    identity: str

    @classmethod
    def of(cls, subject: Subject) -> Memory:
        """For the subject's server as it runs now; remembers nothing without local reach and state folder."""
        if subject.state is None or subject.data_directory is None:
            return cls(None, "")
        try:
            boot = _BOOT.read_text().strip()
            place = subject.data_directory.stat()
        except OSError:
            return cls(None, "")
        with subject.connect() as connection, translated():
            row = connection.execute("select pg_catalog.pg_postmaster_start_time()::text").fetchone()
        assert row is not None
        identity = f"{boot} {place.st_dev}:{place.st_ino} {row[0]} timeline {subject.facts.timeline}"
        name = f"{subject.facts.system_identifier}-{place.st_dev:x}-{place.st_ino:x}.json"
        return cls(subject.state / "audited" / name, identity)

    def load(self) -> list[Span]:
        """What is remembered of this run of the server; nothing where that cannot be read for certain."""
        if self.path is None:
            return []
        try:
            told = json.loads(self.path.read_text())
            if told["identity"] != self.identity:
                return []
            return united([(Lsn.parse(start), Lsn.parse(end)) for start, end in told["held"]])
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def changes(self) -> LastChanges:
        """The last changes of blocks in what is remembered; nothing where that cannot be read for certain."""
        if self.path is None or not self.load():
            return LastChanges()
        try:
            head, _, rest = self._changes.read_bytes().partition(b"\n")
            return LastChanges.from_bytes(rest) if head.decode() == self.identity else LastChanges()
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return LastChanges()

    def save(self, spans: Sequence[Span], floor: Lsn, changes: LastChanges | None) -> None:
        """Remember the spans, as far as they reach beyond `floor`, and the last changes in them (None: as before)."""
        if self.path is None:
            return
        held = [[str(start), str(end)] for start, end in united(spans) if end >= floor]
        try:
            if changes is not None:
                changes.limit()
                # Those of WAL that will be read again do no harm: what an image must hold lies before it.
                files.replace(self._changes, self.identity.encode() + b"\n" + changes.as_bytes())
            files.replace(self.path, json.dumps({"identity": self.identity, "held": held}).encode())
        except HostError:
            pass  # then the next run reads the same WAL again

    @property
    def _changes(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix(".changes")
