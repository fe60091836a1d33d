"""The witness: what clients were told had committed, written down outside the database under test."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from knockwood.host import clock

NOTES: Final = frozenset({"buggy", "doubt"})
"""Kinds of lines that are no promises."""


@dataclass(frozen=True, slots=True)
class Promise:
    """One acknowledged transaction: what it was, its token, its xid, when (monotonic seconds).

    `value` is what the row of that token must hold from then on, until a later promise says otherwise.
    """

    kind: str
    token: int
    xid: int
    at: float
    value: str | None = None


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

    Each line reaches the operating system before the client goes on, so a killed drill keeps it. Beside the
    promises it keeps notes: `buggy`, a transaction that a bug made; `doubt`, a commit that got no answer.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._promises: list[Promise] = []
        self._notes: list[Promise] = []

    def acknowledged(self, kind: str, token: int, xid: int, value: str | None = None) -> None:
        """Write a promise down; `value` without white space."""
        self._write(Promise(kind, token, xid, clock.monotonic(), value), self._promises)

    def note(self, kind: str, token: int, xid: int = 0) -> None:
        """Write down what is no promise."""
        self._write(Promise(kind, token, xid, clock.monotonic()), self._notes)

    def _write(self, entry: Promise, into: list[Promise]) -> None:
        words = [entry.kind, str(entry.token), str(entry.xid), repr(entry.at)]
        with self._lock:
            self._file.write(f"{' '.join([*words, *filter(None, [entry.value])])}\n".encode())
            into.append(entry)

    def promises(self) -> tuple[Promise, ...]:
        with self._lock:
            return tuple(self._promises)

    def notes(self, kind: str) -> tuple[Promise, ...]:
        with self._lock:
            return tuple(entry for entry in self._notes if entry.kind == kind)

    def close(self) -> None:
        self._file.close()


def read_promises(path: Path) -> tuple[Promise, ...]:
    """The promises in the record a drill left; a last line cut short by a kill is passed over."""
    entries = []
    for line in path.read_text().splitlines(keepends=True):
        words = line.split()
        if len(words) in (4, 5) and line.endswith("\n") and words[0] not in NOTES:
            value = words[4] if len(words) == 5 else None
            entries.append(Promise(words[0], int(words[1]), int(words[2]), float(words[3]), value))
    return tuple(entries)


def loss(promises: tuple[Promise, ...], present: Mapping[str, frozenset[int]]) -> Loss:
    """Compare what was acknowledged with what a database holds (kind -> tokens)."""
    missing = tuple(entry for entry in promises if entry.token not in present.get(entry.kind, frozenset()))
    return Loss(len(promises), missing)


def altered(
    promises: Iterable[Promise], values: Mapping[int, str], doubtful: Container[int] = ()
) -> tuple[Promise, ...]:
    """The last promises that gave a token a value, where the database (token -> value) has another or none.

    Of `doubtful` tokens nobody can say which value they must have.
    """
    last = {entry.token: entry for entry in promises if entry.value is not None}
    return tuple(
        entry
        for entry in last.values()
        if entry.token not in doubtful and values.get(entry.token) != entry.value
    )
