"""The real command line as a process of its own, beside a real server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import knockwood
from knockwood.cli.main import main
from knockwood.host import privileges
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import connect
from knockwood.postgres.server import SUPERUSER, LocalServer

_SOURCE = Path(knockwood.__file__).parent.parent
_PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "USER", "LOGNAME")


@dataclass
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on standard output; anything before or after it fails."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert value["schema"] == "knockwood/1"
        return value


@dataclass
class CommandLine:
    """`line("backup")` runs `knockwood backup --json` on the settings file of `folder`."""

    folder: Path
    server: LocalServer
    environment: dict[str, str] = field(default_factory=dict)
    in_process: bool = False
    """Call the command line's `main` instead of starting Python anew for each command."""

    @property
    def config(self) -> Path:
        return self.folder / "knockwood.toml"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    def start(self, *words: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Begin a command and return at once."""
        return subprocess.Popen(
            [sys.executable, "-m", "knockwood", *map(str, words)],
            env=self._environment(env),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        settings = {
            "PYTHONPATH": str(_SOURCE),
            "KNOCKWOOD_CONFIG": str(self.config),
            "KNOCKWOOD_STATE": str(self.state),
        }
        return kept | settings | self.environment | dict(more or {})

    def run(self, *words: object, env: Mapping[str, str] | None = None) -> Ended:
        """Run one command as typed; no traceback may ever be seen."""
        if self.in_process:
            out, err = io.StringIO(), io.StringIO()
            before = dict(os.environ)
            # What would be an internal error outside fails the test with its traceback here.
            os.environ.update(self._environment(env) | {"KNOCKWOOD_TRACEBACK": "1"})
            handler = signal.getsignal(signal.SIGTERM)
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    status = main([str(word) for word in words])
            finally:
                signal.signal(signal.SIGTERM, handler)
                os.environ.clear()
                os.environ.update(before)
            return Ended(status, out.getvalue(), err.getvalue())
        return self.ended(self.start(*words, env=env))

    def ended(self, child: subprocess.Popen[str]) -> Ended:
        """Wait for a command that was started."""
        with child:
            try:
                out, err = child.communicate(timeout=180)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
        assert "Traceback" not in f"{out}{err}", err
        return Ended(child.returncode, out or "", err)

    def __call__(
        self, *words: object, status: int = 0, env: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Run a command with --json: its object. The exit status must be the one expected."""
        ended = self.run(*words, "--json", env=env)
        assert ended.status == status, f"{words}: {ended.status}\n{ended.out[-3000:]}\n{ended.err[-3000:]}"
        return ended.json

    def fails(
        self, status: int, code: str, *words: object, env: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Run a command that must fail with this exit status and error code: its error."""
        answer = self(*words, status=status, env=env)
        assert "error" in answer, answer
        error: dict[str, Any] = answer["error"]
        assert error["code"] == code, error
        assert answer["verdict"] == ("broken" if code == "KW502" else "not_checked")
        return error

    def init(self, *words: object, **given: Any) -> dict[str, Any]:
        """Settings and repository for the server, in the folder."""
        return self(
            *("init", "--name", "shop", "--dsn", given.pop("dsn", None) or self.server.dsn()),
            *("--repository", given.pop("repository", None) or self.repository),
            *("--data-directory", self.server.data_directory),
            *words,
            **given,
        )

    def edit(self, old: str, new: str) -> None:
        """Change the settings file."""
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    def execute(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        with connect(self.server.dsn(database)) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def slots(self) -> list[str]:
        return [str(row[0]) for row in self.execute("select slot_name from pg_replication_slots")]

    def assert_nothing_left(self) -> None:
        """No slot, clone, lock holder, half-written object or temporary folder of a command that ended."""
        if self.server.running:
            assert self.slots() == []
        assert not list((self.state / "clones").glob("*.json"))
        left = [path for path in self.folder.rglob("*") if path.name.startswith(".tmp-")]
        assert left == [], f"left behind: {left}"
        for lease in self.repository.glob("leases/*"):
            # None at all where the command was stopped before it had taken its first lease.
            newest = max(lease.glob("*.json"), default=None)
            assert newest is None or json.loads(newest.read_text())["holder"] is None, newest


@contextmanager
def command_line(
    shared_folder: Path, template: Path, programs: Programs, **settings: str
) -> Iterator[CommandLine]:
    """A command line in a folder of its own, with a server copied from a template."""
    folder = Path(tempfile.mkdtemp(dir=shared_folder))
    folder.chmod(0o755)
    account = privileges.server_account()
    place = folder / "server"
    place.mkdir()
    privileges.give(place, account)
    shutil.copytree(template, place / "data", symlinks=True)
    privileges.give_tree(place / "data", account)
    (place / "data").chmod(0o700)
    options = {"fsync": "off", "max_wal_senders": "10", "shared_buffers": "16MB"} | settings
    server = LocalServer(programs, place / "data", account=account, settings=options)
    try:
        server.start()
        yield CommandLine(folder, server)
    finally:
        server.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def line(
    shared_folder: Path, templates: Callable[[int, int], Path], installations: dict[int, Programs]
) -> Iterator[CommandLine]:
    """A protected cluster of PostgreSQL 18 and its commands, called in this process, as a superuser."""
    with command_line(shared_folder, templates(18, 1), installations[18]) as made:
        made.in_process = True
        made.init()
        made.edit("user=knockwood", f"user={SUPERUSER}")
        yield made
