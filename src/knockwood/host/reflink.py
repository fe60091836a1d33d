"""Copies of folders that share their bytes with the original where the file system can (`cp --reflink=auto`)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from knockwood.host import clock, files

_FICLONE: Final = 0x40049409
"""ioctl(2) FICLONE: share another file's extents (btrfs, XFS, bcachefs, overlay on them, NFS 4.2)."""

_NOT_HERE: Final = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM)
_CHUNK: Final = 8 << 20
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class CopyCost:
    """What a copy took: `copied` bytes were read and written, `shared` ones only referenced."""

    files: int = 0
    copied: int = 0
    shared: int = 0
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        return self.copied + self.shared


def can_share(folder: Path) -> bool:
    """Whether files of the file system that holds `folder` (which must exist) can share their bytes."""
    names = [folder / f".tmp-{secrets.token_hex(8)}" for _ in range(2)]
    with files.translated(folder):
        try:
            names[0].write_bytes(b"x" * 4096)
            return _share(names[0], names[1])
        finally:
            for name in names:
                name.unlink(missing_ok=True)


def tree_bytes(root: Path) -> int:
    """Bytes allocated to the files below `root`, links not followed."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            info = os.lstat(Path(folder) / name)
            total += min(info.st_size, info.st_blocks * 512) if stat.S_ISREG(info.st_mode) else 0
    return total


def copy_tree(
    source: Path,
    into: Path,
    *,
    links: Mapping[Path, Path] | None = None,
    progress: Callable[[int], None] | None = None,
) -> CopyCost:
    """Copy a folder that nobody writes to into `into`, which must not exist: owners, modes, holes and all.

    Absolute symbolic links below a key of `links` point below its value in the copy; sockets and pipes
    are left out. Nothing is flushed: the copy is good until the machine fails. `progress` gets the bytes
    so far. Raises NoSpaceError or HostError; what was copied by then is removed again.
    """
    began = clock.monotonic()
    work = _Copy(dict(links or {}), progress)
    with files.translated(into):
        into.mkdir(mode=0o700)  # what is there already is not ours to remove
        try:
            work.folder(source, into)
        except BaseException:
            if into.exists():
                files.remove_tree(into)
            raise
    return CopyCost(work.files, work.copied, work.shared, clock.monotonic() - began)


class _Copy:
    """One copy under way; it gives up sharing at the first file that cannot."""

    def __init__(self, links: Mapping[Path, Path], progress: Callable[[int], None] | None) -> None:
        self.links = links
        self.progress = progress
        self.sharing = True
        self.files = self.copied = self.shared = 0

    def folder(self, source: Path, into: Path) -> None:
        info = source.stat()
        for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
            path, copy = Path(entry.path), into / entry.name
            if entry.is_symlink():
                self._link(path, copy)
            elif entry.is_dir(follow_symlinks=False):
                copy.mkdir(mode=0o700)
                self.folder(path, copy)
            elif entry.is_file(follow_symlinks=False):
                self._file(path, copy)
        _same_owner(into, info)
        into.chmod(stat.S_IMODE(info.st_mode))

    def _link(self, source: Path, into: Path) -> None:
        target = Path(os.readlink(source))
        for old, new in self.links.items():
            if target.is_absolute() and target.is_relative_to(old):
                target = new / target.relative_to(old)
                break
        into.symlink_to(target)
        _same_owner(into, os.lstat(source))

    def _file(self, source: Path, into: Path) -> None:
        info = source.stat()
        self.sharing = self.sharing and _share(source, into)
        if self.sharing:
            self.shared += info.st_size
        else:
            _copy_bytes(source, into, info.st_size)
            self.copied += info.st_size
        _same_owner(into, info)
        into.chmod(stat.S_IMODE(info.st_mode))
        self.files += 1
        if self.progress is not None:
            self.progress(self.copied + self.shared)


def _share(source: Path, into: Path) -> bool:
    with source.open("rb") as old, into.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            return False
    return True


def _copy_bytes(source: Path, into: Path, size: int) -> None:
    """Copy the data of a file and keep its holes; the kernel moves the bytes where it can."""
    with source.open("rb") as old, into.open("wb") as new:
        position = 0
        while position < size:
            try:
                begin = os.lseek(old.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                    break
                raise
            end = min(os.lseek(old.fileno(), begin, os.SEEK_HOLE), size)
            _copy_range(old.fileno(), new.fileno(), begin, end)
            position = max(end, begin + 1)
        new.truncate(size)


def _copy_range(old: int, new: int, begin: int, end: int) -> None:
    position = begin
    while position < end:
        wanted = min(_CHUNK, end - position)
        try:
            done = os.copy_file_range(old, new, wanted, position, position)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            data = os.pread(old, wanted, position)
            done = os.pwrite(new, data, position) if data else 0
        if done == 0:  # shorter than it was: somebody writes to it
            raise OSError(errno.EIO, "the file shrank while it was copied")
        position += done


def _same_owner(path: Path, info: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.chown(path, info.st_uid, info.st_gid, follow_symlinks=False)


def flush(path: Path) -> None:
    """Write back everything of the file system that holds `path`, and wait for it (syncfs)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if _libc.syncfs(handle) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(handle)


def link_or_copy(source: Path, into: Path) -> None:
    """Another name for a file that nobody changes any more; a copy where there can be none."""
    try:
        os.link(source, into)
    except OSError as error:
        if error.errno not in (*_NOT_HERE, errno.EMLINK):
            raise
        shutil.copy2(source, into)
        _same_owner(into, source.stat())
