"""The witness: what clients were told had committed, written down outside the database under test."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from knockwood.host import clock


@dataclass(frozen=True, slots=True)
class Promise:
    """One acknowledged transaction: what it was, its token, its xid, when (monotonic seconds)."""

    kind: str
    token: int
    xid: int
    at: float


@dataclass(frozen=True, slots=True)
class Loss:
    """What a database lacks of what was acknowledged."""

    acknowledged: int
    missing: tuple[Promise, ...]

    @property
    def lost(self) -> int:
        return len(self.missing)


class Witness:
    """An append-only record, one line per acknowledged commit. Thread-safe.

    Each line reaches the operating system before the client goes on, so a killed drill keeps it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._promises: list[Promise] = []

    def acknowledged(self, kind: str, token: int, xid: int) -> None:
        entry = Promise(kind, token, xid, clock.monotonic())
        with self._lock:
            self._file.write(f"{entry.kind} {entry.token} {entry.xid} {entry.at!r}\n".encode())
            self._promises.append(entry)

    def promises(self) -> tuple[Promise, ...]:
        with self._lock:
            return tuple(self._promises)

    def close(self) -> None:
        self._file.close()


def read_promises(path: Path) -> tuple[Promise, ...]:
    """The record a drill left; a last line cut short by a kill is passed over."""
    entries = []
    for line in path.read_text().splitlines(keepends=True):
        words = line.split()
        if len(words) == 4 and line.endswith("\n"):
            entries.append(Promise(words[0], int(words[1]), int(words[2]), float(words[3])))
    return tuple(entries)


def loss(promises: tuple[Promise, ...], present: Mapping[str, frozenset[int]]) -> Loss:
    """Compare what was acknowledged with what a database holds (kind -> tokens)."""
    missing = tuple(entry for entry in promises if entry.token not in present.get(entry.kind, frozenset()))
    return Loss(len(promises), missing)
