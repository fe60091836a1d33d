"""A receiver on a real server, and what its archive must hold."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psycopg

from knockwood.errors import PostgresError
from knockwood.host import clock, processes
from knockwood.model.wal import Lsn, Timeline, WalRange, WalSegment
from knockwood.postgres.connection import connect, server_facts
from knockwood.postgres.server import LocalServer
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage


def new_repository(
    server: LocalServer, folder: Path, *, recipients: tuple[str, ...] = (), identities: tuple[str, ...] = ()
) -> Repository:
    """A repository on a local folder for a running server; with recipients it encrypts."""
    with connect(server.dsn()) as connection:
        facts = server_facts(connection)
    return Repository.create(
        open_storage(str(folder)),
        cluster="shop",
        system_identifier=facts.system_identifier,
        segment_bytes=facts.segment_bytes,
        recipients=recipients,
        identities=identities,
    )


def commit(server: LocalServer, payload: int = 100, switch: bool = False) -> Lsn:
    """One acknowledged commit; the flush position right after it."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("create table if not exists t (id bigint generated always as identity, x text)")
        connection.execute("insert into t (x) values (repeat('x', %s))", [payload])
        row = connection.execute("select pg_current_wal_flush_lsn()::text").fetchone()
        assert row is not None
        if switch:
            connection.execute("select pg_switch_wal()")
    return Lsn.parse(row[0])


def start_again(server: LocalServer) -> None:
    """Start a server that was killed, as soon as its last backends have noticed."""
    deadline = clock.monotonic() + 20
    while True:
        try:
            return server.start()
        except PostgresError as error:
            if "still in use" not in str(error) or clock.monotonic() > deadline:
                raise
            clock.sleep(0.1)


def fetch_range(repository: Repository, wanted: WalRange, into: Path) -> None:
    """Write the files that hold a range to a folder, from whatever the archive has of them."""
    archive = WalArchive(repository)
    stock = archive.inventory()
    into.mkdir(parents=True, exist_ok=True)
    for segment in wanted.segments(stock.segment_bytes):
        source = stock.source(segment)
        assert source is not None, f"{segment} is not in the archive"
        if source == "segment":
            archive.fetch(segment, into / segment.name)
        else:
            archive.fetch_partial(source.name, into / segment.name)


def waldump(server: LocalServer, folder: Path, wanted: WalRange) -> subprocess.CompletedProcess[str]:
    """Walk a range with the server's own pg_waldump, which checks every record's CRC and prev-link."""
    words = ["-p", folder, "-t", str(wanted.timeline), "-s", str(wanted.start), "-e", str(wanted.end), "-q"]
    done = processes.run([server.programs.path("pg_waldump"), *words], check=False, timeout=120)
    return subprocess.CompletedProcess([], done.status, done.out, done.err)


def first_lsn(repository: Repository, timeline: int = 1) -> Lsn:
    """Where the archive of a timeline begins."""
    stock = WalArchive(repository).inventory()
    numbers = [*stock.segments.get(Timeline(timeline), ())]
    numbers += [p.segment.number for p in stock.partials if p.segment.timeline == timeline]
    return WalSegment(Timeline(timeline), min(numbers), stock.segment_bytes).start
