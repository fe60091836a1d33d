"""Files that survive a crash: written beside, fsynced, renamed, the folder fsynced."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from knockwood.errors import HostError, NoSpaceError, ObjectExistsError
from knockwood.host import clock

Chunk = bytes | bytearray | memoryview

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_FLUSH_BYTES = 8 << 20
_REMOVALS = 100
_SYNCING = 16


def fsync_file(path: Path) -> None:
    """Flush one file or folder to stable storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path, mode: int = 0o700) -> None:
    """Create a folder and its parents, each made durable in its parent."""
    missing: list[Path] = []
    step = path
    while not step.exists():
        missing.append(step)
        step = step.parent
    with translated(path):
        for folder in reversed(missing):
            try:
                folder.mkdir(mode=mode)
            except FileExistsError:
                continue
            fsync_file(folder.parent)


def write_new(path: Path, chunks: Iterable[Chunk], mode: int = 0o600) -> int:
    """Write a file that must not exist yet; returns its bytes. Raises ObjectExistsError if it does.

    The content is complete and durable before the name appears: a hard link fails where a rename
    would overwrite. What a crash leaves is a `.tmp-` file that nothing reads.
    """
    make_folder(path.parent)
    temporary = path.parent / f".tmp-{secrets.token_hex(8)}"
    with translated(path):
        try:
            size = _write(temporary, chunks, mode)
            try:
                _name_it(temporary, path)
            except FileExistsError:
                # Its writer may have been killed before the name was durable.
                fsync_file(path.parent)
                raise ObjectExistsError("already stored", where=str(path)) from None
            fsync_file(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return size


def write_passing(path: Path, chunks: Iterable[Chunk], mode: int = 0o600) -> int:
    """Write a file that nobody needs after a crash, and that must not exist yet; returns its bytes."""
    with translated(path):
        return _write(path, chunks, mode, durable=False)


def _name_it(temporary: Path, path: Path) -> None:
    """Give a finished file its name; raises FileExistsError if that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # Over NFS a request that succeeded may be repeated and then told that the name is taken.
        if temporary.stat().st_nlink != 2:
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # File systems without hard links (FAT, some network and user-space ones).
        encoded = os.fsencode(temporary), os.fsencode(path)
        if _libc.renameat2(_AT_FDCWD, encoded[0], _AT_FDCWD, encoded[1], _RENAME_NOREPLACE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path)) from error


def exchange(first: Path, second: Path) -> bool:
    """Let two names change places at once; False where the file system cannot, with nothing changed."""
    with translated(first):
        encoded = os.fsencode(first), os.fsencode(second)
        if _libc.renameat2(_AT_FDCWD, encoded[0], _AT_FDCWD, encoded[1], _RENAME_EXCHANGE) != 0:
            code = ctypes.get_errno()
            if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                return False
            raise OSError(code, os.strerror(code), str(first))
        for folder in {first.parent, second.parent}:
            fsync_file(folder)
    return True


def replace(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write or overwrite a small file of our own, all or nothing, durable on return."""
    make_folder(path.parent)
    temporary = path.parent / f".tmp-{secrets.token_hex(8)}"
    with translated(path):
        try:
            _write(temporary, [data], mode)
            temporary.rename(path)
            fsync_file(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _write(path: Path, chunks: Iterable[Chunk], mode: int, *, durable: bool = True) -> int:
    size = begun = 0
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                written = file.write(view)
                view = view[written:]
                size += written
            if durable and size - begun >= _FLUSH_BYTES:
                begin_flush(file.fileno(), begun, size - begun)
                begun = size
        if durable:
            os.fsync(file.fileno())
    return size


def begin_flush(handle: int, start: int, count: int) -> None:
    """Have the system begin to write a range of a file to its disk; waits for nothing, promises nothing.

    An fsync that comes later waits for little then, and a database on the same disk does not wait behind
    gigabytes of ours.
    """
    _libc.sync_file_range(handle, ctypes.c_int64(start), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


def sync_trees(roots: Iterable[Path]) -> None:
    """Flush folders with all that is in them, but not what links there lead to."""
    with ThreadPoolExecutor(_SYNCING) as pool:
        for root in roots:
            for _ in pool.map(fsync_file, _paths(root)):
                pass


def _paths(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield Path(folder)
        yield from (path for name in names if not (path := Path(folder) / name).is_symlink())


def read_chunks(path: Path, size: int = 1 << 20, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from `start` up to `end`, in pieces of at most `size`."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = None if end is None else end - start
        while left is None or left > 0:
            data = file.read(size if left is None else min(size, left))
            if not data:
                return
            if left is not None:
                left -= len(data)
            yield data


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user can still write on the disk that holds `path` (which may not exist yet)."""
    step = path
    while not step.exists():
        step = step.parent
    return shutil.disk_usage(step).free


def require_space(path: Path, wanted: int, purpose: str) -> None:
    """Raise NoSpaceError unless `wanted` bytes are free where `path` is or will be."""
    free = free_bytes(path)
    if free < wanted:
        raise NoSpaceError(
            f"{purpose} needs {wanted / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free",
            where=str(path),
            hint="free some space, or name another folder",
        )


def remove_tree(path: Path) -> None:
    """Remove a folder of ours and all in it; nothing happens where there is none.

    The children of a server that was just stopped end at once but not in the same instant: one may still
    write a file. So a folder that fills again is emptied again, for a few seconds.
    """
    for attempt in range(_REMOVALS):
        if not path.exists():
            return
        try:
            shutil.rmtree(path)
            return
        except OSError as error:
            passing = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
            if not passing or attempt == _REMOVALS - 1:
                # Deep down the system names files by the number of an open folder.
                error.filename = str(path)
                raise
        clock.sleep(0.05)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn the system's file errors into ours, naming the path."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                "the disk is full", where=where, hint="free some space; the next run goes on"
            ) from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise HostError(reason.lower(), where=where, hint=_hint(error.errno)) from error


def _hint(code: int | None) -> str | None:
    if code in (errno.EACCES, errno.EPERM):
        return "does this user own the folder, and may it write there?"
    if code == errno.EROFS:
        return "the file system is mounted read-only: did the kernel see a disk error?"
    if code == errno.EIO:
        return "the disk itself reported an error: look at the kernel's log and at smartctl"
    return None
