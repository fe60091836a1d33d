"""What earlier runs proved, kept in the repository: so that a daily run costs what is new.

Each run writes one object `verified/<stamp>-<random>.json` with all that is known, then deletes those
it had read: killed at any point, at worst two of them are there, and they are merged.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from knockwood.errors import ObjectDamagedError, ObjectMissingError
from knockwood.host import clock
from knockwood.model.proof import Commit
from knockwood.model.wal import Lsn, WalSegment
from knockwood.repository.repository import Repository
from knockwood.repository.route import SegmentFacts
from knockwood.repository.storage import ObjectInfo

FOLDER: Final = "verified/"
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Proved:
    """An object found right at `at`, when it had this size and time of writing.

    `facts` is what a WAL segment holds, `end` where its last whole record ends if it was the last then.
    """

    name: str
    bytes: int
    modified: datetime
    at: datetime
    facts: SegmentFacts | None = None
    end: Lsn | None = None

    @classmethod
    def of(
        cls, info: ObjectInfo, at: datetime, facts: SegmentFacts | None = None, end: Lsn | None = None
    ) -> Proved:
        return cls(info.name, info.bytes, info.modified, at, facts, end)

    def still(self, info: ObjectInfo | None) -> bool:
        """Whether what is listed now is the object that was proved."""
        return info is not None and info.bytes == self.bytes and info.modified == self.modified


@dataclass(frozen=True, slots=True)
class State:
    """All that is proved, by object name, and the state objects it was read from."""

    objects: Mapping[str, Proved] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def current(self, listing: Mapping[str, ObjectInfo]) -> State:
        """Without what is gone or was changed since."""
        kept = {name: p for name, p in self.objects.items() if p.still(listing.get(name))}
        return replace(self, objects=kept)

    def oldest(self, fraction: float) -> set[str]:
        """The names whose turn it is: the given fraction of all, proved longest ago."""
        count = min(len(self.objects), -int(-len(self.objects) * fraction // 1))
        ordered = sorted(self.objects.values(), key=lambda p: (p.at, p.name))
        return {p.name for p in ordered[:count]}


def load(repository: Repository, listing: Iterable[ObjectInfo]) -> State:
    """Merge the state objects listed; one that cannot be read proves nothing and is replaced."""
    objects: dict[str, Proved] = {}
    sources: list[str] = []
    for info in listing:
        if not info.name.startswith(FOLDER):
            continue
        sources.append(info.name)
        try:
            found = _read(repository.get_json(info.name), repository.header.segment_bytes)
        except (ObjectDamagedError, ObjectMissingError, KeyError, TypeError, ValueError, IndexError):
            continue
        for entry in found:
            known = objects.get(entry.name)
            if known is None or known.at < entry.at:
                objects[entry.name] = entry
    return State(objects, tuple(sources))


def known(repository: Repository, listing: Mapping[str, ObjectInfo]) -> State:
    """What is proved of the objects listed: by earlier runs, and by what was read through this object."""
    state = load(repository, repository.storage.list(FOLDER))
    before = replace(state, objects=dict(repository.read_before)).current(listing)
    return replace(state, objects={**before.objects, **state.current(listing).objects})


def save(repository: Repository, state: State) -> None:
    """Write the state anew, then delete what it was merged from."""
    name = f"{FOLDER}{clock.stamp(clock.now())}-{secrets.token_hex(4)}.json"
    rows = [_row(entry) for _, entry in sorted(state.objects.items())]
    repository.put_json(name, {"format": _FORMAT, "objects": rows})
    for old in state.sources:
        repository.storage.delete(old)


def _row(entry: Proved) -> list[Any]:
    row: list[Any] = [entry.name, entry.bytes, entry.modified.isoformat(), entry.at.isoformat()]
    facts = entry.facts
    if facts is not None:
        row.append(
            {
                "segment": facts.segment.name,
                "commits": facts.commits,
                "first": facts.first.as_json() if facts.first else None,
                "last": facts.last.as_json() if facts.last else None,
                "earliest": facts.earliest.isoformat() if facts.earliest else None,
                "latest": facts.latest.isoformat() if facts.latest else None,
                "end": str(entry.end) if entry.end else None,
                "tablespace": facts.makes_tablespace,
            }
        )
    return row


def _read(value: Any, segment_bytes: int) -> list[Proved]:
    if value["format"] != _FORMAT:
        return []
    found = []
    for row in value["objects"]:
        name, size, modified, at, *rest = row
        facts, end = _facts(rest[0], segment_bytes) if rest else (None, None)
        found.append(
            Proved(
                str(name), int(size), datetime.fromisoformat(modified), datetime.fromisoformat(at), facts, end
            )
        )
    return found


def _facts(value: Mapping[str, Any], segment_bytes: int) -> tuple[SegmentFacts, Lsn | None]:
    facts = SegmentFacts(
        WalSegment.parse(value["segment"], segment_bytes),
        int(value["commits"]),
        _commit(value["first"]),
        _commit(value["last"]),
        _time(value["earliest"]),
        _time(value["latest"]),
        _maybe(value.get("tablespace")),
    )
    return facts, Lsn.parse(value["end"]) if value["end"] else None


def _commit(value: Mapping[str, Any] | None) -> Commit | None:
    if value is None:
        return None
    return Commit(int(value["xid"]), Lsn.parse(value["lsn"]), datetime.fromisoformat(value["time"]))


def _maybe(value: Any) -> bool | None:
    # What an earlier version proved does not tell.
    return value if isinstance(value, bool) else None


def _time(value: str | None) -> datetime | None:
    return datetime.fromisoformat(value) if value else None
