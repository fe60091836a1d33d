"""Base backups at rest: every object is there and unchanged, and holds the files PostgreSQL's manifest names.

The sha256 is of the stored bytes, so nothing here needs a key, except the contents of files (`full`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from knockwood.errors import KnockwoodError, ObjectDamagedError, ObjectMissingError, WrongKeyError
from knockwood.repository.backups.listing import MemberIndex, read_index, read_object
from knockwood.repository.backups.model import Backup, Pack
from knockwood.repository.contents import altered
from knockwood.repository.proved import Proved
from knockwood.repository.repository import Repository
from knockwood.repository.storage import ObjectInfo

REQUIRED = ("backup_label", "global/pg_control", "PG_VERSION")
"""Without the first a restore starts silently with data missing; without the others not at all."""

_READERS = 2


@dataclass(slots=True)
class BackupResult:
    """What checking one backup's objects showed; `proved` are the objects read now and found right."""

    damaged: dict[str, str] = field(default_factory=dict)
    not_checked: dict[str, str] = field(default_factory=dict)
    proved: list[Proved] = field(default_factory=list)
    bytes: int = 0

    @property
    def reason(self) -> str | None:
        """Why the backup cannot be used, or None."""
        return "; ".join(f"{name}: {why}" for name, why in list(self.damaged.items())[:3]) or None


def check_backup(
    repository: Repository,
    backup: Backup,
    listing: Mapping[str, ObjectInfo],
    trusted: Mapping[str, Proved],
    moment: datetime,
    on_bytes: Callable[[int], None] = lambda count: None,
    *,
    contents: bool = False,
) -> BackupResult:
    """Check one backup. Presence and sizes always; the content of what is not in `trusted`.

    With `contents` the packs are opened and each file compared with its checksum in the manifest.

    Raises StorageUnavailableError only; damage is in the result.
    """
    result = BackupResult()
    if backup.system_identifier != repository.header.system_identifier:
        result.damaged[f"{backup.folder}backup.json"] = (
            f"belongs to cluster {backup.system_identifier}, the repository to"
            f" {repository.header.system_identifier}"
        )
    todo: list[Pack] = []
    for pack in backup.objects:
        info = listing.get(pack.name)
        if info is None:
            result.damaged[pack.name] = "is missing"
        elif info.bytes != pack.bytes:
            result.damaged[pack.name] = f"has {info.bytes} bytes instead of {pack.bytes}"
        elif pack.name not in trusted:
            todo.append(pack)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as pool:
        for pack, reason in zip(todo, pool.map(lambda p: _sha256(repository, p), todo), strict=True):
            on_bytes(pack.bytes)
            result.bytes += pack.bytes
            if reason is None:
                result.proved.append(Proved.of(listing[pack.name], moment))
            else:
                result.damaged[pack.name] = reason
    # The index and the manifest are small, and say whether the backup is whole: compared every time.
    if backup.members.name not in result.damaged and backup.manifest.name not in result.damaged:
        _compare(repository, backup, result, contents=contents)
    return result


def _sha256(repository: Repository, pack: Pack) -> str | None:
    """What is wrong with the stored bytes, or None."""
    digest = hashlib.sha256()
    try:
        for chunk in repository.storage.read(pack.name):
            digest.update(chunk)
    except ObjectMissingError:
        return "is missing"
    if digest.hexdigest() != pack.sha256:
        return "its bytes are not those that were stored (sha256)"
    return None


def _compare(repository: Repository, backup: Backup, result: BackupResult, *, contents: bool) -> None:
    try:
        index = read_index(repository, backup)
        files, problem = _manifest(read_object(repository, backup.manifest))
    except WrongKeyError as error:
        result.not_checked[f"{backup.folder} files against the manifest"] = error.what
        return
    except (ObjectDamagedError, ObjectMissingError, KeyError, TypeError, ValueError) as error:
        what = error.what if isinstance(error, KnockwoodError) else f"cannot be understood: {error!r}"
        result.damaged[backup.members.name] = what
        return
    if problem is not None:
        result.damaged[backup.manifest.name] = problem
    packs = {pack.name: pack for pack in backup.packs}
    for name, reason in (*_against_packs(index, packs), *_against_manifest(index, files, packs)):
        result.damaged.setdefault(name or backup.members.name, reason)
    if contents:
        _open_packs(repository, backup, {p: e.checksum for p, e in files.items() if e.checksum}, result)


