"""Marks: what people and deployments say about a moment (`release 42 goes live`), kept in the repository.

`history/marks/<time>-<random>` holds one each, encrypted where the repository is. A mark made while the
server was up was also written into its WAL, in a transaction of its own, and so lies at one exact place.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from knockwood.errors import ObjectDamagedError
from knockwood.host import clock
from knockwood.model.wal import Lsn
from knockwood.repository.repository import Repository

FOLDER: Final = "history/marks/"
PREFIX: Final = "knockwood"
"""That of the logical messages which carry marks."""

_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark at `lsn`, where that is known, and `at`. `xid` is that of the transaction that wrote it into
    the WAL, None if it was not written there. `by` is who made it, `made` when.
    """

    text: str
    at: datetime
    made: datetime
    by: str
    lsn: Lsn | None = None
    xid: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "time": self.at.isoformat(),
            "lsn": str(self.lsn) if self.lsn is not None else None,
            "xid": self.xid,
            "by": self.by,
            "made": self.made.isoformat(),
        }


def put(repository: Repository, mark: Mark) -> str:
    """Store a mark, durable on return; its object's full name."""
    name = f"{FOLDER}{clock.stamp(mark.made)}-{secrets.token_hex(4)}"
    data = json.dumps({"format": _FORMAT, **mark.as_json()}, ensure_ascii=False).encode(
        "utf-8", "backslashreplace"
    )
    return repository.put(name, [data]).name


def read_all(repository: Repository) -> tuple[Mark, ...]:
    """Every mark, by time. Raises ObjectDamagedError for one that cannot be read, WrongKeyError."""
    found = [_read(repository, info.name) for info in list(repository.storage.list(FOLDER))]
    return tuple(sorted(found, key=lambda mark: (mark.at, mark.made)))


def _read(repository: Repository, name: str) -> Mark:
    try:
        value = json.loads(b"".join(repository.read(name)))
        if value["format"] != _FORMAT:
            raise ValueError(f"format {value['format']}")
        return Mark(
            text=str(value["text"]),
            at=datetime.fromisoformat(value["time"]).astimezone(UTC),
            made=datetime.fromisoformat(value["made"]).astimezone(UTC),
            by=str(value["by"]),
            lsn=Lsn.parse(value["lsn"]) if value["lsn"] else None,
            xid=int(value["xid"]) if value["xid"] is not None else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ObjectDamagedError(f"not a mark: {error}", where=name) from error
