"""What is written down about a shadow: where it stands, what was proved of it, and how far it may not go."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

from knockwood.errors import HostError
from knockwood.host import clock, files
from knockwood.model import Commit, Lsn, Timeline, Verdict
from knockwood.repository.backups.model import Backup

FORMAT: Final = 1
RECORD: Final = "shadow.json"
HOLDS: Final = "holds"

Stage = Literal["making", "standing", "moving"]


@dataclass(frozen=True, slots=True)
class Stand:
    """A position between two records: after (`inclusive`) or before the commit record that starts at `lsn`.

    `lsn` None is the end of the backup. `reached` is the last position replayed, `commit` the last one in.
    """

    lsn: Lsn | None
    inclusive: bool
    reached: Lsn
    commit: Commit | None

    def as_json(self) -> dict[str, Any]:
        return {
            "lsn": str(self.lsn) if self.lsn is not None else None,
            "inclusive": self.inclusive,
            "reached": str(self.reached),
            "commit": self.commit.as_json() if self.commit else None,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        commit = value["commit"]
        return cls(
            Lsn.parse(value["lsn"]) if value["lsn"] is not None else None,
            bool(value["inclusive"]),
            Lsn.parse(value["reached"]),
            Commit(int(commit["xid"]), Lsn.parse(commit["lsn"]), datetime.fromisoformat(commit["time"]))
            if commit
            else None,
        )


@dataclass(frozen=True, slots=True)
class ProofSoFar:
    """What the checks said of a shadow where it stood at `lsn`. `checks` holds name, verdict, detail."""

    lsn: Lsn
    verdict: Verdict
    checked_at: datetime
    checks: tuple[tuple[str, Verdict, str], ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "lsn": str(self.lsn),
            "verdict": str(self.verdict),
            "checked_at": self.checked_at.isoformat(),
            "checks": [{"name": n, "verdict": str(v), "detail": d} for n, v, d in self.checks],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        checks = tuple((c["name"], Verdict(c["verdict"]), c["detail"]) for c in value["checks"])
        moment = datetime.fromisoformat(value["checked_at"])
        return cls(Lsn.parse(value["lsn"]), Verdict(value["verdict"]), moment, checks)


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that stands where the record says: its postmaster, and the process that it is a child of.

    `started` is in seconds since the machine booted.
    """

    pid: int
    started: float
    parent: int

    def as_json(self) -> dict[str, Any]:
        return {"pid": self.pid, "started": self.started, "parent": self.parent}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(int(value["pid"]), float(value["started"]), int(value["parent"]))


@dataclass(frozen=True, slots=True)
class ShadowRecord:
    """A shadow as it is written down. While it is `moving` it is somewhere between `stand` and `going_to`.

    `chain` are the backups it was made from. `good` is the last stand at which the checks found nothing.
    `spool` tells where the WAL in its spool came from, and `serving` which server was started on it, as long as
    the machine is not started anew (`boot`).
    """

    cluster: str
    chain: tuple[Backup, ...]
    timeline: Timeline
    stage: Stage
    sockets: Path
    made_at: datetime
    updated_at: datetime
    stand: Stand | None = None
    going_to: Lsn | None = None
    good: Stand | None = None
    proof: ProofSoFar | None = None
    spool: Mapping[str, str | None] | None = None
    boot: str = ""
    serving: Serving | None = None

    @property
    def backup(self) -> Backup:
        return self.chain[-1]

    @property
    def position(self) -> Lsn | None:
        """No record at or after this was replayed; while it moves, as far as it is going. None: being made."""
        if self.stand is None:
            return None
        going = self.going_to
        return max(self.stand.reached, going + 1) if going is not None else self.stand.reached

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "cluster": self.cluster,
            "chain": [backup.as_json() for backup in self.chain],
            "timeline": self.timeline,
            "stage": self.stage,
            "sockets": str(self.sockets),
            "made_at": self.made_at.isoformat(),
            "updated_at": self.updated_at.isoformat(),
            "stand": self.stand.as_json() if self.stand else None,
            "going_to": str(self.going_to) if self.going_to is not None else None,
            "good": self.good.as_json() if self.good else None,
            "proof": self.proof.as_json() if self.proof else None,
            "spool": dict(self.spool or {}),
            "boot": self.boot,
            "serving": self.serving.as_json() if self.serving else None,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']}")
        return cls(
            cluster=value["cluster"],
            chain=tuple(Backup.from_json(each) for each in value["chain"]),
            timeline=Timeline(int(value["timeline"])),
            stage=value["stage"],
            sockets=Path(value["sockets"]),
            made_at=datetime.fromisoformat(value["made_at"]),
            updated_at=datetime.fromisoformat(value["updated_at"]),
            stand=Stand.from_json(value["stand"]) if value["stand"] else None,
            going_to=Lsn.parse(value["going_to"]) if value["going_to"] else None,
            good=Stand.from_json(value["good"]) if value["good"] else None,
            proof=ProofSoFar.from_json(value["proof"]) if value["proof"] else None,
            spool=value["spool"],
            boot=value["boot"],
            # Written since its server runs on between two steps.
            serving=Serving.from_json(value["serving"]) if value.get("serving") else None,
        )


