"""What WAL was already compared with the disk and held: remembered on this machine, for this server's run.

That a page was right says nothing of the disk once the machine's cache is gone: a disk that lost a write
shows it only after the next start. So what is remembered counts for this boot of the machine and this run
of the server only, and lies in the state folder, never in the repository, which other machines read.
Losing it costs reading the same WAL again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from knockwood.errors import HostError
from knockwood.host import files
from knockwood.integrity.check import Subject
from knockwood.integrity.last_changes import LastChanges
from knockwood.model import Lsn
from knockwood.postgres.connection import translated
from knockwood.postgres.walrefs import Fork

Span = tuple[Lsn, Lsn]
"""WAL from the first position up to, not including, the second."""

Block = tuple[Fork, int]

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
class Compared:
    """What is known of WAL up to `end`: the last change of each block in it, and of which blocks (with their forks) it
    has an image of an old page, though that was mended since."""

    end: Lsn
    changes: LastChanges
    once_old: frozenset[Block]


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
        told = self._told()
        try:
            held = [(Lsn.parse(start), Lsn.parse(end)) for start, end in told["held"]]
        except (ValueError, KeyError, TypeError):
            return []
        return united(held) if self._once_old() is not None else []

    def changes(self) -> LastChanges:
        """The last changes of blocks in what is remembered; nothing where that cannot be read for certain."""
        return (self._last_changes() if self.load() else None) or LastChanges()

    def compared(self, start: Lsn) -> Compared | None:
        """What is remembered of the WAL from `start` on without a gap; None where that is not all."""
        ends = [end for begin, end in self.load() if begin <= start <= end]
        changes, once_old = self._last_changes(), self._once_old()
        if not ends or changes is None or not changes.complete or once_old is None:
            return None
        return Compared(max(ends), changes, once_old)

    def _told(self) -> dict[str, Any]:
        try:
            told = json.loads(self.path.read_text()) if self.path is not None else {}
            return dict(told) if told["identity"] == self.identity else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _once_old(self) -> frozenset[Block] | None:
        try:
            found = self._told()["once_old"]
            return frozenset(((space, base, node, fork), block) for space, base, node, fork, block in found)
        except (ValueError, KeyError, TypeError):
            return None

    def _last_changes(self) -> LastChanges | None:
        if self.path is None:
            return None
        try:
            head, _, rest = self._changes.read_bytes().partition(b"\n")
            return LastChanges.from_bytes(rest) if head.decode() == self.identity else None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def save(
        self, spans: Sequence[Span], floor: Lsn, changes: LastChanges | None, once_old: Iterable[Block] = ()
    ) -> None:
        """Remember the spans, as far as they reach beyond `floor`, the last changes in them (None: as before), and
        blocks that were once old there, beside those of before."""
        if self.path is None:
            return
        old = [[*fork, block] for fork, block in sorted({*(self._once_old() or ()), *once_old})]
        held = [[str(start), str(end)] for start, end in united(spans) if end >= floor]
        told = {"identity": self.identity, "held": held, "once_old": old}
        try:
            if changes is not None:
                changes.limit()
                # Those of WAL that will be read again do no harm: what an image must hold lies before it.
                files.replace(self._changes, self.identity.encode() + b"\n" + changes.as_bytes())
            files.replace(self.path, json.dumps(told).encode())
        except HostError:
            pass  # then the next run reads the same WAL again

    @property
    def _changes(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix(".changes")
