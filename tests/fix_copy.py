"""Copies of a test server at an exact position, made with PostgreSQL's own programs only."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from knockwood.host import privileges, processes
from knockwood.model import Lsn
from knockwood.postgres.connection import with_words
from knockwood.postgres.server import LocalServer


class Copies:
    """Archives a server's WAL into a folder beside it and restores from a base backup taken now."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server
        folder = server.data_directory.parent
        self.archive, self.base = folder / "archive", folder / "base"
        self.archive.mkdir()
        privileges.give(self.archive, server.account)
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"alter system set archive_command = 'cp %p {self.archive}/%f'")
            connection.execute("select pg_reload_conf()")
        program = server.programs.path("pg_basebackup")
        processes.run(
            [program, "-d", server.dsn(), "-D", self.base, "-X", "none", "-c", "fast", "--no-sync"],
            account=server.account,
            timeout=120,
        )
        self.made: list[LocalServer] = []

    def at(self, lsn: Lsn) -> LocalServer:
        """A copy paused before the record at `lsn` (which the server has written past)."""
        self._archive()
        folder = self.base.parent / f"copy-{len(self.made)}"
        shutil.copytree(self.base, folder, symlinks=True)
        privileges.give_tree(folder, self.server.account)
        folder.chmod(0o700)
        (folder / "recovery.signal").touch()
        settings = {
            "restore_command": f"cp {self.archive}/%f %p",
            "recovery_target_lsn": str(lsn),
            "recovery_target_inclusive": "off",
            "recovery_target_action": "pause",
            "archive_mode": "off",
            "autovacuum": "off",
            "fsync": "off",
            "max_wal_senders": "10",
            "max_prepared_transactions": "20",
        }
        copy = LocalServer(self.server.programs, folder, account=self.server.account, settings=settings)
        self.made.append(copy)
        copy.start(until="standby")
        with psycopg.connect(copy.dsn(), autocommit=True) as connection:
            wait_for(connection, "select pg_get_wal_replay_pause_state() = 'paused'")
        return copy

    def _archive(self) -> None:
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            connection.execute(
                "select pg_logical_emit_message(true, 'test', 'something to switch away from')"
            )
            row = connection.execute("select pg_walfile_name(pg_switch_wal())").fetchone()
            assert row is not None
            connection.execute("select pg_logical_emit_message(true, 'test', 'after the switch')")
            wait_for(connection, f"select last_archived_wal >= '{row[0]}' from pg_stat_archiver")

    def stop(self) -> None:
        for copy in self.made:
            copy.stop("immediate")
            shutil.rmtree(copy.data_directory, ignore_errors=True)


def wait_for(connection: psycopg.Connection[tuple[object, ...]], query: str, seconds: float = 30) -> None:
    """Until the query answers true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        row = connection.execute(query.encode()).fetchone()
        if row is not None and row[0]:
            return
        time.sleep(0.02)
    raise AssertionError(f"not true within {seconds} s: {query}")


@contextmanager
def writers(
    dsn: str, count: int, work: Callable[[psycopg.Connection[tuple[object, ...]], int], None]
) -> Iterator[None]:
    """`count` threads, each with a connection, that call `work(connection, round)` until the end."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            with psycopg.connect(with_words(dsn), autocommit=True) as connection:
                turn = number
                while not stop.is_set():
                    work(connection, turn)
                    turn += count
        except (psycopg.Error, AssertionError) as error:
            if not stop.is_set():
                errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors[0]


def flip_byte(path: Path, needle: bytes, replacement: bytes) -> int:
    """Replace the only occurrence of `needle` in a file with as many bytes; its offset."""
    assert len(needle) == len(replacement)
    data = path.read_bytes()
    assert data.count(needle) == 1, data.count(needle)
    offset = data.index(needle)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(replacement)
    return offset
