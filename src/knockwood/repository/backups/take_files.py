"""A full backup from the data directory's own files, copied by several processes at once.

Between pg_backup_start and pg_backup_stop the files may be read in any order and while they change: the
WAL of that time makes them right. The control file is read when all others are, as the server does.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Final

from knockwood.errors import BackupIncompleteError, KnockwoodError, RefusedError, WrongSystemError
from knockwood.host import clock, files
from knockwood.model import Lsn, WalRange
from knockwood.postgres.connection import ServerFacts, connect, server_facts
from knockwood.postgres.control_file import (
    CONTROL_FILE,
    IN_PRODUCTION,
    ControlFile,
    is_control_file_of,
    read_control_file,
)
from knockwood.postgres.online_backup import OnlineBackup, Stopped, may_start
from knockwood.postgres.replication import BackupEnded, BackupStarted, TablespaceInfo
from knockwood.repository.backups import take_scan
from knockwood.repository.backups.model import Pack, Progress
from knockwood.repository.backups.packs import PackWriter
from knockwood.repository.backups.pagecheck import PageCheck
from knockwood.repository.backups.stream import OnProgress
from knockwood.repository.backups.take_manifest import manifest, manifest_entry
from knockwood.repository.backups.take_pool import WorkerPool
from knockwood.repository.backups.take_worker import Job
from knockwood.repository.backups.tar import Member
from knockwood.repository.repository import Repository

_BIG: Final = 8 << 20
_BATCH_FILES: Final = 256
_WORTH: Final = 16 << 20
"""Bytes for which a further process is worth its start."""

_TRIES: Final = 5


def why_not(dsn: str, data_directory: Path) -> str | None:
    """Why a server's files cannot be copied from here, or None if they can: then `copy_files` may be used."""
    for path in (data_directory, data_directory / "global"):
        if not os.access(path, os.R_OK | os.X_OK):
            return f"{path} cannot be read"
    if not os.access(data_directory / CONTROL_FILE, os.R_OK):
        return f"{data_directory / CONTROL_FILE} cannot be read"
    with connect(dsn) as connection:
        facts = server_facts(connection)
        if facts.in_recovery:
            return "the server is a standby"
        if not may_start(connection):
            return "the role may not call pg_backup_start"
        try:
            _must_be(read_control_file(data_directory), facts, data_directory)
            # A former primary that was killed still calls itself in production.
            if not is_control_file_of(connection, facts, data_directory):
                raise _other_server(data_directory)
        except KnockwoodError as error:
            return error.what
    return None


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be copied, and how. `folder` is the backup's prefix in the repository."""

    repository: Repository
    dsn: str
    facts: ServerFacts
    data_directory: Path
    folder: str
    label: str
    processes: int
    level: int
    fast: bool
    digests: bool
    block_bytes: int


@dataclass
class _Plan:
    """Folders, and files: the big ones, and the many small ones in a file so that they take no memory."""

    small: IO[str]
    folders: list[Member] = field(default_factory=list)
    big: list[tuple[int, str]] = field(default_factory=list)
    bytes: int = 0

    def add(self, member: Member) -> None:
        self.bytes += member.size
        if member.kind == "folder":
            self.folders.append(member)
        elif member.size >= _BIG:
            self.big.append((member.size, member.path))
        else:
            self.small.write(json.dumps([member.size, member.path]) + "\n")

    def batches(self) -> Iterator[list[str]]:
        """The largest file first, so that none is left for one process at the end; small ones together."""
        for _, path in sorted(self.big, reverse=True):
            yield [path]
        self.small.seek(0)
        batch: list[str] = []
        held = 0
        for line in self.small:
            size, path = json.loads(line)
            batch.append(path)
            held += size
            if held >= _BIG or len(batch) >= _BATCH_FILES:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch


def copy_files(
    order: Order,
    index: TextIOWrapper,
    manifest_file: IO[bytes],
    check: PageCheck,
    on_start: Callable[[], None],
    progress: OnProgress | None,
) -> tuple[tuple[Pack, ...], BackupStarted, BackupEnded]:
    """Copy the files into packs and write index and manifest; the packs, the backup's start and its end.

    Raises WrongSystemError unless the files are those of the server, RefusedError for a standby's,
    HostError for what cannot be read, what storing raises, and BackupIncompleteError.
    """
    if order.facts.in_recovery:
        raise RefusedError(
            "a standby's files cannot be copied directly",
            where=str(order.data_directory),
            hint="take the backup through the server, or from the primary",
        )
    root = order.data_directory
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as small,
        OnlineBackup(order.dsn) as online,
        # Interpreters start while the server makes its checkpoint.
        WorkerPool(_job(order), _worth(order), check) as pool,
    ):
        start, spaces, version = _start(online, order)
        on_start()
        plan = _Plan(small)
        for member in take_scan.scan(
            root, major=order.facts.major, version_folder=version, tablespaces=spaces.keys()
        ):
            plan.add(member)
        tell = _teller(progress, plan.bytes)
        packs = pool.run(plan.batches(), online.check, tell)
        control = read_control_file(root)
        stopped = online.stop()
        _must_fit(stopped, start, control, spaces)
        index.writelines(pool.index())
        ends = _last_files(stopped, control)
        last = _store_last(order, index, check, plan.folders, ends)
        wal = WalRange(stopped.timeline, start, stopped.lsn)
        manifest_file.writelines(
            manifest(
                _entries(pool.entries(), ends, order),
                wal,
                major=order.facts.major,
                system_identifier=order.facts.system_identifier,
            )
        )
        index.flush()
    infos = tuple(TablespaceInfo(oid, place, 0) for oid, place in sorted(stopped.tablespaces.items()))
    started = BackupStarted(start, stopped.timeline, infos)
    every = tuple(sorted((*packs, *last), key=lambda pack: pack.name))
    return every, started, BackupEnded(stopped.lsn, stopped.timeline)


