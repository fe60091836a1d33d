"""Taking a base backup: streamed, checked, stored, and listed only with the WAL that makes it consistent."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Literal

from knockwood.errors import (
    BackupIncompleteError,
    KnockwoodError,
    PostgresError,
    RefusedError,
    UnsupportedVersionError,
)
from knockwood.host import clock
from knockwood.model import Verdict, WalRange
from knockwood.postgres import catalog
from knockwood.postgres.connection import (
    Connection,
    ServerFacts,
    connect,
    server_facts,
    translated,
)
from knockwood.postgres.replication import BackupEnded, BackupStarted, ReplicationConnection
from knockwood.repository import codec
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.collect import RelationCollector, chunks_of
from knockwood.repository.backups.listing import COMMIT_MARK, list_backups, read_object
from knockwood.repository.backups.model import (
    FOLDER,
    Backup,
    Kind,
    Pack,
    Tablespace,
    chain,
    new_id,
)
from knockwood.repository.backups.packs import PackWriter
from knockwood.repository.backups.pagecheck import PageCheck
from knockwood.repository.backups.stream import OnProgress, ServerStream
from knockwood.repository.backups.take_files import Order, copy_files, read_again, why_not
from knockwood.repository.leases import Lease, lease
from knockwood.repository.repository import Repository

__all__ = [
    "LEASE",
    "Effort",
    "OnProgress",
    "remove_leftovers",
    "remove_objects",
    "take_backup",
    "wait_for_wal",
    "why_not",
]

LEASE = "backup"


@dataclass(frozen=True, slots=True)
class Effort:
    """How a backup is made. `wal_timeout` in seconds: how long to wait until the archive has its WAL.

    `checkpoint` fast begins at once, spread is gentler on a busy server. `manifest_checksums` are the
    server's own, for pg_verifybackup after a restore; every stored object has a sha256 in any case.

    With `processes` above 0 a full backup copies the files below `data_directory` (where None: where the
    server says they are) with so many processes, instead of the server's stream; see `why_not`. Its
    manifest then has SHA256 in place of CRC32C, and `workers` does not count.
    """

    level: int = 1
    workers: int = 2
    checkpoint: Literal["fast", "spread"] = "fast"
    manifest_checksums: Literal["NONE", "CRC32C", "SHA256"] = "CRC32C"
    wal_timeout: float = 300.0
    processes: int = 0
    data_directory: Path | None = None


def take_backup(
    repository: Repository,
    dsn: str,
    *,
    incremental: bool = False,
    progress: OnProgress | None = None,
    effort: Effort | None = None,
) -> Backup:
    """Take a base backup and return it, complete with the WAL from its start to its stop.

    Raises LockHeldError while another runs, WrongSystemError for another cluster's server,
    UnsupportedVersionError for an incremental one before PostgreSQL 17, RefusedError where there is
    none to build on, BackupIncompleteError if the WAL does not come in time; nothing is listed then.
    Damaged pages do not stop a backup: its health lists them.
    """
    effort = effort or Effort()
    with lease(repository, LEASE, "taking a base backup") as held:
        remove_leftovers(repository)
        with connect(dsn) as connection:
            facts = server_facts(connection, repository.header.system_identifier)
            parent = _parent(repository, facts) if incremental else None
            run = _Run(repository, dsn, facts, connection, effort, progress, parent)
            try:
                return run.take(held)
            except BaseException:
                with suppress(KnockwoodError):
                    remove_objects(repository, run.id)
                raise


def remove_leftovers(repository: Repository) -> list[str]:
    """Remove what killed backups and expiries left behind; their ids. Only while holding the lease."""
    seen: dict[str, bool] = {}
    for info in repository.storage.list(FOLDER):
        id, _, name = info.name.removeprefix(FOLDER).partition("/")
        seen[id] = seen.get(id, False) or name == COMMIT_MARK
    gone = [id for id, complete in seen.items() if not complete]
    for id in gone:
        remove_objects(repository, id)
    return gone


def remove_objects(repository: Repository, id: str) -> None:
    """Remove all objects of a backup that is not listed; raises RefusedError for one that is."""
    if repository.storage.info(f"{FOLDER}{id}/{COMMIT_MARK}") is not None:
        raise RefusedError("the backup is complete: expire it first", where=id)
    for info in list(repository.storage.list(f"{FOLDER}{id}/")):
        repository.storage.delete(info.name)


def _parent(repository: Repository, facts: ServerFacts) -> Backup:
    if facts.major < 17:
        raise UnsupportedVersionError(
            f"PostgreSQL {facts.major} cannot take incremental backups",
            hint="they exist from 17 on; take a full backup",
        )
    backups = list_backups(repository)
    for backup in reversed(backups):
        try:
            links = chain(backups, backup.id)
        except KnockwoodError:
            continue
        same = backup.timeline == facts.timeline and backup.major == facts.major
        if same and all(link.health.verdict != Verdict.BROKEN for link in links):
            return backup
    raise RefusedError(
        f"there is no healthy backup of timeline {facts.timeline} to build on",
        where=repository.storage.url,
        hint="take a full backup",
    )


@dataclass
class _Run:
    """One backup in the making."""

    repository: Repository
    dsn: str
    facts: ServerFacts
    connection: Connection
    effort: Effort
    progress: OnProgress | None
    parent: Backup | None
    id: str = field(init=False)
    started_at: datetime = field(init=False)

    def __post_init__(self) -> None:
        self.started_at = clock.now()
        moment = self.started_at
        while True:
            self.id = new_id(self.kind, moment)
            if self.repository.storage.info(f"{FOLDER}{self.id}/{COMMIT_MARK}") is None:
                return
            moment += timedelta(seconds=1)

    @property
    def kind(self) -> Kind:
        return "incremental" if self.parent is not None else "full"

    @property
    def folder(self) -> str:
        return f"{FOLDER}{self.id}/"

    def take(self, held: Lease) -> Backup:
        settings = catalog.settings(self.connection)
        check = PageCheck(self.facts.checksums, block_bytes=int(settings.get("block_size", "8192")))
        known = catalog.databases(self.connection)
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as index,
            tempfile.TemporaryFile("w+b") as manifest,
            RelationCollector(self.dsn, known) as relations,
        ):
            root = self._copied_from()
            if root is not None:
                order = self._order(root, int(settings.get("block_size", "8192")))
                packs, started, ended = copy_files(
                    order, index, manifest, check, relations.start, self.progress
                )
            else:
                packs, started, ended = self._store_stream(index, manifest, check, relations)
            if started.timeline != ended.timeline:
                raise BackupIncompleteError(
                    "the server changed its timeline while the backup ran",
                    hint="was it promoted? take the backup again",
                )
            again = self._read_again if root is None else partial(read_again, root)
            health = check.health(started.lsn, ended.lsn, again)
            members = _put_plain(self.repository, self.folder + "members.jsonl", chunks_of(index))
            kept = _put_plain(self.repository, self.folder + "backup_manifest", chunks_of(manifest))
            stored = self.repository.put(self.folder + "relations.jsonl", relations.chunks())
        objects = (*packs, members, kept)
        backup = Backup(
            id=self.id,
            kind=self.kind,
            parent=self.parent.id if self.parent else None,
            system_identifier=self.facts.system_identifier,
            timeline=started.timeline,
            start_lsn=started.lsn,
            stop_lsn=ended.lsn,
            started_at=self.started_at,
            finished_at=clock.now(),
            server_version=self.facts.version,
            checksums=self.facts.checksums,
            segment_bytes=self.facts.segment_bytes,
            raw_bytes=sum(pack.raw_bytes for pack in packs),
            stored_bytes=sum(pack.bytes for pack in objects) + stored.bytes,
            packs=packs,
            members=members,
            relations=Pack(stored.name, stored.bytes, stored.raw_bytes, stored.sha256),
            manifest=kept,
            tablespaces=tuple(
                Tablespace(space.oid, space.location or "")
                for space in started.tablespaces
                if space.oid is not None
            ),
            settings=settings,
            health=health,
            encrypted=bool(self.repository.recipients),
        )
        return self._commit(backup, held)

    def _copied_from(self) -> Path | None:
        """The data directory whose files are copied, or None for the server's stream."""
        if self.parent is not None or self.effort.processes < 1:
            return None
        found = self.effort.data_directory or self.facts.data_directory
        if found is None:
            raise RefusedError(
                "the role may not see where the data directory lies",
                hint="name data_directory, or GRANT pg_read_all_settings TO knockwood;",
            )
        return found

    def _order(self, root: Path, block_bytes: int) -> Order:
        return Order(
            repository=self.repository,
            dsn=self.dsn,
            facts=self.facts,
            data_directory=root,
            folder=self.folder,
            label=f"knockwood {self.id}",
            processes=self.effort.processes,
            level=self.effort.level,
            fast=self.effort.checkpoint == "fast",
            digests=self.effort.manifest_checksums != "NONE",
            block_bytes=block_bytes,
        )

    def _store_stream(
        self, index: TextIOWrapper, manifest: IO[bytes], check: PageCheck, relations: RelationCollector
    ) -> tuple[tuple[Pack, ...], BackupStarted, BackupEnded]:
        stream = ServerStream(manifest, self.progress)
        with ReplicationConnection(self.dsn, application_name="knockwood backup") as replication:
            identity = replication.identify_system()
            if identity.system_identifier != self.facts.system_identifier:
                raise PostgresError("the replication connection reaches another server than the SQL one")
            if self.parent is not None:
                replication.upload_manifest(read_object(self.repository, self.parent.manifest))
            events = replication.base_backup(
                f"knockwood {self.id}",
                incremental=self.parent is not None,
                checkpoint=self.effort.checkpoint,
                manifest_checksums=self.effort.manifest_checksums,
            )
            with PackWriter(
                self.repository,
                lambda number: f"{self.folder}pack-{number:05d}.tar",
                index=index,
                check=check,
                level=self.effort.level,
                workers=self.effort.workers,
            ) as writer:
                writer.write(stream.entries(events, relations.start))
                packs = writer.finish()
        index.flush()
        if stream.started is None or stream.ended is None:
            raise BackupIncompleteError("the server's stream ended without the end of the backup")
        return packs, stream.started, stream.ended

    def _read_again(self, path: str, offset: int, length: int) -> bytes | None:
        # A connection of its own: ours may have been idle for hours.
        with connect(self.dsn) as connection, translated(self.dsn):
            row = connection.execute(
                "select pg_catalog.pg_read_binary_file(%s, %s, %s, true)", [path, offset, length], binary=True
            ).fetchone()
        data: bytes | None = row[0] if row else None
        return data

    def _commit(self, backup: Backup, held: Lease) -> Backup:
        wait_for_wal(self.repository, backup.wal, self.effort.wal_timeout)
        held.assert_held()
        backup = replace(backup, finished_at=clock.now())
        self.repository.put_json(backup.folder + COMMIT_MARK, backup.as_json())
        return backup


