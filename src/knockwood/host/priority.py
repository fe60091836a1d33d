"""Work that may wait: it gets what nobody else wants."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

_LAST_OF_ITS_CLASS = 7


def wait_behind_everybody() -> None:
    """Give this process the lowest ordinary priority for processors and disks, for good.

    Not the idle classes: who is left waiting for ever inside a file system's lock keeps others waiting.
    Best effort: what a system does not know or allow is left out.
    """
    with suppress(OSError):
        os.nice(19)
    # Where sessions are scheduled as groups, a nice value counts inside its session only. That of a session
    # counts for all that is in it: it is set only where the session is this process's own.
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")
    with suppress(OSError, AttributeError, psutil.Error):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, _LAST_OF_ITS_CLASS)
