"""Where this machine keeps Knockwood's working files: locks, spools, clones. Never the only copy of anything."""

from __future__ import annotations

import os
from pathlib import Path

from knockwood.host.privileges import is_root


def state_folder(given: Path | None = None) -> Path:
    """The folder given, $KNOCKWOOD_STATE, /var/lib/knockwood for root, else the user's state folder."""
    if given is not None:
        return given
    if os.environ.get("KNOCKWOOD_STATE"):
        return Path(os.environ["KNOCKWOOD_STATE"])
    if is_root():
        return Path("/var/lib/knockwood")
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "knockwood"
