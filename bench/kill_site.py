"""Where the kills happen: a shop under load with its witness, its settings, and its standing receiver."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import knockwood
from knockwood.drill.sandbox import choose_programs
from knockwood.drill.witness import Loss, Witness, loss
from knockwood.drill.workload import INVARIANTS, Workload, create_shop, tokens_present
from knockwood.errors import PostgresError
from knockwood.host import files, privileges, processes
from knockwood.model import WalRange, WalSegment
from knockwood.operations.cluster import Cluster
from knockwood.postgres.connection import connect
from knockwood.postgres.server import LocalServer, init_cluster
from knockwood.repository import receive_server
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository
from knockwood.settings import load
from sandbox import BENCH, Said, ask, environment, must

DATABASE = "shop"
NAME = "kills"
SEGMENT_MEGABYTES = 1

# A kill takes no page cache with it: fsync would only slow the server down.
_SETTINGS = {
    "fsync": "off",
    "shared_buffers": "16MB",
    "wal_level": "logical",
    "summarize_wal": "on",
    "max_wal_senders": "10",
    "max_wal_size": "64MB",
    "checkpoint_timeout": "30s",
}
_EXTENSIONS = ("amcheck", "pg_visibility", "pageinspect", "pg_buffercache", "pg_walinspect")
_LAUNCHER = BENCH / "kill_launcher.py"


@dataclass
class Site:
    """One sandbox. `tmp` is the temporary folder of all that runs in it, so that leftovers are seen."""

    folder: Path
    server: LocalServer
    witness: Witness
    workload: Workload
    config: Path
    tmp: Path
    receiver: Receiver = field(init=False)
    restored: int = 0

    def __post_init__(self) -> None:
        self.receiver = Receiver(self)

    @property
    def dsn(self) -> str:
        return self.server.dsn(DATABASE)

    def cluster(self, config: Path | None = None) -> Cluster:
        return Cluster.of(load(config or self.config), NAME)

    def repository(self) -> Repository:
        return self.cluster().repository()

    def env(self) -> dict[str, str]:
        source = Path(knockwood.__file__).parent.parent
        state = str(self.folder / "state")
        return {"TMPDIR": str(self.tmp), "PYTHONPATH": str(source), "KNOCKWOOD_STATE": state}

    def run(self, words: Sequence[str], config: Path | None = None, timeout: float = 180) -> Said:
        """Run one command as its user would, to its end."""
        command = [sys.executable, "-m", "knockwood", *self.words(words, config)]
        return ask(command, env=self.env(), timeout=timeout)

    def words(self, words: Sequence[str], config: Path | None = None) -> list[str]:
        return [*words, "--config", str(config or self.config), "--json"]

    def launch(
        self, words: Sequence[str], options: Mapping[str, Any], config: Path | None, log: Path
    ) -> subprocess.Popen[bytes]:
        """Begin one command under the launcher; what it prints goes to `log`."""
        given = json.dumps({"roots": [str(self.folder)], **options})
        with log.open("ab") as out:
            return processes.start(
                [sys.executable, _LAUNCHER, given, *self.words(words, config)],
                env=environment(self.env()),
                stdout=out,
                stderr=out,
            )

    # --- the server -------------------------------------------------------------------------------

    @property
    def pid_file(self) -> Path:
        """The postmaster's pid, for the launcher."""
        return self.folder / "postmaster"

    @property
    def server_killed(self) -> Path:
        """Made by the launcher when it has killed the server."""
        return self.folder / "postmaster-killed"

    def note_server(self) -> None:
        self.pid_file.write_text(f"{self.server.pid}\n")

    def restart_server(self) -> None:
        """Start a killed server again, as its supervisor would."""
        deadline = time.monotonic() + 30
        while self.server.running and time.monotonic() < deadline:
            time.sleep(0.02)
        while True:
            try:
                self.server.start()
                break
            except PostgresError:
                # Backends of the killed one may not have ended yet.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        self.server_killed.unlink(missing_ok=True)
        self.note_server()

    def wait_current(self, timeout: float = 60) -> bool:
        """Whether the archive comes to hold all that the server has promised until now."""
        deadline = time.monotonic() + timeout
        promised = receive_server.flushed(self.dsn).flush
        position = receive_server.identify(self.dsn)
        repository = self.repository()
        segment = WalSegment.containing(position.timeline, promised, repository.header.segment_bytes)
        wanted = WalRange(position.timeline, min(segment.start, promised), promised)
        while not WalArchive(repository).inventory().covers(wanted):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def switch_wal(self) -> None:
        """Begin a new segment, so that a whole one is archived."""
        try:
            with connect(self.dsn) as connection:
                connection.execute("select pg_switch_wal()")
        except PostgresError:
            return

    # --- restores ---------------------------------------------------------------------------------

    def new_folder(self) -> Path:
        """A folder for a restore that does not exist yet."""
        self.restored += 1
        parent = self.folder / "restored"
        files.make_folder(parent, 0o755)
        return parent / f"{self.restored:03d}"

    def lacking(self, folder: Path, count: int) -> Loss:
        """Start what was restored and compare it with the first `count` promises of the witness."""
        server = LocalServer(
            self.server.programs,
            folder,
            account=self.server.account,
            settings={"fsync": "off", "shared_buffers": "16MB"},
        )
        with server:
            present = tokens_present(server.dsn(DATABASE))
        return loss(self.witness.promises()[:count], present)

    def lost_config(self) -> Path:
        """Settings as on a new machine: no server to ask, no spool, only the repository."""
        away = self.folder / "away"
        files.make_folder(away, 0o755)
        return write_settings(
            self.folder / "lost.toml", f"host={away} dbname={DATABASE}", self.folder / "repository", away
        )


