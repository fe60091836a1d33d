"""A lock between processes of one machine, free again when its holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knockwood.errors import LockHeldError
from knockwood.host import files


@contextmanager
def file_lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`; raises LockHeldError at once if another process has it."""
    files.make_folder(path.parent)
    with files.translated(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 100, 0).decode(errors="replace").strip()
            raise LockHeldError(
                f"another {purpose} is at work" + (f" (pid {holder})" if holder else ""),
                where=str(path),
                hint="wait for it to end, or stop it first",
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)
