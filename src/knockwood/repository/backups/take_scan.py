"""Which files of a data directory belong to a base backup: the rules are those of the server's own.

See excludeDirContents, excludeFiles and sendDir in src/backend/backup/basebackup.c.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

from knockwood.errors import HostError, RefusedError
from knockwood.host import files
from knockwood.postgres.control_file import CONTROL_FILE
from knockwood.repository.backups.tar import Member

EMPTIED: Final = frozenset(
    {"pg_stat_tmp", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_subtrans"}
)
"""Folders whose content means nothing to another server; they are kept, empty."""

LEFT_OUT: Final = frozenset(
    {
        "postgresql.auto.conf.tmp",
        "current_logfiles.tmp",
        "backup_label",  # of another backup, perhaps of long ago; ours comes from the server at the end
        "tablespace_map",
        "backup_manifest",
        "postmaster.pid",
        "postmaster.opts",
    }
)

_PREFIXES: Final = ("pgsql_tmp", "pg_internal.init")
_DATABASE: Final = re.compile(r"(?:base|pg_tblspc/\d+/PG_[^/]+)/\d+\Z")
_TEMPORARY: Final = re.compile(r"t\d+_\d+(?:_(?:fsm|vm|init))?(?:\.\d+)?\Z")
_RELATION: Final = re.compile(r"(?P<node>\d+)(?:_(?P<fork>fsm|vm|init))?(?:\.\d+)?\Z")
_DATA: Final = re.compile(r"(?:base|global|pg_\w+)(?:/|\Z)")


def left_out(folder: str, name: str, siblings: Collection[str]) -> bool:
    """Whether the entry `name` of `folder` (relative, "" for the top) stays out of a backup.

    `siblings` are all names in the folder: a relation with an init fork is unlogged, and recovery makes
    it anew from that fork.
    """
    if name in LEFT_OUT or name.startswith(_PREFIXES):
        return True
    if f"{folder}/{name}" == CONTROL_FILE:
        return True  # comes last, from one read whose CRC is right
    if not _DATABASE.match(folder):
        return False
    if _TEMPORARY.match(name):
        return True
    relation = _RELATION.match(name)
    return relation is not None and relation["fork"] != "init" and f"{relation['node']}_init" in siblings


def scan(root: Path, *, major: int, version_folder: str, tablespaces: Collection[int]) -> Iterator[Member]:
    """The folders and files of a backup with the sizes they have now; what vanishes meanwhile is no error.

    Of each tablespace only `version_folder` is this cluster's. Raises HostError for what cannot be read,
    RefusedError for links that PostgreSQL's own backups would leave out in silence.
    """
    yield from _below(root, "", major)
    for oid in sorted(tablespaces):
        link = f"pg_tblspc/{oid}"
        yield Member(link, mode=0o700, kind="folder")
        path = f"{link}/{version_folder}"
        if (root / path).is_dir():
            yield Member(path, mode=0o700, kind="folder")
            yield from _below(root, path, major)
        elif os.path.lexists(root / link):
            raise HostError(
                "the tablespace's folder is not there", where=str(root / path), hint="is its disk mounted?"
            )


def links(root: Path) -> dict[int, str]:
    """The tablespaces outside the data directory, by oid, and where they lie."""
    found = {}
    with files.translated(root):
        for entry in (root / "pg_tblspc").iterdir():
            if entry.name.isdecimal() and entry.is_symlink():
                try:
                    found[int(entry.name)] = os.readlink(entry)
                except FileNotFoundError:
                    continue
    return found


def _below(root: Path, start: str, major: int) -> Iterator[Member]:
    folders = [start]
    while folders:
        folder = folders.pop()
        entries = _entries(root / folder, may_vanish=bool(folder))
        for name, status in entries.items():
            if left_out(folder, name, entries):
                continue
            path = f"{folder}/{name}" if folder else name
            mode, emptied = stat.S_IMODE(status.st_mode), name in EMPTIED or path == "pg_wal"
            if emptied or stat.S_ISDIR(status.st_mode):
                # A link from such a place to another disk becomes a folder.
                yield Member(path, mode=mode if stat.S_ISDIR(status.st_mode) else 0o700, kind="folder")
                if path == "pg_wal":
                    yield from _inside_wal(major)
                elif not emptied:
                    folders.append(path)
            elif stat.S_ISREG(status.st_mode):
                yield Member(path, status.st_size, mode, int(status.st_mtime))
            elif stat.S_ISLNK(status.st_mode) and folder != "pg_tblspc" and _DATA.match(path):
                raise RefusedError(
                    "a symbolic link inside the data directory, which no base backup can hold",
                    where=str(root / path),
                    hint="use a tablespace to put data on another disk",
                )


def _inside_wal(major: int) -> Iterator[Member]:
    for name in ("archive_status", *(["summaries"] if major >= 17 else [])):
        yield Member(f"pg_wal/{name}", mode=0o700, kind="folder")


def _entries(folder: Path, *, may_vanish: bool) -> Mapping[str, os.stat_result]:
    found: dict[str, os.stat_result] = {}
    with files.translated(folder):
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        found[entry.name] = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
        except FileNotFoundError:
            if not may_vanish:
                raise
    return found