def _worth(order: Order) -> int:
    """How many processes to start: a small cluster is copied before many interpreters have started."""
    root = order.data_directory
    control = read_control_file(root)
    _must_be(control, order.facts, root)
    found, enough = 0, order.processes * _WORTH
    for member in take_scan.scan(
        root,
        major=order.facts.major,
        version_folder=f"PG_{order.facts.major}_{control.catalog_version}",
        tablespaces=take_scan.links(root).keys(),
    ):
        found += member.size
        if found >= enough:
            break
    return max(1, min(order.processes, -(-found // _WORTH)))


def read_again(root: Path, path: str, offset: int, length: int) -> bytes | None:
    """What lies there now; None if the file is gone."""
    with files.translated(root / path):
        try:
            with (root / path).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), length, offset)
        except FileNotFoundError:
            return None


def _start(online: OnlineBackup, order: Order) -> tuple[Lsn, dict[int, str], str]:
    """Begin the backup: where replay starts, the tablespaces outside, and the name of their inner folder."""
    root = order.data_directory
    same_spaces = False
    for _ in range(_TRIES):
        before = take_scan.links(root)
        start = online.start(order.label, fast=order.fast)
        same_spaces = take_scan.links(root) == before
        control = read_control_file(root)
        _must_be(control, order.facts, root)
        # The start is the checkpoint that the server has just made, and its control file knows it
        # first; that of a copy which runs beside it, with the same identifier, does not.
        if control.redo == start and same_spaces:
            return start, before, f"PG_{order.facts.major}_{control.catalog_version}"
        # A tablespace that came or went just then may or may not belong to the backup, and a further
        # checkpoint may have hidden ours: begin anew.
        online.stop()
    if not same_spaces:
        raise BackupIncompleteError(
            "tablespaces were made or dropped each time the backup began",
            where=str(root / "pg_tblspc"),
            hint="take the backup again",
        )
    raise _other_server(root)


def _must_be(control: ControlFile, facts: ServerFacts, root: Path) -> None:
    if control.system_identifier != facts.system_identifier or control.state != IN_PRODUCTION:
        raise _other_server(root)


def _other_server(root: Path) -> WrongSystemError:
    return WrongSystemError(
        "the data directory is not that of the server the connection reaches",
        where=str(root),
        hint="data_directory in the settings must name the very files of the server in dsn",
    )


def _must_fit(stopped: Stopped, start: Lsn, control: ControlFile, spaces: dict[int, str]) -> None:
    if stopped.start != start or stopped.timeline != control.timeline:
        raise BackupIncompleteError("the server ended another backup than the one that was begun")
    if dict(stopped.tablespaces) != spaces:
        raise BackupIncompleteError(
            "the server's tablespaces are not those that were copied", hint="take the backup again"
        )


def _job(order: Order) -> Job:
    return Job(
        storage=order.repository.storage.url,
        recipients=order.repository.recipients,
        data_directory=str(order.data_directory),
        folder=order.folder,
        first=1,
        step=order.processes + 1,
        level=order.level,
        checksums=order.facts.checksums,
        block_bytes=order.block_bytes,
        digests=order.digests,
    )


def _teller(progress: OnProgress | None, total: int) -> Callable[[int, str], None]:
    def tell(done: int, path: str) -> None:
        if progress is not None:
            progress(Progress(done, max(total, done), path))

    return tell


def _last_files(stopped: Stopped, control: ControlFile) -> dict[str, bytes]:
    """What is known only at the end, by path."""
    found = {"backup_label": stopped.label.encode()}
    if stopped.tablespace_map:
        found["tablespace_map"] = os.fsencode(stopped.tablespace_map)
    return found | {CONTROL_FILE: control.data}


def _store_last(
    order: Order,
    index: TextIOWrapper,
    check: PageCheck,
    folders: Iterable[Member],
    ends: Mapping[str, bytes],
) -> tuple[Pack, ...]:
    """The pack with every folder and the last files."""
    with PackWriter(
        order.repository,
        lambda number: f"{order.folder}pack-{number:05d}.tar",
        index=index,
        check=check,
        level=order.level,
        workers=1,
    ) as writer:
        writer.write(folders)
        for path, content in ends.items():
            writer.write([Member(path, len(content), mtime=_seconds()), memoryview(content)])
        return writer.finish()


def _entries(copied: Iterable[str], ends: Mapping[str, bytes], order: Order) -> Iterator[str]:
    """The lines of the manifest. Raises BackupIncompleteError if the cluster's own mark was not copied."""
    version = '{ "Path": "PG_VERSION", '
    seen = False
    for line in copied:
        seen = seen or line.startswith(version)
        yield line
    if not seen:
        raise BackupIncompleteError("PG_VERSION vanished while the files were copied", where=order.folder)
    for path, content in ends.items():
        checksum = ("SHA256", hashlib.sha256(content).hexdigest()) if order.digests else None
        yield manifest_entry(path, len(content), _seconds(), checksum)


def _seconds() -> int:
    return int(clock.now().timestamp())