@dataclass
class Receiver:
    """`knockwood wal receive`, kept running."""

    site: Site
    child: subprocess.Popen[bytes] | None = None
    since: float = 0.0

    @property
    def log(self) -> Path:
        return self.site.folder / "receiver.log"

    @property
    def running(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def start(self, options: Mapping[str, Any] | None = None) -> None:
        """Begin it, under the launcher's orders if there are any."""
        self.child = self.site.launch(["wal", "receive"], options or {}, None, self.log)
        self.since = time.monotonic()

    def ensure(self) -> None:
        if not self.running:
            self.start()

    def kill(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()

    def stop(self) -> None:
        """End it as its user would."""
        if self.child is not None:
            processes.stop(self.child, grace=30)


def write_settings(path: Path, dsn: str, repository: Path, state: Path, data: Path | None = None) -> Path:
    """A settings file for the shop; with the data directory if its files may be written."""
    reach = f"data_directory = {json.dumps(str(data))}\n" if data else ""
    invariants = "".join(
        f"\n[[cluster.{NAME}.invariant]]\nname = {json.dumps(name)}\nsql = {json.dumps(sql)}\n"
        f"database = {json.dumps(DATABASE)}\n"
        for name, sql in INVARIANTS.items()
    )
    programs = choose_programs().folder
    path.write_text(
        f"state = {json.dumps(str(state))}\n\n[cluster.{NAME}]\ndsn = {json.dumps(dsn)}\n"
        f"repository = {json.dumps(str(repository))}\nprograms = {json.dumps(str(programs))}\n{reach}"
        f'\n[cluster.{NAME}.backup]\nkeep = "0s"\nkeep_full = 1\n{invariants}'
    )
    return path


@contextmanager
def site(*, orders: int, clients: int, seed: int, reach: bool = False) -> Iterator[Site]:
    """A shop under load, its repository made and its WAL being received; all gone at the end.

    With `reach` the settings name the data directory.
    """
    before, handler = tempfile.tempdir, signal.getsignal(signal.SIGTERM)
    try:
        with tempfile.TemporaryDirectory(prefix="kwkills-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            folder.chmod(0o755)
            tmp = folder / "t"
            tmp.mkdir()
            tmp.chmod(0o1777)
            tempfile.tempdir = str(tmp)
            with _server(folder) as server:
                yield from _shop(folder, tmp, server, orders, clients, seed, reach)
    finally:
        tempfile.tempdir = before
        signal.signal(signal.SIGTERM, handler)


def _shop(
    folder: Path, tmp: Path, server: LocalServer, orders: int, clients: int, seed: int, reach: bool
) -> Iterator[Site]:
    _prepare(server, orders)
    config = write_settings(
        folder / "knockwood.toml",
        server.dsn(DATABASE),
        folder / "repository",
        folder / "state",
        server.data_directory if reach else None,
    )
    witness = Witness(folder / "witness.log")
    # The load shall fill the time, not the disk.
    workload = Workload(server.dsn(DATABASE, user="app"), witness, clients=clients, seed=seed, pause=0.03)
    made = Site(folder, server, witness, workload, config, tmp)
    made.cluster().create_repository()
    made.note_server()
    try:
        made.receiver.start()
        workload.start()
        yield made
    finally:
        # Whoever is told twice to end, as a whole group is, shall not leave this half-done.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        workload.stop()
        made.receiver.stop()
        witness.close()


@contextmanager
def _server(folder: Path) -> Iterator[LocalServer]:
    account = privileges.server_account()
    home = folder / "production"
    files.make_folder(home, mode=0o755)
    privileges.give(home, account)
    programs = choose_programs()
    init_cluster(programs, home / "data", account=account, segment_megabytes=SEGMENT_MEGABYTES)
    settings = {
        name: value for name, value in _SETTINGS.items() if name != "summarize_wal" or programs.major >= 17
    }
    server = LocalServer(programs, home / "data", account=account, settings=settings)
    try:
        server.start()
        yield server
    finally:
        server.stop("immediate")


def _prepare(server: LocalServer, orders: int) -> None:
    with connect(server.dsn()) as connection:
        connection.execute("create role app login")
    for database in ("template1", "postgres"):
        with connect(server.dsn(database)) as connection:
            for extension in _EXTENSIONS:
                connection.execute(f"create extension if not exists {extension}")
    with connect(server.dsn()) as connection:
        connection.execute(f"create database {DATABASE} owner app")
    create_shop(server.dsn(DATABASE, user="app"), orders)


def must_backup(place: Site) -> None:
    """The first backup, on which all else builds; raises RuntimeError if it cannot be had."""
    must(place.run(["backup"]))
