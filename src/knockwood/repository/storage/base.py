"""The one seam to storage: named objects that are written once, whole, and never overwritten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from knockwood.host.files import Chunk


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """A stored object: its name (relative, `/` between parts), bytes, and time of writing (UTC)."""

    name: str
    bytes: int
    modified: datetime


class Storage(Protocol):
    """Names are relative paths with `/`. All methods may be called from several threads.

    Every method raises StorageUnavailableError for a passing failure and RepositoryError otherwise; a
    folder raises HostError or NoSpaceError for what the machine refuses. Who is told that an object
    exists may rely on it: it is durable.
    """

    @property
    def url(self) -> str:
        """Where it is, without secrets."""
        ...

    def put_new(self, name: str, chunks: Iterable[Chunk]) -> int:
        """Store an object, all or nothing, durable on return; its bytes. ObjectExistsError if it exists."""
        ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` up to `end`, in pieces. ObjectMissingError if there is none."""
        ...

    def info(self, name: str) -> ObjectInfo | None:
        """What is stored under the name, or None."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose name starts with `prefix` (a whole folder: `wal/`), ordered by name."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens if it is gone. Expiry and locks only."""
        ...
