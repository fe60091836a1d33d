"""What both benches stand on: a cluster of their own, commands run as its account, folders that go again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from knockwood.errors import KnockwoodError
from knockwood.host import privileges, processes
from knockwood.host.privileges import Account
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.server import LocalServer, init_cluster

BENCH = Path(__file__).resolve().parent
OUT = BENCH / "out"
_SERVER_PACKAGES = "/usr/lib/postgresql"


@dataclass(frozen=True, slots=True)
class Said:
    """What one command answered: its exit status (None: it did not end in time) and what it printed."""

    command: str
    status: int | None
    out: str
    err: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status == 0

    def lines(self, limit: int = 6) -> tuple[str, ...]:
        """The first lines printed, standard error last; empty ones left out."""
        said = [line.rstrip() for line in (self.out + "\n" + self.err).splitlines() if line.strip()]
        return tuple(said[:limit])


def say(text: str) -> None:
    """Progress for whoever waits, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def end_cleanly() -> None:
    """Let SIGTERM unwind as Ctrl-C does, so that servers end and folders go."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def ask(
    command: Sequence[str | Path],
    *,
    account: Account | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Said:
    """Run one command to its end whatever its status; a command that hangs is ended and says so."""
    words = [str(word) for word in command]
    begun = time.monotonic()
    child = processes.start(
        words, account=account, env=environment(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, err = child.communicate(timeout=timeout)
        status: int | None = child.returncode
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        status = None
    finally:
        processes.stop(child, grace=0)
    seconds = time.monotonic() - begun
    return Said(" ".join(words), status, out.decode(errors="replace"), err.decode(errors="replace"), seconds)


def must(said: Said) -> Said:
    """The same answer, or a RuntimeError that shows it: for steps without which nothing can be measured."""
    if not said.ok:
        raise RuntimeError(f"status {said.status}: {said.command}\n" + "\n".join(said.lines(30)))
    return said


def environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """What commands see of the caller's environment, with what is added."""
    # A library path or locale of the caller's could change what a peer does or prints.
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return kept | {"LC_ALL": "C.UTF-8", "TZ": "UTC"} | dict(extra or {})


@contextmanager
def work_folder(account: Account | None) -> Iterator[Path]:
    """A temporary folder that the servers' account owns; gone at the end, also after Ctrl-C."""
    folder = Path(tempfile.mkdtemp(prefix="kwbench-"))
    privileges.give(folder, account)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def system_programs(wanted: int | None = None) -> Programs:
    """A PostgreSQL of the distribution's, which its pgBackRest knows too; installed when root and missing."""
    majors = [wanted] if wanted else [15, 16, 17, 14]
    for attempt in ("look", "install"):
        for major in majors:
            try:
                return find_programs(major, Path(f"{_SERVER_PACKAGES}/{major}/bin"))
            except KnockwoodError:
                continue
        if attempt == "look" and privileges.is_root() and shutil.which("apt-get"):
            say("installing the distribution's PostgreSQL")
            _install_server(majors)
    names = ", ".join(str(major) for major in majors)
    raise SystemExit(
        f"no PostgreSQL of the distribution's ({names}) in {_SERVER_PACKAGES}, and cannot install it"
    )


def _install_server(majors: Sequence[int]) -> None:
    # Without this the package would create and start a cluster of its own.
    ask(["apt-get", "update", "-qq"], timeout=300)
    ask(apt_install("postgresql-common"), timeout=600)
    settings = Path("/etc/postgresql-common/createcluster.conf")
    if settings.exists() and "\ncreate_main_cluster = false" not in settings.read_text():
        with settings.open("a") as file:
            file.write("\ncreate_main_cluster = false\n")
    for major in majors:
        if ask(apt_install(f"postgresql-{major}"), timeout=900).ok:
            return


def apt_install(*packages: str) -> list[str]:
    """The command that installs Debian packages without a question."""
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-qq"]
    return [*quiet, "--no-install-recommends", *packages]


