"""Servers of our own: made, started, stopped and reaped as an unprivileged account.

Each listens on a Unix socket in a private folder only, is our child, and gets SIGQUIT (immediate
shutdown) when we die, so that no server is ever left behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from knockwood.errors import HostError, PostgresError, RecoveryFailedError
from knockwood.host import clock, files, others, privileges, processes
from knockwood.host.privileges import Account
from knockwood.postgres.binaries import Programs, runnable_by

SUPERUSER = "postgres"

_STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_SOCKET_FOLDER_BYTES = 80
_NOTICED_SECONDS = 20
_ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": os.environ.get("PATH", "/usr/bin:/bin")}


def init_cluster(
    programs: Programs,
    data_directory: Path,
    *,
    account: Account | None = None,
    checksums: bool = True,
    segment_megabytes: int = 16,
) -> None:
    """Make a new cluster (superuser `postgres`, trust over its private socket, UTF-8, C locale)."""
    programs = runnable_by(programs, account)
    files.make_folder(data_directory.parent)
    data_directory.mkdir(mode=0o700, exist_ok=True)
    privileges.give(data_directory, account)
    command: list[str | Path] = [
        programs.path("initdb"),
        *("-D", data_directory, "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "-N"),
        f"--wal-segsize={segment_megabytes}",
    ]
    command += ["--locale-provider=builtin", "--locale=C.UTF-8"] if programs.major >= 17 else ["--locale=C"]
    if checksums and programs.major < 18:
        command.append("--data-checksums")
    if not checksums and programs.major >= 18:
        command.append("--no-data-checksums")
    processes.run(command, account=account, env=_ENVIRONMENT, timeout=120)


class LocalServer:
    """A PostgreSQL server that is our child. Use as a context manager, or call `stop` yourself.

    `settings` go on the command line and so beat the cluster's files. The socket folder is made
    short (socket paths may not exceed 107 bytes) and removed at stop. The log is `log_path`.
    """

    def __init__(
        self,
        programs: Programs,
        data_directory: Path,
        *,
        account: Account | None = None,
        settings: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        port: int = 5432,
    ) -> None:
        self.account = account
        self.programs = runnable_by(programs, account)
        self.data_directory = data_directory
        self.settings = dict(settings or {})
        self.log_path = log_path or data_directory.parent / f"{data_directory.name}.log"
        self.port = port
        self.socket_directory: Path | None = None
        self._child: subprocess.Popen[bytes] | others.Found | None = None

    @property
    def pid(self) -> int | None:
        """The postmaster's pid while it runs."""
        return self._child.pid if self.running else None  # type: ignore[union-attr]

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def ours(self) -> bool:
        """Whether it runs as our child, and so ends with us."""
        return self.running and isinstance(self._child, subprocess.Popen)

    def adopt(self, postmaster: processes.ProcessIdentity, socket_directory: Path) -> None:
        """Take a server that another process started on this folder for this one; it ends with that process."""
        self._child = others.Found(postmaster)
        self.socket_directory = socket_directory

    def dsn(self, database: str = "postgres", user: str = SUPERUSER, **extra: str) -> str:
        """A libpq connection string for this server."""
        words = {"host": str(self.socket_directory), "port": str(self.port), "dbname": database, "user": user}
        return " ".join(f"{key}={_quoted(value)}" for key, value in (words | extra).items())

    def start(self, timeout: float = 60, until: Literal["ready", "standby", "launched"] = "ready") -> None:
        """Start and wait until connections are taken; with `standby` also a hot standby counts.

        With `launched` it does not wait: recovery may take hours, and the caller follows it.

        Raises PostgresError with the log's last lines if the server ends or the time is up.
        """
        if self.running:
            return
        if self.socket_directory is None:
            self.socket_directory = self._new_socket_directory()
        self._remove_stale_lock()
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_directory),
            "port": str(self.port),
            "logging_collector": "off",
            "log_destination": "stderr",
            **self.settings,
        }
        command: list[str | Path] = [self.programs.path("postgres"), "-D", self.data_directory]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with self.log_path.open("ab") as log:
            self._child = processes.start(
                command,
                account=self.account,
                env=_ENVIRONMENT,
                stdout=log,
                stderr=log,
                death_signal=signal.SIGQUIT,
            )
        if until != "launched":
            self._wait(timeout, until)

    def _new_socket_directory(self) -> Path:
        # Beside the data directory it goes when that goes, also after a kill; a socket's path may have
        # 107 bytes, which not every data directory leaves.
        beside = self.data_directory.with_name(f"{self.data_directory.name}.socket")
        if len(str(beside)) <= _SOCKET_FOLDER_BYTES and privileges.reachable_by(beside, self.account):
            beside.mkdir(mode=0o700, exist_ok=True)
            folder = beside
        else:
            folder = Path(tempfile.mkdtemp(prefix="kw-"))
        privileges.give(folder, self.account)
        return folder

    def _remove_stale_lock(self) -> None:
        # A killed postmaster whose parent is gone can stay a zombie where process 1 reaps nothing;
        # PostgreSQL takes its pid for a live server. Only a pid file of a process that is dead goes.
        lock = self.data_directory / "postmaster.pid"
        if not lock.exists():
            return
        try:
            pid = int(lock.read_text().split("\n", 1)[0])
            alive = processes.ProcessIdentity.of(abs(pid)).alive()
        except (ValueError, OSError, HostError):
            alive = False
        if alive:
            raise PostgresError("a server runs on this folder already", where=str(self.data_directory))
        lock.unlink(missing_ok=True)

    def _wait(self, timeout: float, until: str) -> None:
        wanted = ("ready", "standby") if until == "standby" else ("ready",)
        deadline = clock.monotonic() + timeout
        pid_file = self.data_directory / "postmaster.pid"
        while clock.monotonic() < deadline:
            if not self.running:
                raise PostgresError(
                    f"the server ended at start: {self.log_tail()}", where=str(self.data_directory)
                )
            try:
                lines = pid_file.read_text().splitlines()
            except OSError:
                lines = []
            if len(lines) >= 8 and lines[7].strip() in wanted and lines[0] == str(self._child.pid):  # type: ignore[union-attr]
                return
            clock.sleep(0.01)
        self.stop("immediate")
        raise RecoveryFailedError(
            f"the server was not ready after {timeout:.0f} s: {self.log_tail()}",
            where=str(self.data_directory),
        )

    def wait_ended(self, timeout: float) -> int | None:
        """Wait until the server has ended by itself; its exit status, or None if it still runs."""
        if self._child is None:
            return None
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast", timeout: float = 120) -> None:
        """Shut down, reap, and remove the socket folder. Does nothing if it is not running."""
        if self._child is not None:
            if self._child.poll() is None:
                self._child.send_signal(_STOP_SIGNALS[mode])
                try:
                    self._child.wait(timeout)
                except subprocess.TimeoutExpired:
                    self._child.kill()
            self._child.wait()
            self._child = None
        if self.socket_directory is not None:
            shutil.rmtree(self.socket_directory, ignore_errors=True)
            self.socket_directory = None

    def kill(self) -> None:
        """SIGKILL to the postmaster, as a crash would; its backends notice and end, before which no other can start."""
        if self._child is not None:
            backends = others.children_of(self._child.pid)
            self._child.kill()
            self._child.wait()
            self._child = None
            others.wait_for(backends, _NOTICED_SECONDS)

    def reload(self) -> None:
        """Make the server read its configuration files again."""
        if self._child is not None:
            self._child.send_signal(signal.SIGHUP)

    def log_tail(self, lines: int = 5) -> str:
        """The last lines the server logged, joined by ` / `."""
        try:
            text = self.log_path.read_text(errors="replace")
        except OSError:
            return "no log"
        return " / ".join(text.strip().splitlines()[-lines:])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop("fast" if kind is None else "immediate")


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
