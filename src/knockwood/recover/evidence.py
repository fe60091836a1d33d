"""What a repair is about to change, kept first: never overwritten, durable before anything is touched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from knockwood.errors import HostError, ObjectExistsError, RefusedError
from knockwood.host import files

Keep = Callable[[Mapping[str, bytes]], None]
"""Keeps pieces of evidence by name; they are durable on return."""


def keep(folder: Path, name: str, data: bytes) -> tuple[Path, str]:
    """Keep `data` as `folder/name`; returns the path and the SHA-256 of what is kept there.

    What was kept first stays: a step that runs again after a crash sees what it has already changed, and
    that must not take the place of the damaged page. Raises HostError, NoSpaceError.
    """
    path = folder / _plain(name)
    try:
        files.write_new(path, [data])
    except ObjectExistsError:
        data = read(path)
    return path, hashlib.sha256(data).hexdigest()


def read(path: Path, sha256: str | None = None) -> bytes:
    """What was kept; raises HostError if it is gone or is not what was kept."""
    with files.translated(path):
        data = path.read_bytes()
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise HostError(
            "the evidence kept is not what was written",
            where=str(path),
            hint="the disk that holds the state folder may be faulty: use nothing from it",
        )
    return data


def _plain(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\0" in name or name.startswith(".tmp-"):
        raise RefusedError(f"not a name for a piece of evidence: {name!r}")
    return name
