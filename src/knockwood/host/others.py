"""Processes that others started: found, told from later ones of the same pid, and ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from knockwood.errors import HostError
from knockwood.host import clock
from knockwood.host.processes import ProcessIdentity

_POLL_SECONDS = 0.01


class Found:
    """A process that another one started, handled like a child of ours; whoever started it reaps it.

    Its exit status is not ours to know: an end is told as 0.
    """

    def __init__(self, identity: ProcessIdentity) -> None:
        self.identity = identity
        self.pid = identity.pid

    @property
    def title(self) -> str:
        """What it calls itself; nothing once it has ended."""
        with suppress(psutil.Error):
            return " ".join(psutil.Process(self.pid).cmdline())
        return ""

    @property
    def parent(self) -> int | None:
        """The process that it is a child of now."""
        with suppress(psutil.Error):
            return psutil.Process(self.pid).ppid()
        return None

    def works_in(self, folder: Path) -> bool:
        """Whether its current folder is this one."""
        with suppress(psutil.Error, OSError):
            return psutil.Process(self.pid).cwd() == str(folder.resolve())
        return False

    def poll(self) -> int | None:
        return None if self.identity.alive() else 0

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else clock.monotonic() + timeout
        while self.identity.alive():
            if deadline is not None and clock.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout or 0)
            clock.sleep(_POLL_SECONDS)
        return 0

    def send_signal(self, number: int) -> None:
        if self.identity.alive():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def children_of(pid: int) -> list[Found]:
    """The processes that a process has started and that run now."""
    with suppress(psutil.Error):
        return _identified(child.pid for child in psutil.Process(pid).children())
    return []


def working_in(folder: Path, names: Container[str] | None = None) -> list[Found]:
    """The processes whose current folder this is, by pid; a PostgreSQL server and its children stay in theirs.

    Only programs of these `names`, where they are given. Those of other accounts are seen by root only.
    """
    wanted = str(folder.resolve())
    pids = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == wanted and (names is None or process.name() in names):
                pids.append(process.pid)
    return [found for found in _identified(sorted(pids)) if found.poll() is None]


def wait_for(found: Iterable[Found], seconds: float) -> list[Found]:
    """Wait until all have ended, so long in all; those that have not."""
    deadline = clock.monotonic() + seconds
    alive = [each for each in found if each.poll() is None]
    while alive and clock.monotonic() < deadline:
        clock.sleep(_POLL_SECONDS)
        alive = [each for each in alive if each.poll() is None]
    return alive


def _identified(pids: Iterable[int]) -> list[Found]:
    found = []
    for pid in pids:
        with suppress(HostError):
            found.append(Found(ProcessIdentity.of(pid)))
    return found
