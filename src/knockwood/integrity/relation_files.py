"""The relation files of a running server: listed and read, over the file system or over SQL."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from knockwood.errors import HostError, MissingPrivilegeError, PostgresError, UnsupportedVersionError
from knockwood.host import files as host_files
from knockwood.integrity.check import Subject
from knockwood.postgres.connection import Connection, server_facts, translated
from knockwood.postgres.control_file import is_control_file_of
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES

GLOBAL_TABLESPACE: Final = 1664
DEFAULT_TABLESPACE: Final = 1663

_NAME = re.compile(r"(\d+)(?:_(fsm|vm|init))?(?:\.(\d+))?\Z")
_FOLDER = re.compile(r"(?:global|base/(\d+)|pg_tblspc/(\d+)/PG_[^/]+/(\d+))\Z")


@dataclass(frozen=True, slots=True)
class RelationFile:
    """One file of a relation's fork. `path` is relative to the data directory, `bytes` as listed."""

    path: str
    tablespace: int
    database: int
    filenode: int
    fork: str
    segment: int
    bytes: int

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def relation_path(self) -> str:
        """The path of the relation's first main file, as `pg_relation_filepath` gives it."""
        return f"{self.folder}/{self.filenode}"


def parse_path(path: str, size: int = 0) -> RelationFile | None:
    """What a path below the data directory holds; None unless it is a permanent relation's file."""
    folder, _, name = path.rpartition("/")
    place, match = _FOLDER.match(folder), _NAME.match(name)
    if place is None or match is None:
        return None
    if place[2]:
        tablespace, database = int(place[2]), int(place[3])
    elif place[1]:
        tablespace, database = DEFAULT_TABLESPACE, int(place[1])
    else:
        tablespace, database = GLOBAL_TABLESPACE, 0
    return RelationFile(
        path, tablespace, database, int(match[1]), match[2] or "main", int(match[3] or 0), size
    )


class DataFiles(Protocol):
    """The server's files, read only. A file that is gone reads as empty: relations come and go."""

    def folders(self) -> list[str]:
        """The folders that hold relation files, relative to the data directory."""
        ...

    def names(self, folder: str) -> list[tuple[str, int]]:
        """The names and sizes (bytes) of the files in a folder; none if it is gone."""
        ...

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer at the end of the file, none beyond it or if it is gone."""
        ...

    def heads(self, path: str, pages: Sequence[int], length: int) -> list[bytes]:
        """The first `length` bytes of each of these pages of a file; none beyond its end or if it is gone."""
        ...

    def exists(self, path: str) -> bool: ...


def listing(data: DataFiles) -> list[RelationFile]:
    """Every permanent relation file now, in an order that is the same each time."""
    found: list[RelationFile] = []
    for folder in data.folders():
        for name, size in data.names(folder):
            file = parse_path(f"{folder}/{name}", size)
            if file is not None:
                found.append(file)
    found.sort(key=lambda file: (file.folder, file.filenode, file.fork, file.segment))
    return found


class LocalFiles:
    """Over the file system; needs the right to read the data directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folders(self) -> list[str]:
        found = ["global"]
        found += [f"base/{name}" for name in sorted(self._entries("base")) if name.isdigit()]
        for tablespace in sorted(self._entries("pg_tblspc")):
            for version in sorted(self._entries(f"pg_tblspc/{tablespace}")):
                if version.startswith("PG_"):
                    place = f"pg_tblspc/{tablespace}/{version}"
                    found += [f"{place}/{name}" for name in sorted(self._entries(place)) if name.isdigit()]
        return found

    def names(self, folder: str) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        with host_files.translated(self.root / folder):
            try:
                entries = os.scandir(self.root / folder)
            except FileNotFoundError:
                return []
            with entries:
                for entry in entries:
                    try:
                        if entry.is_file():
                            found.append((entry.name, entry.stat().st_size))
                    except FileNotFoundError:
                        continue
        return found

    def read(self, path: str, offset: int, length: int) -> bytes:
        with host_files.translated(self.root / path):
            try:
                handle = os.open(self.root / path, os.O_RDONLY | os.O_NOFOLLOW)
            except FileNotFoundError:
                return b""
            try:
                return os.pread(handle, length, offset)
            finally:
                os.close(handle)

    def heads(self, path: str, pages: Sequence[int], length: int) -> list[bytes]:
        with host_files.translated(self.root / path):
            try:
                handle = os.open(self.root / path, os.O_RDONLY | os.O_NOFOLLOW)
            except FileNotFoundError:
                return [b""] * len(pages)
            try:
                return [os.pread(handle, length, page * PAGE_BYTES) for page in pages]
            finally:
                os.close(handle)

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def _entries(self, folder: str) -> list[str]:
        with host_files.translated(self.root / folder):
            try:
                return os.listdir(self.root / folder)
            except (FileNotFoundError, NotADirectoryError):
                return []


