"""Base backups of real servers: WAL archived while they run, restores started again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fix_archive import Archived, new_archive
from knockwood.host import privileges
from knockwood.model import Lsn, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import connect
from knockwood.postgres.server import LocalServer
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.fetch import fetch_chain
from knockwood.repository.backups.model import Backup
from knockwood.repository.backups.take import Effort, take_backup
from knockwood.repository.repository import Repository

KEEP_WAL = {"wal_keep_size": "2GB"}
"""Settings of a server whose WAL the tests copy themselves."""


@contextmanager
def archiving(made: Archived) -> Iterator[None]:
    """Store finished segments while the block runs, as a receiver would."""
    ended = threading.Event()
    thread = threading.Thread(target=_archive, args=(made, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _archive(made: Archived, ended: threading.Event) -> None:
    archive = WalArchive(made.repository)
    done: set[str] = set()
    with connect(made.server.dsn()) as connection:
        while not ended.wait(0.05):
            # Flushed, not inserted: a segment that is only in the server's buffers is not whole on disk.
            row = connection.execute("select pg_current_wal_flush_lsn()::text").fetchone()
            assert row is not None
            flushed = Lsn.parse(row[0])
            for path in sorted((made.server.data_directory / "pg_wal").iterdir()):
                if len(path.name) != 24 or path.name in done:
                    continue
                segment = WalSegment.parse(path.name, archive.segment_bytes)
                if segment.end <= flushed:
                    done.add(path.name)
                    archive.put_segment(segment, path)


def backed_up(made: Archived, *, incremental: bool = False, **effort: object) -> Backup:
    """A backup of the server, with its WAL archived meanwhile."""
    with archiving(made):
        wanted = Effort(**{"wal_timeout": 30.0, **effort})  # type: ignore[arg-type]
        return take_backup(made.repository, made.server.dsn(), incremental=incremental, effort=wanted)


def repository_of(server: LocalServer, root: Path, **keys: tuple[str, ...]) -> Archived:
    return new_archive(server, root, **keys)


@contextmanager
def restored(
    repository: Repository,
    links: Sequence[Backup],
    into: Path,
    programs: Programs,
    *,
    tablespace_root: Path | None = None,
    before_start: Callable[[Path], None] = lambda into: None,
) -> Iterator[LocalServer]:
    """Fetch a chain, add the WAL it needs, and start a server on it."""
    account = privileges.server_account()
    fetch_chain(
        repository,
        links,
        into,
        account=account,
        programs=programs,
        tablespace_root=tablespace_root,
        sync=False,
    )
    before_start(into)
    add_wal(repository, links[-1], into)
    server = LocalServer(programs, into, account=account, settings={"fsync": "off"})
    try:
        server.start()
        yield server
    finally:
        server.stop("immediate")


def add_wal(repository: Repository, backup: Backup, into: Path) -> None:
    """Put the WAL that makes the backup consistent where crash recovery looks for it."""
    account = privileges.server_account()
    for segment in backup.wal.segments(backup.segment_bytes):
        path = into / "pg_wal" / segment.name
        WalArchive(repository).fetch(segment, path)
        privileges.give(path, account)