def _open_packs(
    repository: Repository, backup: Backup, stated: Mapping[str, tuple[str, str]], result: BackupResult
) -> None:
    part = f"{backup.folder} contents of files"
    if not stated:
        result.not_checked[part] = "the manifest holds no checksums"
        return
    for pack in backup.packs:
        if pack.name in result.damaged:
            continue
        try:
            for _, reason in altered(read_object(repository, pack), stated):
                result.damaged.setdefault(pack.name, reason)
        except WrongKeyError as error:
            result.not_checked[part] = error.what
            return
        except (ObjectDamagedError, ObjectMissingError) as error:
            result.damaged[pack.name] = error.what


class _Entry(NamedTuple):
    """A file in a manifest; `checksum` is algorithm and value, None if it has none."""

    size: int
    checksum: tuple[str, str] | None


def _manifest(chunks: Iterator[bytes]) -> tuple[dict[str, _Entry], str | None]:
    """The files in a backup_manifest by path, and what is wrong with its own checksum."""
    digest = hashlib.sha256()
    files: dict[str, _Entry] = {}
    stated: str | None = None
    for line in _lines(chunks):
        if line.startswith(b'"Manifest-Checksum"'):
            stated = str(json.loads(b"{" + line)["Manifest-Checksum"])
            continue
        digest.update(line)
        text = line.strip().removesuffix(b",")
        if text.startswith((b'{ "Path"', b'{ "Encoded-Path"')):
            entry = json.loads(text)
            path = entry.get("Path")
            if path is None:
                path = bytes.fromhex(entry["Encoded-Path"]).decode("utf-8", "surrogateescape")
            algorithm = entry.get("Checksum-Algorithm")
            checksum = (algorithm, entry["Checksum"]) if algorithm else None
            files[path] = _Entry(int(entry["Size"]), checksum)
    if stated is None:
        return files, "has no checksum of its own: it is cut short"
    if stated != digest.hexdigest():
        return files, "its own checksum does not match: it was changed"
    return files, None


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def _against_packs(index: MemberIndex, packs: Mapping[str, Pack]) -> Iterator[tuple[str | None, str]]:
    named = {pack.name: pack for pack in index.packs.values()}
    for name in packs.keys() - named.keys():
        yield name, "is not in the index of members"
    for name in named.keys() - packs.keys():
        yield name, "is in the index of members, but not in the backup's description"
    counts: dict[int, int] = {}
    for member in index.members.values():
        counts[member.pack] = counts.get(member.pack, 0) + 1
        pack = index.packs.get(member.pack)
        if pack is None:
            yield None, f"{member.path} lies in pack {member.pack}, which is not listed"
        elif pack.name in packs and member.offset + member.size > packs[pack.name].raw_bytes:
            yield pack.name, f"{member.path} would lie past its end"
    for number, pack in index.packs.items():
        if counts.get(number, 0) != pack.members:
            yield pack.name, f"should hold {pack.members} members, the index names {counts.get(number, 0)}"


def _against_manifest(
    index: MemberIndex, files: Mapping[str, _Entry], packs: Mapping[str, Pack]
) -> Iterator[tuple[str | None, str]]:
    held = {member.path: member for member in index.members.values() if member.kind == "file"}
    missing = sorted({*(files.keys() - held.keys()), *(name for name in REQUIRED if name not in held)})
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        yield None, f"files of the backup are missing: {', '.join(missing[:3])}{more}"
    strange = sorted(held.keys() - files.keys())
    if strange:
        yield None, f"holds files that the manifest does not name: {', '.join(strange[:3])}"
    for path, (size, _) in files.items():
        member = held.get(path)
        if member is not None and member.size != size:
            name = index.packs[member.pack].name if member.pack in index.packs else None
            yield name, f"{path} has {member.size} bytes instead of {size}"


def check_all(
    repository: Repository,
    backups: Sequence[Backup],
    listing: Mapping[str, ObjectInfo],
    trusted: Mapping[str, Proved],
    moment: datetime,
    on_bytes: Callable[[int], None],
    *,
    contents: bool = False,
) -> dict[str, BackupResult]:
    """Check every backup; by id."""
    return {
        b.id: check_backup(repository, b, listing, trusted, moment, on_bytes, contents=contents)
        for b in backups
    }
