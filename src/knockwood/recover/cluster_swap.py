"""Two data directories change places: the restored one and the old one, which is kept.

Which is which is told by inode, not by name: so a run that was killed between two steps knows where it is. The
names change places at once where the file system can; else there is a moment with no data directory at all,
in which no server can start.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from knockwood.errors import HostError, RefusedError
from knockwood.host import files, privileges

_CONFIGURATION: Final = ("postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf")
_LAST: Final = "PG_VERSION"
_STANDBY: Final = ("standby.signal", "recovery.signal")


@dataclass(frozen=True, slots=True)
class Identity:
    """A folder that keeps its identity under another name."""

    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Identity | None:
        """None where there is none."""
        try:
            info = path.stat()
        except FileNotFoundError:
            return None
        return cls(info.st_dev, info.st_ino)

    def as_json(self) -> dict[str, int]:
        return {"device": self.device, "inode": self.inode}

    @classmethod
    def from_json(cls, value: Any) -> Identity:
        return cls(int(value["device"]), int(value["inode"]))


@dataclass(frozen=True, slots=True)
class Places:
    """The names that one restore in place uses, all in the folder that holds the data directory."""

    data: Path
    new: Path
    old: Path
    rolled_back: Path
    tablespaces: Path

    @classmethod
    def of(cls, data: Path, execution: str) -> Places:
        def named(word: str) -> Path:
            return data.with_name(f"{data.name}.{word}-{execution}")

        return cls(data, named("new"), named("old"), named("rolled-back"), named("tablespaces"))


def require_swappable(data: Path) -> Path:
    """The data directory with links resolved; raises RefusedError where it cannot be renamed."""
    try:
        real = data.resolve(strict=True)
    except OSError as error:
        raise RefusedError("there is no data directory", where=str(data), hint=str(error)) from error
    if not (real / _LAST).is_file() or not (real / "global").is_dir():
        raise RefusedError("not a data directory", where=str(data))
    if any((real / name).exists() for name in _STANDBY):
        raise RefusedError(
            "the cluster is a standby: restored, it would go its own way",
            where=str(real),
            hint="restore its primary, or build the standby anew from it",
        )
    if not os.access(real.parent, os.W_OK):
        raise RefusedError(
            "the folder that holds the data directory cannot be written",
            where=str(real.parent),
            hint="run knockwood as root or as the server's account",
        )
    if real.stat().st_dev != real.parent.stat().st_dev:
        raise RefusedError(
            "the data directory is a mount point: it cannot change places with another",
            where=str(real),
            hint="restore beside it: knockwood restore --into DIR, and move the contents yourself",
        )
    return real


def adopt_configuration(old: Path, new: Path) -> list[str]:
    """Give the restored cluster the configuration files that lie in the old one's folder; their names.

    A file that the old folder does not have (its configuration lies elsewhere) goes from the new one too.
    """
    adopted = []
    account = privileges.server_account(old)
    own = {path.name for path in old.iterdir() if path.name.endswith(".conf")}
    for name in sorted(own | set(_CONFIGURATION)):
        source, target = old / name, new / name
        with files.translated(target):
            if source.is_symlink():
                target.unlink(missing_ok=True)
                os.symlink(os.readlink(source), target)
            elif source.is_file():
                files.replace(target, source.read_bytes())
                shutil.copymode(source, target)
            else:
                target.unlink(missing_ok=True)
                continue
            privileges.give(target, account)
            adopted.append(name)
    files.fsync_file(new)
    return adopted


def swap(places: Places, old: Identity) -> None:
    """Put the complete new cluster in the old one's place; the old one is kept under `places.old`.

    May be called again at any point. Raises HostError when what lies there is not what was left.
    """
    with files.translated(places.data):
        if Identity.of(places.data) == old:
            _require_whole(places.new)
            if not files.exchange(places.data, places.new):
                places.data.rename(places.old)
                files.fsync_file(places.data.parent)
        if not places.data.exists():
            _require_whole(places.new)
            places.new.rename(places.data)
        if Identity.of(places.new) == old:
            places.new.rename(places.old)
        files.fsync_file(places.data.parent)
    if Identity.of(places.old) != old or not (places.data / _LAST).is_file():
        raise HostError("the folders are not where they were left", where=str(places.data.parent))


def swap_back(places: Places, old: Identity) -> bool:
    """Put the old cluster back; the restored one is kept as `places.rolled_back`. False: it was there already."""
    kept = next((p for p in (places.data, places.old, places.new) if Identity.of(p) == old), None)
    if kept is None:
        raise HostError("the old data directory is in none of its places", where=str(places.data.parent))
    moved = kept != places.data
    with files.translated(places.data):
        if kept == places.new and places.data.exists():
            # Killed right after the exchange: the restored one has been where servers start. Under this name
            # no roll-back takes it for one that nobody ever used.
            kept = places.new.rename(places.old)
            files.fsync_file(places.data.parent)
        if moved:
            if not places.data.exists():
                kept.rename(places.data)
            elif not files.exchange(places.data, kept):
                places.data.rename(places.rolled_back)
                files.fsync_file(places.data.parent)
                kept.rename(places.data)
        # After an exchange the restored one lies under the name that the old one had.
        if places.old.exists():
            places.old.rename(places.rolled_back)
            moved = True
        elif moved and places.new.exists():
            # Killed between the two renames: the restored one never was in place.
            places.new.rename(places.rolled_back)
        files.fsync_file(places.data.parent)
    return moved


def swapped(places: Places, old: Identity) -> bool:
    """Whether the new cluster was in the old one's place, or was on its way."""
    return Identity.of(places.data) != old or places.old.exists() or places.rolled_back.exists()


def _require_whole(folder: Path) -> None:
    if not (folder / _LAST).is_file() or not (folder / "global" / "pg_control").is_file():
        raise HostError("the restored cluster is not complete", where=str(folder))