def read_record(folder: Path) -> ShadowRecord | None:
    """The shadow of a folder, None where there is none. HostError for one that cannot be understood."""
    path = folder / RECORD
    try:
        return ShadowRecord.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HostError(
            f"the shadow's record cannot be read: {error}",
            where=str(path),
            hint="`knockwood shadow remove` removes the shadow; the next run makes a new one",
        ) from error


def write_record(folder: Path, record: ShadowRecord) -> None:
    """Write it down, durable on return."""
    files.replace(folder / RECORD, json.dumps(record.as_json(), indent=1).encode())


def boot_id() -> str:
    """What changes when the machine is started anew; empty where nothing tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Hold:
    """A shadow may replay no record that starts at or after `lsn`, until the hold is released.

    `check` and `place` say what was found and where; empty for a hold set by hand.
    """

    id: str
    lsn: Lsn
    reason: str
    check: str
    place: str
    made_at: datetime
    released_at: datetime | None = None

    @property
    def active(self) -> bool:
        return self.released_at is None

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "lsn": str(self.lsn),
            "reason": self.reason,
            "check": self.check,
            "place": self.place,
            "made_at": self.made_at.isoformat(),
            "released_at": self.released_at.isoformat() if self.released_at else None,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        released = value["released_at"]
        return cls(
            id=value["id"],
            lsn=Lsn.parse(value["lsn"]),
            reason=value["reason"],
            check=value["check"],
            place=value["place"],
            made_at=datetime.fromisoformat(value["made_at"]),
            released_at=datetime.fromisoformat(released) if released else None,
        )


class Holds:
    """The holds of a shadow: one file each, so that any process can set one at any time, durably."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / HOLDS

    def all(self) -> tuple[Hold, ...]:
        """Every hold, released ones too, oldest first.

        One that cannot be read holds everything back: it was set for a reason.
        """
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                found.append(Hold.from_json(json.loads(path.read_text())))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"its file cannot be read: {error}"
                found.append(Hold(path.stem, Lsn(0), reason, "", "", clock.now()))
        return tuple(found)

    def active(self) -> tuple[Hold, ...]:
        return tuple(hold for hold in self.all() if hold.active)

    def bound(self) -> Hold | None:
        """The active hold with the lowest position."""
        return min(self.active(), key=lambda hold: hold.lsn, default=None)

    def add(self, lsn: Lsn, reason: str, check: str = "", place: str = "") -> Hold | None:
        """Set a hold, durable on return; None where the same thing was found before and is known.

        The same finding again, lower down, moves the bound down.
        """
        for hold in self.all():
            same = bool(check) and (hold.check, hold.place) == (check, place)
            if same and (not hold.active or hold.lsn <= lsn):
                return None
        moment = clock.now()
        made = Hold(f"{clock.stamp(moment)}-{secrets.token_hex(3)}", lsn, reason, check, place, moment)
        self._write(made)
        return made

    def release(self, id: str) -> Hold:
        """Release a hold; HostError for an unknown one. What it was for no longer holds the shadow."""
        for hold in self.all():
            if hold.id == id:
                released = replace(hold, released_at=hold.released_at or clock.now())
                self._write(released)
                return released
        raise HostError(f"there is no hold {id}", hint="`knockwood shadow status` lists them")

    def forget(self, checks: frozenset[str]) -> None:
        """Remove released holds of checks that hold again: what they find from now on is new."""
        for hold in self.all():
            if not hold.active and hold.check in checks:
                (self.folder / f"{hold.id}.json").unlink(missing_ok=True)

    def _write(self, hold: Hold) -> None:
        files.replace(self.folder / f"{hold.id}.json", json.dumps(hold.as_json(), indent=1).encode())
