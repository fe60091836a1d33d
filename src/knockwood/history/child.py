"""Processes of our own that index: how they are started, and the repository they are given."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import knockwood
from knockwood.host import processes
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage

_ENVIRONMENT: Final = {
    # One thread each: the work is divided by segments already.
    "OPENBLAS_NUM_THREADS": "1",
    # glibc keeps what is freed for the next segment: pages given back and faulted in again cost a tenth.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


_BEHIND: Final = "from knockwood.host.priority import wait_behind_everybody as wait; wait(); "


def start(module: str, *, patient: bool = False) -> subprocess.Popen[bytes]:
    """Run a module's `main` in a process that talks by its input and output, and dies with this thread.

    A `patient` one has the lowest priority there is.
    """
    package = str(Path(knockwood.__path__[0]).parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return processes.start(
        [sys.executable, "-P", "-c", f"{_BEHIND if patient else ''}import {module}; {module}.main()"],
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        death_signal=signal.SIGKILL,
    )


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill it if it is there, and close the pipes to it."""
    processes.stop(child, grace=0)
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def repository_as_json(repository: Repository) -> dict[str, Any]:
    """For a child's input: keys are in it, which a command line would show to everybody."""
    return {
        "storage": repository.storage.url,
        "recipients": repository.recipients,
        "identities": repository.identities,
    }


def repository_from(job: dict[str, Any]) -> Repository:
    return Repository.open(
        open_storage(job["storage"]), recipients=job["recipients"], identities=job["identities"]
    )
