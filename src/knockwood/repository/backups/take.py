"""Taking a base backup: streamed, checked, stored, and listed only with the WAL that makes it consistent."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from io import TextIOWrapper
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
from knockwood.postgres.replication import (
    ArchiveStarted,
    BackupEnded,
    BackupStarted,
    Event,
    ManifestStarted,
    ReplicationConnection,
)
from knockwood.repository import codec
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.listing import COMMIT_MARK, list_backups, read_object
from knockwood.repository.backups.model import (
    FOLDER,
    Backup,
    Kind,
    Pack,
    Progress,
    Tablespace,
    chain,
    new_id,
)
from knockwood.repository.backups.packs import PackWriter
from knockwood.repository.backups.pagecheck import PageCheck
from knockwood.repository.backups.tar import Member, read_tar
from knockwood.repository.leases import Lease, lease
from knockwood.repository.repository import Repository

LEASE = "backup"

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How a backup is made. `wal_timeout` in seconds: how long to wait until the archive has its WAL.

    `checkpoint` fast begins at once, spread is gentler on a busy server. `manifest_checksums` are the
    server's own, for pg_verifybackup after a restore; every stored object has a sha256 in any case.
    """

    level: int = 1
    workers: int = 2
    checkpoint: Literal["fast", "spread"] = "fast"
    manifest_checksums: Literal["NONE", "CRC32C", "SHA256"] = "CRC32C"
    wal_timeout: float = 300.0


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
            _RelationCollector(self.dsn, known) as relations,
        ):
            stream = _Stream(manifest, self.progress)
            packs = self._store_files(stream, index, check, relations)
            started, ended = stream.started, stream.ended
            if started is None or ended is None:
                raise BackupIncompleteError("the server's stream ended without the end of the backup")
            if started.timeline != ended.timeline:
                raise BackupIncompleteError(
                    "the server changed its timeline while the backup ran",
                    hint="was it promoted? take the backup again",
                )
            health = check.health(started.lsn, ended.lsn, self._read_again)
            members = _put_plain(self.repository, self.folder + "members.jsonl", _chunks(index))
            kept = _put_plain(self.repository, self.folder + "backup_manifest", _chunks(manifest))
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

    def _store_files(
        self, stream: _Stream, index: TextIOWrapper, check: PageCheck, relations: _RelationCollector
    ) -> tuple[Pack, ...]:
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
        return packs

    def _read_again(self, path: str, offset: int, length: int) -> bytes | None:
        with translated():
            row = self.connection.execute(
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
    pause = 0.1
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


class _Stream:
    """Turns the server's events into members under the data directory's own paths; keeps the manifest."""

    def __init__(self, manifest: IO[bytes], progress: OnProgress | None) -> None:
        self.started: BackupStarted | None = None
        self.ended: BackupEnded | None = None
        self._manifest = manifest
        self._progress = progress
        self._pending: Event | None = None
        self._done = 0
        self._told = 0.0

    def entries(self, events: Iterator[Event], on_start: Callable[[], None]) -> Iterator[Member | memoryview]:
        for event in self._events(events):
            if isinstance(event, BackupStarted):
                self.started = event
                on_start()
            elif isinstance(event, ArchiveStarted):
                prefix = f"pg_tblspc/{event.oid}" if event.oid is not None else ""
                if prefix:
                    yield Member(prefix, mode=0o700, kind="folder")
                for entry in read_tar(self._data(events)):
                    yield self._placed(entry, prefix)
            elif isinstance(event, ManifestStarted):
                for view in self._data(events):
                    self._manifest.write(view)
            elif isinstance(event, BackupEnded):
                self.ended = event
        self._tell("", 0.0)

    def _events(self, events: Iterator[Event]) -> Iterator[Event]:
        while True:
            event, self._pending = self._pending, None
            if event is None:
                event = next(events, None)
            if event is None:
                return
            yield event

    def _data(self, events: Iterator[Event]) -> Iterator[memoryview]:
        for event in events:
            if not isinstance(event, memoryview):
                self._pending = event
                return
            self._done += len(event)
            yield event

    def _placed(self, entry: Member | memoryview, prefix: str) -> Member | memoryview:
        if not isinstance(entry, Member):
            return entry
        self._tell(entry.path, 0.1)
        return replace(entry, path=f"{prefix}/{entry.path}") if prefix else entry

    def _tell(self, path: str, every: float) -> None:
        now = clock.monotonic()
        if self._progress is not None and now - self._told >= every:
            self._told = now
            total = self.started.bytes if self.started is not None else 0
            self._progress(Progress(self._done, max(total, self._done), path))


class _RelationCollector:
    """Reads the map of names to files, in a thread, while the files stream."""

    def __init__(self, dsn: str, known: Sequence[catalog.Database]) -> None:
        self._dsn = dsn
        self._known = known
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 -- closed by __exit__
        self._thread = threading.Thread(target=self._collect, name="relations", daemon=True)
        self._stop = False

    def __enter__(self) -> _RelationCollector:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        if self._thread.ident is not None:
            self._thread.join()
        self._file.close()

    def start(self) -> None:
        self._thread.start()

    def chunks(self) -> Iterator[bytes]:
        """What was found, one JSON line each; waits for the end."""
        if self._thread.ident is not None:
            self._thread.join()
        self._file.flush()
        yield from _chunks(self._file)

    def _collect(self) -> None:
        known = {database.name: database for database in self._known}
        done: set[str] = set()
        try:
            for database, row in catalog.relations_everywhere(self._dsn, self._known):
                if self._stop:
                    return
                self._file.write(json.dumps(_relation_line(database, row)) + "\n")
                done.add(database.name)
        except Exception as error:  # the map is a convenience: a backup without it is still a backup
            for name in known.keys() - done:
                self._file.write(json.dumps({"database": name, "not_recorded": str(error)}) + "\n")


def _relation_line(
    database: catalog.Database, row: catalog.RelationRow | catalog.NotRecorded
) -> dict[str, object]:
    if isinstance(row, catalog.NotRecorded):
        return {"database": row.database, "not_recorded": row.reason}
    return {"database": database.name, "database_oid": database.oid} | asdict(row)


def _put_plain(repository: Repository, name: str, chunks: Iterable[bytes]) -> Pack:
    # Never encrypted: it holds file names and sizes only, and a host without an identity must still be
    # able to take an incremental backup and to tell what a backup holds.
    raw = codec.Counted(chunks)
    stored = codec.Counted(codec.encode(raw))
    full = name + codec.suffix(())
    repository.storage.put_new(full, stored)
    return Pack(full, stored.bytes, raw.bytes, stored.sha256)


def _chunks(file: IO[bytes] | TextIOWrapper) -> Iterator[bytes]:
    file.seek(0)
    while data := file.read(1 << 20):
        yield data.encode() if isinstance(data, str) else data
