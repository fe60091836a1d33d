"""Targets in an archive that is being written to: never short of what it held when it was asked."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from knockwood.model import Lsn
from knockwood.postgres.connection import connect, server_facts
from knockwood.repository.backups.take import take_backup
from knockwood.repository.receive import Receiver, receiving
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage
from knockwood.repository.targets import Latest, resolve
from knockwood.repository.verify import verify

if TYPE_CHECKING:
    from fix_server import ServerFactory


class Writer:
    """Commits one row after the other and notes the insert position after each answer."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.positions: list[Lsn] = []

    def _write(self) -> None:
        with connect(self._dsn) as connection:
            connection.execute("create table t (a text)")
            while not self._stop.is_set():
                connection.execute("insert into t select repeat('x', 3000) from generate_series(1, 20)")
                row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
                assert row is not None
                self.positions.append(Lsn.parse(row[0]))

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_latest_in_a_moving_archive_is_never_short(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    with connect(server.dsn()) as connection:
        facts = server_facts(connection)
    repository = Repository.create(
        open_storage(str(tmp_path / "r")),
        cluster="moving",
        system_identifier=facts.system_identifier,
        segment_bytes=facts.segment_bytes,
    )
    receiver = Receiver(repository, server.dsn(), tmp_path / "spool", partial_every=0.05)
    with receiving(receiver):
        take_backup(repository, server.dsn())
        with Writer(server.dsn()) as writer:
            while len(writer.positions) < 2:
                pass
            for _ in range(15):
                # The newest commit begins at or after the position noted before it.
                asked = writer.positions[-2]
                receiver.flush()
                plan = resolve(repository, Latest())
                assert plan.last_commit is not None
                assert plan.last_commit.lsn >= asked
                assert verify(repository).gaps == ()
