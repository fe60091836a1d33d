"""Archives made from a real server's WAL, and backups described without their files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from knockwood.model import Commit, Lsn, Timeline, Verdict, WalSegment
from knockwood.postgres.connection import Connection, connect, server_facts
from knockwood.postgres.server import LocalServer
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.model import Backup, BackupHealth, Pack
from knockwood.repository.backups.take import Effort, take_backup
from knockwood.repository.repository import Repository
from knockwood.repository.storage.local import LocalStorage


@dataclass
class Archived:
    """A repository with the WAL of a server, one commit in each segment."""

    repository: Repository
    root: Path
    server: LocalServer
    backups: list[Backup] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    segments: list[WalSegment] = field(default_factory=list)
    lost: set[WalSegment] = field(default_factory=set)

    def object(self, segment: WalSegment) -> Path:
        (found,) = self.root.glob(f"wal/*/*/{segment.name}.zst*")
        return found


def a_backup(
    id: str,
    timeline: int,
    start: Lsn,
    stop: Lsn,
    finished: datetime,
    *,
    major: int = 18,
    segment_bytes: int = 1 << 20,
    system: int = 1,
    health: Verdict = Verdict.HELD,
    parent: str | None = None,
) -> Backup:
    """A backup as a value; its objects do not exist."""
    nothing = Pack(f"backups/{id}/x.zst", 0, 0, "")
    return Backup(
        id=id, kind="incremental" if parent else "full", parent=parent, system_identifier=system,
        timeline=Timeline(timeline), start_lsn=start, stop_lsn=stop, started_at=finished,
        finished_at=finished, server_version=major * 10000, checksums=True, segment_bytes=segment_bytes,
        raw_bytes=0, stored_bytes=0, packs=(), members=nothing, relations=nothing, manifest=nothing,
        tablespaces=(), settings={}, health=BackupHealth(health),
    )  # fmt: skip


def new_archive(
    server: LocalServer, root: Path, recipients: tuple[str, ...] = (), identities: tuple[str, ...] = ()
) -> Archived:
    with connect(server.dsn()) as connection:
        facts = server_facts(connection)
    repository = Repository.create(
        LocalStorage(root), cluster="shop", system_identifier=facts.system_identifier,
        segment_bytes=facts.segment_bytes, recipients=recipients, identities=identities,
    )  # fmt: skip
    return Archived(repository, root, server)


def describe_backup(made: Archived, connection: Connection, id: str) -> Backup:
    """Begin and end a backup on the server and list it in the repository, with no files in it."""
    (start,) = connection.execute("select pg_backup_start('test', true)::text").fetchone() or ("",)
    row = connection.execute("select lsn::text, labelfile from pg_backup_stop(false)").fetchone()
    assert row is not None
    facts = server_facts(connection)
    backup = a_backup(
        id, facts.timeline, Lsn.parse(start), Lsn.parse(row[0]), datetime.now(UTC),
        major=facts.major, segment_bytes=facts.segment_bytes, system=facts.system_identifier,
    )  # fmt: skip
    made.repository.put_json(f"backups/{id}/backup.json", backup.as_json())
    made.backups.append(backup)
    return backup


def commit_in_own_segment(made: Archived, connection: Connection) -> Commit:
    """One transaction, then a switch: its commit is the only one of its segment."""
    before = _insert_lsn(connection)
    with connection.transaction():
        row = connection.execute(
            "insert into witness values (1) returning pg_current_xact_id()::text::bigint"
        ).fetchone()
    assert row is not None
    timeline = server_facts(connection).timeline
    segment = WalSegment.containing(timeline, before, made.repository.header.segment_bytes)
    commit = Commit(row[0], before, datetime.now(UTC))
    connection.execute("select pg_switch_wal()")
    made.commits.append(commit)
    made.segments.append(segment)
    return commit


def archive_wal(made: Archived) -> None:
    """Store every finished segment and every history of the server."""
    archive = WalArchive(made.repository)
    folder = made.server.data_directory / "pg_wal"
    size = made.repository.header.segment_bytes
    with connect(made.server.dsn()) as connection:
        row = connection.execute("select pg_walfile_name(pg_current_wal_insert_lsn())").fetchone()
        assert row is not None
        current = row[0]
    paths = sorted(folder.iterdir())
    # A promoted server's last segment of the old timeline is not whole: its successor begins with it.
    newest = {path.name[8:]: path.name for path in paths if len(path.name) == 24}
    for path in paths:
        if path.suffix == ".history":
            archive.put_history(Timeline(int(path.stem, 16)), path.read_text())
        elif len(path.name) == 24 and path.name[8:] < current[8:] and newest[path.name[8:]] == path.name:
            segment = WalSegment.parse(path.name, size)
            if segment not in made.lost:
                archive.put_segment(segment, path)


def _insert_lsn(connection: Connection) -> Lsn:
    row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    return Lsn.parse(row[0])


def six_commits(server: LocalServer, root: Path, **keys: tuple[str, ...]) -> Archived:
    """The archive of the gap test: a backup, then six commits, each in its own segment."""
    made = new_archive(server, root, **keys)
    with connect(server.dsn()) as connection:
        connection.execute("create table witness (a int)")
        connection.execute("select pg_switch_wal()")
        describe_backup(made, connection, "20260101T000000Z-full")
        connection.execute("select pg_switch_wal()")
        for _ in range(6):
            commit_in_own_segment(made, connection)
    archive_wal(made)
    return made


def real_backup(made: Archived) -> Backup:
    """Take a base backup of the server while its WAL is archived beside it."""
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(take_backup, made.repository, made.server.dsn(), effort=Effort(wal_timeout=60))
        while not taking.done():
            archive_wal(made)
            wait([taking], timeout=0.05)
        made.backups.append(taking.result())
    return made.backups[-1]


def six_commits_on_a_backup(server: LocalServer, root: Path, **keys: tuple[str, ...]) -> Archived:
    """The gap test with a base backup that has its files."""
    made = new_archive(server, root, **keys)
    with connect(server.dsn()) as connection:
        connection.execute("create table witness (a int)")
        real_backup(made)
        connection.execute("select pg_switch_wal()")
        for _ in range(6):
            commit_in_own_segment(made, connection)
    archive_wal(made)
    return made


def flip(path: Path, offset: int, count: int = 1) -> None:
    """Invert bytes of a stored object, leaving its size and time of writing as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(count)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in data))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
