"""What a stored base backup says about itself: `backups/<id>/backup.json`, written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from knockwood.errors import (
    ObjectDamagedError,
    ObjectMissingError,
    RepositoryFormatError,
    TargetUnreachableError,
)
from knockwood.host import clock
from knockwood.model import Lsn, Timeline, Verdict, WalRange

FOLDER = "backups/"
FORMAT = 1
BAD_PAGES_LISTED = 10_000
"""At most so many bad pages are listed one by one; `BackupHealth.bad_page_count` counts them all."""

Kind = Literal["full", "incremental"]


@dataclass(frozen=True, slots=True)
class Pack:
    """One stored object of a backup. `sha256` is of the stored bytes; `raw_bytes` before compression."""

    name: str
    bytes: int
    raw_bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "raw_bytes": self.raw_bytes, "sha256": self.sha256}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Pack:
        return cls(str(value["name"]), int(value["bytes"]), int(value["raw_bytes"]), str(value["sha256"]))


@dataclass(frozen=True, slots=True)
class Tablespace:
    """A tablespace outside the data directory, and where it lay on the server."""

    oid: int
    location: str


@dataclass(frozen=True, slots=True)
class BadPage:
    """A page that failed: `file` relative to the data directory, `block` counted within the relation fork.

    (A relation's second 1 GB segment starts at block 131072.)
    """

    file: str
    block: int
    reason: str


@dataclass(frozen=True, slots=True)
class BackupHealth:
    """Whether every page of the backup was whole. Without data checksums it is not checked."""

    verdict: Verdict
    bad_pages: tuple[BadPage, ...] = ()
    bad_page_count: int = 0
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": str(self.verdict),
            "bad_pages": [{"file": p.file, "block": p.block, "reason": p.reason} for p in self.bad_pages],
            "bad_page_count": self.bad_page_count,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BackupHealth:
        pages = tuple(BadPage(p["file"], int(p["block"]), p["reason"]) for p in value["bad_pages"])
        return cls(Verdict(value["verdict"]), pages, int(value["bad_page_count"]), str(value["reason"]))


@dataclass(frozen=True, slots=True)
class Backup:
    """A complete base backup. Times UTC, sizes bytes.

    `packs` hold the files; `members` is the object that says which file lies where, `relations` the one
    that maps names to files, `manifest` PostgreSQL's own backup_manifest. `parent` is the backup an
    incremental one builds on.
    """

    id: str
    kind: Kind
    parent: str | None
    system_identifier: int
    timeline: Timeline
    start_lsn: Lsn
    stop_lsn: Lsn
    started_at: datetime
    finished_at: datetime
    server_version: int
    checksums: bool
    segment_bytes: int
    raw_bytes: int
    stored_bytes: int
    packs: tuple[Pack, ...]
    members: Pack
    relations: Pack
    manifest: Pack
    tablespaces: tuple[Tablespace, ...]
    settings: Mapping[str, str]
    health: BackupHealth
    encrypted: bool = field(default=False)

    @property
    def folder(self) -> str:
        """The prefix of its objects in the repository."""
        return f"{FOLDER}{self.id}/"

    @property
    def major(self) -> int:
        return self.server_version // 10000

    @property
    def wal(self) -> WalRange:
        """The WAL without which the backup is not consistent."""
        return WalRange(self.timeline, self.start_lsn, self.stop_lsn)

    @property
    def objects(self) -> tuple[Pack, ...]:
        """Every stored object but backup.json itself."""
        return (*self.packs, self.members, self.relations, self.manifest)

    def as_json(self) -> dict[str, Any]:
        value = {
            "format": FORMAT,
            "id": self.id,
            "kind": self.kind,
            "parent": self.parent,
            "system_identifier": str(self.system_identifier),
            "timeline": self.timeline,
            "start_lsn": str(self.start_lsn),
            "stop_lsn": str(self.stop_lsn),
            "started_at": self.started_at.isoformat(),
            "finished_at": self.finished_at.isoformat(),
            "server_version": self.server_version,
            "checksums": self.checksums,
            "segment_bytes": self.segment_bytes,
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
            "encrypted": self.encrypted,
            "packs": [pack.as_json() for pack in self.packs],
            "members": self.members.as_json(),
            "relations": self.relations.as_json(),
            "manifest": self.manifest.as_json(),
            "tablespaces": [{"oid": t.oid, "location": t.location} for t in self.tablespaces],
            "settings": dict(self.settings),
            "health": self.health.as_json(),
        }
        return value | {"sha256": own_sha256(value)}

    @classmethod
    def from_json(cls, value: Any) -> Backup:
        """Read what `as_json` wrote; raises RepositoryFormatError for anything else.

        Raises ObjectDamagedError where it was changed since; the first versions wrote no sha256 to tell by.
        """
        try:
            if int(value["format"]) > FORMAT:
                raise RepositoryFormatError(
                    f"a newer Knockwood wrote this backup (format {value['format']})",
                    where=str(value.get("id")),
                    hint="upgrade Knockwood on this machine",
                )
            if "sha256" in value and value["sha256"] != own_sha256(value):
                raise ObjectDamagedError(
                    "the description of the backup was changed: it does not have its own sha256",
                    where=str(value.get("id")),
                    hint="use another backup, and look at the disk that holds the repository",
                )
            return cls._read(value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RepositoryFormatError(f"not the description of a backup: {error!r}") from error

    @classmethod
    def _read(cls, value: Mapping[str, Any]) -> Backup:
        if value["kind"] not in ("full", "incremental"):
            raise ValueError(value["kind"])
        return cls(
            id=str(value["id"]),
            kind=value["kind"],
            parent=value["parent"],
            system_identifier=int(value["system_identifier"]),
            timeline=Timeline(int(value["timeline"])),
            start_lsn=Lsn.parse(value["start_lsn"]),
            stop_lsn=Lsn.parse(value["stop_lsn"]),
            started_at=datetime.fromisoformat(value["started_at"]),
            finished_at=datetime.fromisoformat(value["finished_at"]),
            server_version=int(value["server_version"]),
            checksums=bool(value["checksums"]),
            segment_bytes=int(value["segment_bytes"]),
            raw_bytes=int(value["raw_bytes"]),
            stored_bytes=int(value["stored_bytes"]),
            encrypted=bool(value["encrypted"]),
            packs=tuple(Pack.from_json(pack) for pack in value["packs"]),
            members=Pack.from_json(value["members"]),
            relations=Pack.from_json(value["relations"]),
            manifest=Pack.from_json(value["manifest"]),
            tablespaces=tuple(Tablespace(int(t["oid"]), str(t["location"])) for t in value["tablespaces"]),
            settings={str(k): str(v) for k, v in value["settings"].items()},
            health=BackupHealth.from_json(value["health"]),
        )


def own_sha256(value: Mapping[str, Any]) -> str:
    """The sha256 of a description without its member `sha256`: keys sorted, no spaces, ASCII."""
    rest = {key: value[key] for key in value if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a backup or restore is. `total` is an estimate in bytes, 0 where there is none."""

    done: int
    total: int
    current: str = ""


def new_id(kind: Kind, moment: datetime) -> str:
    """`20261121T044453Z-full`: sorts by time."""
    return f"{clock.stamp(moment)}-{'full' if kind == 'full' else 'incr'}"


def chain(backups: Iterable[Backup], id: str) -> tuple[Backup, ...]:
    """The backups needed to restore `id`, the full one first.

    Raises ObjectMissingError if `id` is none of them, TargetUnreachableError if an ancestor is not.
    """
    known = {backup.id: backup for backup in backups}
    if id not in known:
        raise ObjectMissingError(
            f"there is no complete backup {id}", hint="`knockwood backups` lists those there are"
        )
    links = [known[id]]
    while links[-1].kind == "incremental":
        parent = links[-1].parent
        if parent not in known or any(parent == link.id for link in links):
            raise TargetUnreachableError(
                f"backup {links[-1].id} builds on {parent}, which is not in the repository",
                where=id,
                hint="restore from another backup, and take a full one now",
            )
        links.append(known[parent])
    return tuple(reversed(links))
