"""How much memory there is, and how the process's allocator deals with large buffers."""

from __future__ import annotations

import ctypes
from typing import Final

import psutil

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_LARGE: Final = 32 << 20
_KEPT: Final = 128 << 20
_ARENAS: Final = 2


def keep_large_buffers() -> None:
    """Let buffers of megabytes be used again: glibc gives each back to the system when it is freed.

    Where many come and go, the faults of fresh pages take a fifth of the processor time. Does nothing
    with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    # Few arenas: each keeps what was freed in it.
    for name, value in ((_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, _KEPT), (_M_ARENA_MAX, _ARENAS)):
        mallopt(name, value)


def available() -> int:
    """Bytes of memory that programs can be given without swapping."""
    return int(psutil.virtual_memory().available)