def wait_for_wal(repository: Repository, needed: WalRange, timeout: float) -> None:
    """Wait until the archive covers `needed`; raises BackupIncompleteError after `timeout` seconds."""
    archive = WalArchive(repository)
    deadline = clock.monotonic() + timeout
    pause = 0.02
    while True:
        inventory = archive.inventory()
        if inventory.covers(needed):
            return
        if clock.monotonic() >= deadline:
            reached = inventory.end_from(needed.timeline, needed.start)
            raise BackupIncompleteError(
                f"the archive lacks the WAL {needed} after {timeout:.0f} s; it reaches {reached}",
                where=repository.storage.url,
                hint="does `knockwood wal receive` run, or archive_command work? Then take the backup again",
            )
        clock.sleep(min(pause, max(0.0, deadline - clock.monotonic())))
        pause = min(pause * 1.5, 2.0)


def _put_plain(repository: Repository, name: str, chunks: Iterable[bytes]) -> Pack:
    # Never encrypted: it holds file names and sizes only, and a host without an identity must still be
    # able to take an incremental backup and to tell what a backup holds.
    raw = codec.Counted(chunks)
    stored = codec.Counted(codec.encode(raw))
    full = name + codec.suffix(())
    repository.storage.put_new(full, stored)
    return Pack(full, stored.bytes, raw.bytes, stored.sha256)
