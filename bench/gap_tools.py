"""What the gap test asks of every tool, and how stored bytes are damaged."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from knockwood.host.privileges import Account
from knockwood.model import Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.server import LocalServer
from sandbox import Said, query


@dataclass(frozen=True, slots=True)
class Source:
    """The cluster that every tool protects, and where their files may lie."""

    programs: Programs
    account: Account | None
    work: Path
    server: LocalServer
    segment_bytes: int = 16 << 20

    def segment_name(self, number: int) -> str:
        return WalSegment(Timeline(1), number, self.segment_bytes).name

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        return query(self.server.dsn(), sql)


class NotApplicableError(Exception):
    """The tool keeps nothing of the kind that this damage needs; the text says what it keeps instead."""


class Tool(Protocol):
    """One backup tool over a repository at a path of its own choosing.

    Damages work on the repository that `at` was given, never on the original.
    """

    @property
    def name(self) -> str: ...
    def version(self) -> str: ...
    def prepare(self) -> None: ...
    def archive_words(self) -> str | None:
        """The shell command that archives %p, or None if the tool receives WAL by itself."""

    def backup(self) -> None: ...
    def settle(self, last: int) -> None:
        """Return once the segment numbered `last` is in the repository."""

    def close(self) -> None: ...
    def repository(self) -> Path: ...
    def at(self, repository: Path) -> Tool:
        """The same tool looking at a copy of its repository."""

    def segment(self, number: int) -> Path:
        """The stored file of one WAL segment."""

    def consistency_segment(self) -> int:
        """The number of the segment in which the backup becomes consistent."""

    def forget(self, number: int) -> str:
        """Remove what the tool's bookkeeping says about a segment; raises NotApplicableError."""

    def rewrite(self, number: int, change: Callable[[bytes], bytes]) -> str:
        """Change a segment's content and store it as the tool itself would have; says how."""

    def backup_file(self) -> Path:
        """The stored file that holds the ledger table's heap."""

    def remove_label(self) -> str:
        """Take backup_label out of the stored backup, with the bookkeeping redone; says how."""

    def verify(self) -> list[Said]: ...
    def verify_all(self) -> list[Said]:
        """The same, without trust in what earlier runs found; nothing where `verify` does that anyway."""

    def restore(self, into: Path) -> Said: ...


@runtime_checkable
class AcceptsLoss(Protocol):
    """A tool that restores short only when told to."""

    def restore_with_loss(self, into: Path) -> Said: ...


def keep_time(path: Path, data: bytes | bytearray) -> None:
    """Write a file in place and give it back its times: a disk that rots does not touch them."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_stored(path: Path, count: int = 4) -> None:
    """Flip all bits of `count` bytes in the middle of a file."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    for offset in range(middle, middle + count):
        data[offset] ^= 0xFF
    keep_time(path, data)


def flip_bit(path: Path, offset: int | None = None) -> None:
    """Flip one bit of a file, in its middle unless told where."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset is None else offset] ^= 0x10
    keep_time(path, data)


def flip_content(marker: bytes) -> Callable[[bytes], bytes]:
    """Flip 4 bytes of WAL right behind the marker, which must be there."""

    def change(data: bytes) -> bytes:
        place = data.find(marker)
        if place < 0:
            raise RuntimeError(f"the segment does not hold {marker!r}")
        start = place + len(marker)
        flipped = bytes(byte ^ 0xFF for byte in data[start : start + 4])
        return data[:start] + flipped + data[start + 4 :]

    return change


def rewrite_gzip(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change what a gzip file holds."""
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def only(paths: list[Path], what: str) -> Path:
    """The one path; anything else is a mistake of the bench and said so."""
    if len(paths) != 1:
        raise RuntimeError(f"expected one {what}, found {[str(path) for path in paths]}")
    return paths[0]
