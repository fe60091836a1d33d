"""A restore that is not complete: kept in a folder of its own, so that it can never start as if it were.

Until the last step the folder asked for holds nothing but `knockwood-restore-is-not-complete`; then the
parts of the data directory move up, and PG_VERSION, without which no server starts, moves last.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from knockwood.errors import DirectoryNotEmptyError, HostError, LockHeldError, RefusedError
from knockwood.host import clock, files, privileges
from knockwood.host.privileges import Account
from knockwood.host.processes import ProcessIdentity

WORK: Final = "knockwood-restore-is-not-complete"
_MARKER: Final = "restore.json"
_LAST: Final = "PG_VERSION"


@dataclass(frozen=True, slots=True)
class HalfDone:
    """What an unfinished restore says about itself. `moving` names what may have moved up already."""

    target: str
    began: datetime
    owner: ProcessIdentity
    tablespaces: Path | None = None
    sockets: Path | None = None
    moving: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "began": self.began.isoformat(),
            "owner": asdict(self.owner),
            "tablespaces": str(self.tablespaces) if self.tablespaces else None,
            "sockets": str(self.sockets) if self.sockets else None,
            "moving": list(self.moving),
        }

    @classmethod
    def read(cls, into: Path) -> HalfDone | None:
        """The unfinished restore in `into`, or None. One that wrote nothing yet reads as `unknown`."""
        work = into / WORK
        if not work.is_dir():
            return None
        try:
            value = json.loads((work / _MARKER).read_text())
            return cls(
                target=str(value["target"]),
                began=datetime.fromisoformat(value["began"]),
                owner=ProcessIdentity(int(value["owner"]["pid"]), float(value["owner"]["started"])),
                tablespaces=Path(value["tablespaces"]) if value["tablespaces"] else None,
                sockets=Path(value["sockets"]) if value["sockets"] else None,
                moving=tuple(value["moving"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            moment = datetime.fromtimestamp(work.stat().st_mtime, clock.now().tzinfo)
            return cls("unknown", moment, ProcessIdentity(-1, 0.0))


def complete(into: Path) -> bool:
    """Whether a data directory is all there; the work folder of its restore, or what is left of it, may be, too."""
    return (into / _LAST).exists()


def begin(into: Path, target: str, *, account: Account | None, sockets: Path, again: bool = False) -> Path:
    """Claim `into` for a restore; the work folder in it, which holds nothing but its marker.

    Raises DirectoryNotEmptyError (saying what lies there), LockHeldError while another restore works
    there, RefusedError inside a data directory. With `again` what a dead restore left there is removed.
    """
    _refuse_inside_cluster(into)
    work = into / WORK
    with files.translated(into):
        if into.exists():
            _make_way(into, again)
        files.make_folder(into, 0o711)
        try:
            work.mkdir(0o711)
        except FileExistsError:
            raise LockHeldError("another restore has just begun here", where=str(into)) from None
        privileges.give(into, account)
        into.chmod(0o700)
        _write(into, HalfDone(target, clock.now(), ProcessIdentity.own(), None, sockets))
    return work


def claim_tablespaces(into: Path, folder: Path) -> None:
    """Note the folder that the restore's tablespaces go to; DirectoryNotEmptyError if something is there."""
    with files.translated(folder):
        if folder.exists() and any(folder.iterdir()):
            raise DirectoryNotEmptyError(
                "the folder for tablespaces is not empty",
                where=str(folder),
                hint="name one that does not exist yet with --tablespaces",
            )
    state = HalfDone.read(into)
    assert state is not None
    _write(into, replace(state, tablespaces=folder))


def finish(into: Path, data: Path) -> None:
    """Move the finished data directory up into `into`, PG_VERSION last, and remove the work folder."""
    names = sorted(os.listdir(data), key=lambda name: (name == _LAST, name == "global", name))
    if not names or names[-1] != _LAST:
        raise HostError("not a data directory: PG_VERSION is missing", where=str(data))
    state = HalfDone.read(into)
    assert state is not None
    with files.translated(into):
        _write(into, replace(state, moving=tuple(names)))
        for name in names[:-1]:
            (data / name).rename(into / name)
        files.fsync_file(into)
        (data / _LAST).rename(into / _LAST)
        files.fsync_file(into)
        files.remove_tree(into / WORK)
        files.fsync_file(into)


def discard(into: Path) -> None:
    """Remove what an unfinished restore left; a finished cluster is never touched."""
    state = HalfDone.read(into)
    if state is None:
        return
    if complete(into):
        raise RefusedError(
            "the restore here is complete; only its work folder was left", where=str(into / WORK)
        )
    with files.translated(into):
        for name in state.moving:
            _remove(into / name)
        for folder in (state.tablespaces, state.sockets):
            if folder is not None:
                files.remove_tree(folder)
        # The marker goes last: whoever finds the rest must be able to tell what it is.
        for entry in list((into / WORK).iterdir()):
            if entry.name != _MARKER:
                _remove(entry)
        files.remove_tree(into / WORK)


def abandon(into: Path, *, existed: bool) -> None:
    """After a failure: remove what this restore left, unless its last step was done already."""
    if not complete(into):
        discard(into)
        if not existed:
            into.rmdir()


def _make_way(into: Path, again: bool) -> None:
    if not into.is_dir():
        raise DirectoryNotEmptyError("not a folder", where=str(into), hint="name one that does not exist yet")
    found = HalfDone.read(into)
    if found is not None and not complete(into):
        _require_dead(into, found)
        if not again:
            raise DirectoryNotEmptyError(
                f"a restore to {found.target}, begun {found.began:%Y-%m-%d %H:%M:%S} UTC, is not complete",
                where=str(into),
                hint="restore with --again: it removes what that one left here and starts over",
            )
        discard(into)
    if any(into.iterdir()):
        raise DirectoryNotEmptyError(
            "the folder is not empty; a restore never writes over anything",
            where=str(into),
            hint="name a folder that does not exist yet",
        )


def _require_dead(into: Path, found: HalfDone) -> None:
    if found.owner.pid > 0 and found.owner.alive():
        raise LockHeldError(
            f"another restore is at work here (pid {found.owner.pid})",
            where=str(into),
            hint="wait for it to end, or stop it first",
        )


def _refuse_inside_cluster(into: Path) -> None:
    for folder in into.absolute().resolve().parents:
        if (folder / _LAST).exists() and (folder / "global").is_dir():
            raise RefusedError(
                "the folder lies inside the data directory of a cluster",
                where=str(folder),
                hint="name a folder beside it",
            )


def _write(into: Path, state: HalfDone) -> None:
    files.replace(into / WORK / _MARKER, json.dumps(state.as_json(), indent=1).encode())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        files.remove_tree(path)
    else:
        path.unlink(missing_ok=True)