def new_server(
    programs: Programs,
    folder: Path,
    account: Account | None,
    settings: Mapping[str, str],
    *,
    checksums: bool = True,
) -> LocalServer:
    """A started server on a new cluster in `folder`, with a socket only."""
    init_cluster(programs, folder, account=account, checksums=checksums)
    server = LocalServer(programs, folder, account=account, settings=settings)
    server.start()
    return server


def query(dsn: str, sql: str) -> list[tuple[Any, ...]]:
    """Run SQL in autocommit and give back its rows; none for a statement without rows."""
    with psycopg.connect(dsn, autocommit=True, connect_timeout=10) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def wait_until(done: Callable[[], bool], what: str, timeout: float = 120) -> None:
    """Wait for a condition; raises TimeoutError naming it."""
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s in vain for {what}")
        time.sleep(0.1)


def copy_tree(source: Path, target: Path) -> Path:
    """A fresh copy with owners, modes and links kept."""
    must(ask(["cp", "-a", source, target]))
    return target


def write_as(path: Path, data: bytes | str, account: Account | None) -> None:
    """Write a file that the servers' account owns."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    privileges.give(path, account)


def public_path(account: Account | None, *wanted: Path) -> Path:
    """The first of the wanted folders that the account can enter, else one in the temporary folder."""
    for path in wanted:
        path.mkdir(parents=True, exist_ok=True)
        if privileges.reachable_by(path / "x", account):
            return path
    return Path(tempfile.gettempdir()) / f"kwbench-{os.getuid()}"


def interpreter(account: Account | None) -> str:
    """A Python that the account can run: ours, or the system's."""
    own = Path(sys.executable)
    return str(own) if privileges.reachable_by(own.resolve(), account) else "/usr/bin/python3"


def knockwood_command() -> list[str]:
    """The command line under test: the one beside the interpreter, else the module in this tree."""
    program = Path(sys.executable).parent / "knockwood"
    if program.exists():
        return [str(program)]
    return [sys.executable, "-m", "knockwood"]


@dataclass(frozen=True, slots=True)
class Restored:
    """What came of a restore: whether a server started on it, and what its database held."""

    exit: int | None
    started: bool
    rows: int | None
    tables: Mapping[str, str]
    note: str


def open_restored(
    programs: Programs,
    folder: Path,
    account: Account | None,
    said: Said,
    questions: Callable[[str], tuple[int, Mapping[str, str]]],
) -> Restored:
    """Start a server on what a restore left and ask it; nothing of it can reach the source cluster."""
    if not (folder / "PG_VERSION").exists():
        return Restored(said.status, False, None, {}, "nothing restored")
    if not (folder / "global" / "pg_control").exists():
        return Restored(said.status, False, None, {}, "no pg_control: cannot start")
    server = LocalServer(programs, folder, account=account, settings={"archive_mode": "off", "fsync": "off"})
    try:
        server.start(timeout=90, until="standby")
        state = settled(server)
        rows, tables = questions(server.dsn())
        return Restored(said.status, True, rows, tables, state)
    except (KnockwoodError, psycopg.Error, TimeoutError) as error:
        words = [line for line in server.log_tail(12).split(" / ") if "FATAL:" in line or "PANIC:" in line]
        reason = re.sub(r"^.*?(FATAL|PANIC): +", "", words[0]) if words else str(error)
        return Restored(said.status, False, None, {}, reason[:200])
    finally:
        server.stop("immediate")


def settled(server: LocalServer, timeout: float = 90) -> str:
    """Wait until recovery has ended (returns nothing) or is paused (says so)."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        [(recovering, paused)] = query(
            server.dsn(),
            "SELECT pg_is_in_recovery(), pg_is_in_recovery() AND pg_get_wal_replay_pause_state() = 'paused'",
        )
        if not recovering:
            return ""
        if paused:
            return "paused in recovery"
        time.sleep(0.05)
    raise TimeoutError(f"recovery did not end within {timeout:.0f} s")