class ServerFiles:
    """Over SQL (`pg_ls_dir`, `pg_read_binary_file`): a superuser, or a role with rights on them."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def folders(self) -> list[str]:
        found = ["global"]
        found += [f"base/{name}" for name in self._entries("base") if name.isdigit()]
        for tablespace in self._entries("pg_tblspc"):
            for version in self._entries(f"pg_tblspc/{tablespace}"):
                if version.startswith("PG_"):
                    place = f"pg_tblspc/{tablespace}/{version}"
                    found += [f"{place}/{name}" for name in self._entries(place) if name.isdigit()]
        return found

    def names(self, folder: str) -> list[tuple[str, int]]:
        with translated():
            rows = self.connection.execute(
                "select name, stat.size from pg_catalog.pg_ls_dir(%s, true, false) as name,"
                " pg_catalog.pg_stat_file(%s || '/' || name, true) as stat"
                " where stat.size is not null and not stat.isdir",
                [folder, folder],
            ).fetchall()
        return [(row[0], row[1]) for row in rows]

    def read(self, path: str, offset: int, length: int) -> bytes:
        with translated():
            row = self.connection.execute(
                "select pg_catalog.pg_read_binary_file(%s, %s, %s, true)", [path, offset, length], binary=True
            ).fetchone()
        return bytes(row[0]) if row and row[0] is not None else b""

    def heads(self, path: str, pages: Sequence[int], length: int) -> list[bytes]:
        with translated():
            rows = self.connection.execute(
                "select pg_catalog.pg_read_binary_file(%s, page * %s, %s, true)"
                " from unnest(%s::int8[]) with ordinality as wanted (page, place) order by place",
                [path, PAGE_BYTES, length, list(pages)],
                binary=True,
            ).fetchall()
        return [bytes(row[0]) if row[0] is not None else b"" for row in rows]

    def exists(self, path: str) -> bool:
        with translated():
            row = self.connection.execute(
                "select (pg_catalog.pg_stat_file(%s, true)).size is not null", [path]
            ).fetchone()
        return bool(row and row[0])

    def _entries(self, folder: str) -> list[str]:
        with translated():
            rows = self.connection.execute(
                "select pg_catalog.pg_ls_dir(%s, true, false) order by 1", [folder]
            ).fetchall()
        return [row[0] for row in rows]


@contextmanager
def data_files(subject: Subject) -> Iterator[DataFiles]:
    """The server's files, the local way where the data directory is known, else over SQL.

    Raises HostError if the data directory is not this server's (at the beginning, or any more at the end) or
    cannot be read, MissingPrivilegeError if there is no local reach and the role may not read files over SQL.
    """
    _require_usual_layout(subject)
    if subject.data_directory is not None:
        require_own_folder(subject, subject.data_directory)
        yield LocalFiles(subject.data_directory)
        # A standby that took the server's place meanwhile has other files than those that were read.
        require_own_folder(subject, subject.data_directory)
        return
    with subject.connect() as connection:
        try:
            with translated():
                connection.execute("select pg_catalog.pg_read_binary_file('global/pg_control', 0, 8)")
                connection.execute("select pg_catalog.pg_ls_dir('global')")
        except PostgresError as error:
            raise MissingPrivilegeError(
                "the server's files cannot be read: there is no local reach, and the role may not use"
                " pg_read_binary_file",
                hint="name data_directory in the settings, or GRANT pg_read_server_files TO knockwood with"
                " EXECUTE on pg_ls_dir, pg_stat_file and pg_read_binary_file",
            ) from error
        yield ServerFiles(connection)


def _require_usual_layout(subject: Subject) -> None:
    # Checksums cover block numbers, which follow from both sizes: another layout would look all damaged.
    with subject.connect() as connection, translated():
        row = connection.execute(
            "select setting::int8, pg_catalog.current_setting('block_size')::int8"
            " from pg_catalog.pg_settings where name = 'segment_size'"
        ).fetchone()
    if row is None or row != (SEGMENT_PAGES, PAGE_BYTES):
        raise UnsupportedVersionError(
            f"this server was built for pages and segments of another size: {row}",
            hint="pages of 8 kB and segments of 1 GB are supported",
        )


def require_own_folder(subject: Subject, folder: Path) -> None:
    """Raise HostError unless `folder` is the data directory of the very server that `subject` connects to.

    The system identifier alone would not do: a clone has its primary's. So the start time and the folder
    (as the server itself sees it) that the postmaster wrote down must also be those that the server tells,
    now, and the last checkpoint the same: another server may have taken this one's place.
    """
    with subject.connect() as connection:
        facts = server_facts(connection)
        with translated():
            row = connection.execute(
                "select extract(epoch from pg_catalog.pg_postmaster_start_time())::float8"
            ).fetchone()
        told = float(row[0]) if row else 0.0
        written, started = _of_the_postmaster(folder)
        elsewhere = facts.data_directory is not None and str(facts.data_directory) != written
        if elsewhere or abs(told - started) > 5 or not is_control_file_of(connection, facts, folder):
            raise HostError(
                "the data directory belongs to another server than the one connected to",
                where=str(folder),
                hint="do dsn and data_directory in the settings name the same server? One that was promoted"
                " just now tells after its next checkpoint",
            )


def _of_the_postmaster(folder: Path) -> tuple[str, int]:
    """The data directory and the time of the start that the postmaster wrote down."""
    try:
        lines = (folder / "postmaster.pid").read_text().splitlines()
        return lines[1], int(lines[2])
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO).lower()
        raise HostError(
            f"the data directory cannot be read: {reason}",
            where=str(error.filename or folder),
            hint="run knockwood as the server's account or as root, and is data_directory right?",
        ) from error
    except (IndexError, ValueError) as error:
        raise HostError("postmaster.pid cannot be understood", where=str(folder)) from error
