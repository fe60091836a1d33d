"""Runs the command line in this process and dies at a chosen step of it.

    kill_launcher.py OPTIONS ARGUMENT...

OPTIONS is JSON: `roots` (paths that count), `record` (a file for the list of steps), or `place` and
`occurrence` (die there), and with `victim`, a file that holds a pid, kill that process instead and go on.

A step is what a crash can fall before: a file opened, named, removed or flushed below one of the roots, a
program started, a statement sent. Its place is the function of the product that takes it, so that the same
step is found again in another run. Nothing in the product knows of this.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg

from knockwood.cli.main import main as run_command

_FILE_EVENTS = frozenset(
    ("open", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# What everybody calls says little about which step it is: its caller names the place.
_GENERAL = ("/knockwood/host/", "/knockwood/repository/storage/", "/knockwood/postgres/connection.py")


class Steps:
    """Counts the steps of this process as they come, and acts at the one chosen."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.roots = tuple(options["roots"])
        self.record = options.get("record")
        self.chosen = (options.get("place"), options.get("occurrence"))
        self.victim = options.get("victim")
        self.taken: list[str] = []
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._acting = threading.local()

    def install(self) -> None:
        """From now on every step counts."""
        self._wrap(os, "fsync", "fsync")
        self._wrap(psycopg.Cursor, "execute", "statement")
        sys.addaudithook(self._heard)

    def _wrap(self, owner: Any, name: str, event: str) -> None:
        # These raise no audit event: flushing a file, and what goes through libpq.
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self._step(event)
            return original(*arguments, **options)

        setattr(owner, name, counted)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS:
            if self._counts(arguments[0]) or (len(arguments) > 1 and self._counts(arguments[1])):
                self._step(_named(event, arguments))
        elif event == "subprocess.Popen":
            self._step(f"start {os.path.basename(os.fsdecode(arguments[0]))}")

    def _counts(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.roots)

    def _step(self, event: str) -> None:
        # A forked child is not the command, and what we do at a step is no step.
        if os.getpid() != self._pid or getattr(self._acting, "now", False):
            return
        place = f"{_caller(sys._getframe(2))} {event}"
        with self._lock:
            self._seen[place] += 1
            if self.record is not None:
                self.taken.append(place)
            if (place, self._seen[place]) != self.chosen:
                return
            self._acting.now = True
            self._kill()
            self._acting.now = False

    def _kill(self) -> None:
        if self.victim is None:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
            return
        pid = int(Path(self.victim).read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        Path(f"{self.victim}-killed").touch()

    def write(self) -> None:
        """Leave the list of steps in the file asked for."""
        if self.record is not None:
            self._acting.now = True
            Path(self.record).write_text(json.dumps(self.taken))


def _named(event: str, arguments: tuple[Any, ...]) -> str:
    if event != "open":
        return event.removeprefix("os.")
    return "write" if (arguments[2] or 0) & _WRITING else "read"


def _caller(frame: FrameType | None) -> str:
    """The nearest function of the product that is not everybody's."""
    general = "?"
    while frame is not None:
        file = frame.f_code.co_filename
        if "/knockwood/" in file:
            name = f"{file.rpartition('/knockwood/')[2].removesuffix('.py')}:{frame.f_code.co_qualname}"
            if not any(part in file for part in _GENERAL):
                return name
            general = name if general == "?" else general
        frame = frame.f_back
    return general


def main() -> int:
    steps = Steps(json.loads(sys.argv[1]))
    steps.install()
    try:
        return run_command(sys.argv[2:])
    finally:
        steps.write()


if __name__ == "__main__":
    sys.exit(main())
