"""The speed bench's cluster: a pgbench database, protected by Knockwood and pgBackRest at once."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gap_pgbackrest
from gap_knockwood import Knockwood
from gap_tools import Source
from knockwood.host import privileges
from knockwood.postgres.binaries import Programs
from knockwood.postgres.server import LocalServer
from sandbox import Said, ask, must, new_server, query, say, settled, wait_until

SETTINGS = {
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "wal_level": "replica",
    "max_wal_senders": "10",
    "archive_mode": "on",
    "checkpoint_timeout": "15min",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the bench was asked for. With `text` the rows hold text, where pgbench's own hold blanks."""

    scale: int = 150
    runs: int = 5
    seconds: int = 30
    clients: int = 8
    wal_segments: int = 64
    text: bool = False


@dataclass(frozen=True, slots=True)
class Site:
    """A running cluster with a pgbench database, protected by Knockwood and, where it is there, pgBackRest."""

    source: Source
    options: Options
    knockwood: Knockwood
    pgbackrest: gap_pgbackrest.PgBackRest | None
    missing: str
    notes: list[str] = field(default_factory=list)

    @property
    def dsn(self) -> str:
        return self.source.server.dsn()

    @property
    def bytes(self) -> int:
        """Bytes of all databases."""
        [(size,)] = query(self.dsn, "SELECT sum(pg_database_size(oid))::bigint FROM pg_database")
        return int(size)

    def pgbench(self, *words: str, timeout: float = 3600) -> Said:
        server = self.source.server
        where = ("-h", str(server.socket_directory), "-p", str(server.port), "-U", "postgres")
        return must(ask([server.programs.path("pgbench"), *where, *words, "postgres"], timeout=timeout))

    def tps(self, seconds: int, clients: int) -> float:
        """Transactions a second of pgbench's own mix."""
        said = self.pgbench("-n", "-c", str(clients), "-j", "2", "-T", str(seconds))
        found = re.search(r"^tps = ([0-9.]+)", said.out, flags=re.MULTILINE)
        if found is None:
            raise RuntimeError(f"pgbench printed no tps: {said.out}")
        return float(found[1])

    def caught_up(self) -> None:
        """Return once all WAL up to now is in Knockwood's repository."""
        [(name,)] = query(self.dsn, "SELECT pg_walfile_name(pg_switch_wal())")
        folder = self.knockwood.folder / "repository" / "wal" / str(name)[:8] / str(name)[:16]
        wait_until(lambda: any(folder.glob(f"{name}*")), f"{name} to reach the repository", 300)


@contextmanager
def site(
    programs: Programs,
    work: Path,
    options: Options,
    *,
    peers: bool,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Site]:
    """Make the cluster, fill it, and protect it; all of it ends with the context. `settings` beat SETTINGS."""
    account = privileges.server_account()
    work.chmod(0o755)
    server = new_server(programs, work / "pg", account, SETTINGS | dict(settings or {}))
    source = Source(programs, account, work, server)
    ours = Knockwood(source, work / "knockwood")
    try:
        missing = gap_pgbackrest.find() if peers else "not asked for"
        peer = None if missing else gap_pgbackrest.PgBackRest(source, work / "pgbackrest", 2, 1)
        found = Site(source, options, ours, peer, missing)
        say(f"filling a pgbench database of scale {options.scale}")
        query(server.dsn(), "ALTER SYSTEM SET archive_command = '/bin/true'")
        query(server.dsn(), "SELECT pg_reload_conf()")
        _fill(found)
        query(server.dsn(), "CHECKPOINT")
        if peer is not None:
            peer.prepare()
            query(server.dsn(), f"ALTER SYSTEM SET archive_command = '{peer.archive_words()}'")
            query(server.dsn(), "SELECT pg_reload_conf()")
        ours.prepare()
        yield found
    finally:
        ours.close()
        server.stop("immediate")


_TEXT = (
    "INSERT INTO pgbench_branches SELECT i, 0, '' FROM generate_series(1, {scale}) i",
    "INSERT INTO pgbench_tellers SELECT i, (i - 1) / 10 + 1, 0, '' FROM generate_series(1, 10 * {scale}) i",
    (
        "INSERT INTO pgbench_accounts SELECT i, (i - 1) / 100000 + 1, 0,"
        " left(md5(i::text) || md5((i + 1)::text) || md5((i + 2)::text), 84)"
        " FROM generate_series(1, 100000 * {scale}) i"
    ),
)


def _fill(place: Site) -> None:
    """pgbench's tables; its own blanks compress to a twentieth, which hardly a table in use does."""
    scale = place.options.scale
    if not place.options.text:
        place.pgbench("-i", "-q", "-s", str(scale))
        return
    place.pgbench("-i", "-q", "-s", str(scale), "-I", "dt")
    for statement in _TEXT:
        query(place.dsn, statement.format(scale=scale))
    place.pgbench("-i", "-q", "-s", str(scale), "-I", "vp")


def seconds_to_open(site_: Site, folder: Path) -> float:
    """Seconds from starting a server on a restored folder until it is open for writes; it ends again."""
    account = site_.source.account
    settings = {"archive_mode": "off", "shared_buffers": "512MB"}
    server = LocalServer(site_.source.programs, folder, account=account, settings=settings)
    begun = time.monotonic()
    try:
        server.start(timeout=600, until="standby")
        if state := settled(server, 600):
            raise RuntimeError(f"the restored cluster is {state}")
        return time.monotonic() - begun
    finally:
        server.stop("immediate")


def emptied(folder: Path) -> Path:
    """The path, with nothing there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
