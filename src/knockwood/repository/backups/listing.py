"""Which backups there are, what files they hold, and the map from names to files."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

from knockwood.errors import KnockwoodError, ObjectDamagedError, ObjectMissingError, RepositoryFormatError
from knockwood.model import Lsn
from knockwood.repository import codec
from knockwood.repository.backups.model import FOLDER, Backup, Pack
from knockwood.repository.repository import Repository

COMMIT_MARK = "backup.json"


def age_order(backup: Backup) -> tuple[int, Lsn, datetime, str]:
    """The order in which backups were taken, whatever the clocks said."""
    return backup.timeline, backup.start_lsn, backup.finished_at, backup.id


def list_backups(repository: Repository) -> list[Backup]:
    """The complete backups, oldest first; without one whose description is damaged (`scan_backups`)."""
    return scan_backups(repository)[0]


def scan_backups(repository: Repository) -> tuple[list[Backup], list[KnockwoodError]]:
    """The complete backups, oldest first, and for each description that cannot be read why."""
    found: list[Backup] = []
    unreadable: list[KnockwoodError] = []
    for info in list(repository.storage.list(FOLDER)):
        if not info.name.endswith(f"/{COMMIT_MARK}"):
            continue
        try:
            found.append(Backup.from_json(repository.get_json(info.name)))
        except ObjectMissingError:
            continue  # expired since the listing
        except (ObjectDamagedError, RepositoryFormatError) as error:
            error.where = f"{repository.storage.url}/{info.name}"
            unreadable.append(error)
    return sorted(found, key=age_order), unreadable


def read_object(repository: Repository, pack: Pack) -> Iterator[bytes]:
    """The content of one of a backup's objects; its stored bytes are checked against the sha256.

    Raises ObjectMissingError, ObjectDamagedError or WrongKeyError, naming the object, at the latest at
    the end: only the normal end of the iterator says that all of it was right.
    """
    where = f"{repository.storage.url}/{pack.name}"
    counted = codec.Counted(repository.storage.read(pack.name))
    encrypted = pack.name.endswith(codec.ENCRYPTED_SUFFIX)
    try:
        yield from codec.decode(counted, encrypted=encrypted, identities=repository.identities)
        for _ in counted:  # what follows the content would be damage too
            pass
    except ObjectDamagedError as error:
        error.where = error.where or where
        raise
    if counted.bytes != pack.bytes or counted.sha256 != pack.sha256:
        raise ObjectDamagedError(
            f"the stored object has {counted.bytes} bytes and another sha256 than recorded"
            if counted.bytes == pack.bytes
            else f"the stored object has {counted.bytes} bytes, recorded are {pack.bytes}",
            where=where,
            hint="the storage changed what was written: use another backup, and look at the disk",
        )


def _lines(repository: Repository, pack: Pack) -> Iterator[dict[str, Any]]:
    rest = b""
    try:
        for chunk in read_object(repository, pack):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield json.loads(line)
        if rest:
            yield json.loads(rest)
    except ValueError as error:
        raise ObjectDamagedError("not lines of JSON", where=pack.name) from error


@dataclass(frozen=True, slots=True)
class StoredMember:
    """Where a file of a backup lies. `offset` is of its content in the raw tar archive of its pack."""

    path: str
    kind: Literal["file", "folder", "link"]
    size: int
    mode: int
    pack: int
    offset: int


@dataclass(frozen=True, slots=True)
class StoredPack:
    """A pack's zstd frames as (place in the stored zstd stream, place in the raw tar), ascending."""

    number: int
    name: str
    members: int
    frames: tuple[tuple[int, int], ...]

    def frames_for(self, offset: int, size: int) -> tuple[int, int | None, int]:
        """What to read for raw bytes `offset` to `offset + size`: stored start, stored end, raw start.

        The end is None for: up to the end of the object.
        """
        raw = [frame[1] for frame in self.frames]
        first = max(0, bisect_right(raw, offset) - 1)
        after = bisect_right(raw, max(offset, offset + size - 1))
        end = self.frames[after][0] if after < len(self.frames) else None
        return self.frames[first][0], end, self.frames[first][1]


@dataclass(frozen=True, slots=True)
class MemberIndex:
    """Every file of a backup, by path, and the packs by number."""

    members: Mapping[str, StoredMember]
    packs: Mapping[int, StoredPack]


def read_packs(repository: Repository, backup: Backup) -> dict[str, StoredPack]:
    """The packs of a backup by object name, without its members: little memory, whatever the size."""
    found = {}
    for line in _lines(repository, backup.members):
        if "frames" in line:
            pack = _stored_pack(line)
            found[pack.name] = pack
    return found


def read_index(repository: Repository, backup: Backup, under: tuple[str, ...] = ()) -> MemberIndex:
    """The member index of a backup, or only the members whose path begins with one of `under`."""
    members: dict[str, StoredMember] = {}
    packs: dict[int, StoredPack] = {}
    for line in _lines(repository, backup.members):
        if "frames" in line:
            packs[line["pack"]] = _stored_pack(line)
        elif not under or line["path"].startswith(under):
            members[line["path"]] = StoredMember(
                line["path"], line["kind"], line["size"], line["mode"], line["pack"], line["offset"]
            )
    return MemberIndex(members, packs)


def _stored_pack(line: Mapping[str, Any]) -> StoredPack:
    return StoredPack(line["pack"], line["name"], line["members"], tuple((a, b) for a, b in line["frames"]))


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation as the catalogs named it at the time of the backup.

    `path` is its main fork's first segment; `table` the oid of the table an index or TOAST relation
    belongs to. Kind and persistence are pg_class's letters.
    """

    database: str
    database_oid: int
    schema: str
    name: str
    kind: str
    persistence: str
    oid: int
    filenode: int
    path: str
    table: int | None
    shared: bool


@dataclass(frozen=True)
class RelationMap:
    """The map from names to files; `not_recorded` says which databases are not in it, and why."""

    relations: tuple[Relation, ...]
    not_recorded: Mapping[str, str] = field(default_factory=dict)

    def find(self, database: str, schema: str, name: str) -> Relation | None:
        for relation in self.relations:
            if (relation.database, relation.schema, relation.name) == (database, schema, name):
                return relation
        return None

    def family(self, relation: Relation) -> tuple[Relation, ...]:
        """The relation, its indexes, its TOAST relation and that one's index."""
        below = self._of_table(relation)
        return (relation, *below, *(one for each in below for one in self._of_table(each)))

    def _of_table(self, relation: Relation) -> Sequence[Relation]:
        return self._by_table.get((relation.database_oid, relation.oid), ())

    @cached_property
    def _by_table(self) -> Mapping[tuple[int, int], Sequence[Relation]]:
        found: dict[tuple[int, int], list[Relation]] = {}
        for one in self.relations:
            if one.table is not None:
                found.setdefault((one.database_oid, one.table), []).append(one)
        return found


def relation_map(repository: Repository, backup: Backup) -> RelationMap:
    """The map recorded with a backup."""
    relations: list[Relation] = []
    missing: dict[str, str] = {}
    for line in _lines(repository, backup.relations):
        if "not_recorded" in line:
            missing[line["database"]] = line["not_recorded"]
        else:
            relations.append(Relation(**line))
    return RelationMap(tuple(relations), missing)
