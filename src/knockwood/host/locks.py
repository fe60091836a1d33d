"""A lock between processes of one machine, free again when its holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

from knockwood.errors import LockHeldError
from knockwood.host import clock, files

_LEFT_BEHIND: Final = 10.0
"""Seconds that what a dead holder started may take to end: until then it has the lock, too."""
_POLL: Final = 0.02


@contextmanager
def file_lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`; raises LockHeldError at once if another living process has it."""
    files.make_folder(path.parent)
    with files.translated(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = clock.monotonic() + _LEFT_BEHIND
        while not _taken(handle):
            holder = os.pread(handle, 100, 0).decode(errors="replace").strip()
            if _is_dead(holder) and clock.monotonic() < deadline:
                clock.sleep(_POLL)
                continue
            raise LockHeldError(
                f"another {purpose} is at work" + (f" (pid {holder})" if holder else ""),
                where=str(path),
                hint="wait for it to end, or stop it first",
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_dead(holder: str) -> bool:
    """Whether the process that wrote its number there is gone; a child that it forked may not be yet."""
    try:
        return psutil.Process(int(holder)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, ValueError):
        return False
