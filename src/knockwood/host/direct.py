"""Single blocks of files that another program has open: written durably, read from the disk itself."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from knockwood.errors import HostError
from knockwood.host.files import translated

_NO_DIRECT_IO = (errno.EINVAL, errno.EOPNOTSUPP)


def write_block(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes inside a file, durable on return; raises HostError rather than make the file longer.

    Not atomic: after a crash of the machine, or a kill in the middle, the bytes can be half old, half new.
    """
    with translated(path):
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if os.fstat(handle).st_size < offset + len(data):
                raise HostError(f"the file ends before byte {offset + len(data)}", where=str(path))
            view, at = memoryview(data), offset
            while view:
                written = os.pwrite(handle, view, at)
                view, at = view[written:], at + written
            os.fsync(handle)
        finally:
            os.close(handle)


def read_block(path: Path, offset: int, length: int) -> bytes:
    """Bytes of a file as the disk has them, past the system's cache where the file system lets us.

    Fewer at the end of the file, none where it is gone. `offset` and `length` are multiples of 4096.
    """
    with translated(path):
        try:
            return _read(path, offset, length, os.O_DIRECT)
        except FileNotFoundError:
            return b""
        except OSError as error:
            if error.errno not in _NO_DIRECT_IO:
                raise
        return _read(path, offset, length, 0)


def _read(path: Path, offset: int, length: int, flags: int) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | flags)
    try:
        if not flags:
            # What is clean leaves the cache; the rest is on its way to the disk.
            os.posix_fadvise(handle, offset, length, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(-1, length) as buffer:  # pages of memory are aligned, as direct reads demand
            count = os.preadv(handle, [buffer], offset)
            return buffer[:count]
    finally:
        os.close(handle)
