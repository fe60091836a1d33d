"""The rows of the catalogue that are about the repository: damaged WAL, and backups without their label."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from damage_cases import Case
from damage_places import Damage, Place, judge
from damage_site import BENCH, Site, copy_of
from gap_knockwood import remove_member
from knockwood.clone.spawn import spawn
from knockwood.errors import KnockwoodError
from knockwood.model import WalSegment
from knockwood.operations.check import check
from knockwood.operations.freshness import bring_up_to_date
from knockwood.operations.protect import receiving
from knockwood.repository.backups.model import own_sha256
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Latest, resolve
from knockwood.repository.verify import verify

if TYPE_CHECKING:
    from gap_knockwood import Knockwood

CLUSTER = ""
"""These damages are of no one database."""

LABEL = "backup_label"


REPOSITORY_ROWS = ("wal", "backup-label")


def play_repository(healthy: Site, key: str, parent: Path) -> Case:
    """One of these rows, on a copy of its own."""
    with copy_of(healthy, parent) as site:
        return _wal(site) if key == "wal" else _label(site)


def _wal(site: Site) -> Case:
    """One segment in the middle of the archive gone, and in a later one four bytes changed."""
    with receiving(site.cluster, site.repository):
        for _ in range(8):
            site.sql(BENCH, "update pgbench_tellers set tbalance = tbalance + 1; select pg_switch_wal()")
        bring_up_to_date(site.cluster, site.repository)
        storage = site.repository.storage
        newest = max(info.name for info in storage.list("backups/") if info.name.endswith("backup.json"))
        stop = str(site.repository.get_json(newest)["stop_lsn"])
        names = _segments_after(site, stop)
        lost, damaged = names[len(names) // 3], names[2 * len(names) // 3]
        (site.folder / "repository" / lost).unlink()
        path = site.folder / "repository" / damaged
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 4] = bytes(b ^ 0xFF for b in data[len(data) // 2 :][:4])
        path.write_bytes(data)
        segment = WalSegment.parse(Path(lost).name.partition(".")[0], site.repository.header.segment_bytes)
        damages = [
            Damage(
                "a segment is missing",
                CLUSTER,
                (Place(lsn=str(segment.start), check="wal_archive"), Place(key=segment.name, check="verify")),
            ),
            Damage("four bytes changed", CLUSTER, (Place(key=damaged, check="verify"),)),
        ]
        case = Case("WAL gap, damaged WAL", "wal", judge(damages, []))
        begun = time.monotonic()
        for finding in check(site.cluster, ["wal_archive"]).findings:
            case.judgement.add(finding.as_json())
        for found in verified(site.repository):
            case.judgement.add(found)
        case.seconds["check and verify"] = time.monotonic() - begun
    return case


def _segments_after(site: Site, stop: str) -> list[str]:
    """The whole segments in the archive after the one that a backup ends in, in order."""
    end = site.one("postgres", "select pg_walfile_name(%s::pg_lsn)", stop)
    names = [info.name for info in site.repository.storage.list("wal/")]
    whole = [name for name in names if not name.startswith(("wal/partial/", "wal/history/"))]
    return sorted(name for name in whole if Path(name).name[:24] > end)


def verified(repository: Repository) -> list[Mapping[str, Any]]:
    """What `knockwood verify` says, in the shape of findings."""
    outcome = verify(repository)
    found = [
        _said(f"{gap.segment} {gap.object or ''}", gap.reason, lsn=str(gap.start)) for gap in outcome.gaps
    ]
    found += [_said(item.object, item.reason) for item in outcome.damaged]
    return [*found, *(_said(one.backup, one.reason) for one in outcome.unusable)]


def _said(key: str, summary: str, **location: Any) -> Mapping[str, Any]:
    return {"check": "verify", "summary": summary, "location": {"key": key, **location}, "evidence": {}}


def _label(site: Site) -> Case:
    """A backup without its label in which all checksums and counts fit: verify and restore are asked."""
    repository = site.repository
    stored = StoredBackup(site.folder / "repository")
    # It only reads and writes stored objects by name.
    remove_member(cast("Knockwood", stored), LABEL)
    places = (Place(key=LABEL, check="verify"), Place(key=LABEL, check="restore"))
    damages = [Damage(place.check or "", CLUSTER, (place,)) for place in places]
    case = Case("restore without backup_label", "backup-label", judge(damages, []))
    begun = time.monotonic()
    for found in verified(repository):
        if LABEL in str(found["summary"]):
            case.judgement.add(_said(LABEL, str(found["summary"])))
        elif stored.id not in str(found["location"]):
            case.judgement.add(found)
    try:
        plan = resolve(repository, Latest(), backup=stored.id, programs_for=site.cluster.programs)
        with spawn(repository, plan, programs=site.server.programs, purpose="check"):
            pass
    except KnockwoodError as error:
        case.judgement.add(_said(str(error), str(error)) | {"check": "restore"})
    case.seconds["verify"] = time.monotonic() - begun
    return case


class StoredBackup:
    """The newest backup's objects, to be read and written as they are stored."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._path = max(root.glob("backups/*/backup.json"))
        self.id = self._path.parent.name

    def backup_value(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._path.read_text())
        return value

    def write_backup(self, value: Mapping[str, Any]) -> None:
        self._path.write_text(json.dumps({**value, "sha256": own_sha256(value)}))

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self.root / name).write_bytes(data)
