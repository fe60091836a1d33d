"""Which clones there are on this machine and whose they are, so that those of the dead are removed.

A clone is written down before anything of it exists and struck out after everything of it is gone.
Its owner holds a lock that the kernel frees when it dies, however it dies.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import stat
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from knockwood.errors import HostError, LockHeldError
from knockwood.host import clock, files, others, privileges
from knockwood.host.locks import file_lock
from knockwood.host.processes import ProcessIdentity
from knockwood.host.state import state_folder

_MARK = "knockwood-clone.json"
_SWEEP = "sweep.lock"
_STOP_SECONDS = 10.0
_SERVER_NAMES = frozenset({"postgres", "postmaster"})
_WRITING_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Record:
    """One clone: the folder that holds all of it, its socket folder, what it is for, and its owner."""

    id: str
    root: Path
    socket_directory: Path
    purpose: str
    owner: ProcessIdentity
    made_at: datetime

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "root": str(self.root),
            "socket_directory": str(self.socket_directory),
            "purpose": self.purpose,
            "owner": asdict(self.owner),
            "made_at": self.made_at.isoformat(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        owner = ProcessIdentity(int(value["owner"]["pid"]), float(value["owner"]["started"]))
        return cls(
            id=value["id"],
            root=Path(value["root"]),
            socket_directory=Path(value["socket_directory"]),
            purpose=value["purpose"],
            owner=owner,
            made_at=datetime.fromisoformat(value["made_at"]),
        )

    @property
    def data(self) -> Path:
        return self.root / "data"


class Entry:
    """A clone of this process in the registry, held until `close`."""

    def __init__(self, registry: Registry, record: Record, handle: int) -> None:
        self.record = record
        self._registry = registry
        self._handle = handle

    def close(self) -> None:
        """Strike the clone out; its folder is gone, or the user's from now on."""
        if self._handle >= 0:
            (self.record.root / _MARK).unlink(missing_ok=True)
            self._registry.strike(self.record.id)
            os.close(self._handle)
            self._handle = -1

    def remove(self) -> None:
        """Remove all that the clone left and strike it out; its server must be down."""
        if self._handle >= 0:
            remove(self.record)
            self.close()


class Registry:
    """The clones of one state folder."""

    def __init__(self, state: Path | None = None) -> None:
        self.folder = (state or state_folder()) / "clones"

    def enter(self, purpose: str, root: Path | None = None) -> Entry:
        """Write down a clone that is about to be made in `root`, or in a new folder of the registry's."""
        self._open_up()
        while True:
            id = f"{clock.stamp(clock.now())}-{secrets.token_hex(4)}"
            handle = self._lock(id)
            if handle is not None:
                break
        sockets = Path(tempfile.gettempdir()) / f"kw-{id[-8:]}"
        record = Record(
            id, (root or self.folder / id).absolute(), sockets, purpose, ProcessIdentity.own(), clock.now()
        )
        try:
            files.replace(self.folder / f"{id}.json", json.dumps(record.as_json(), indent=1).encode())
        except BaseException:
            os.close(handle)
            raise
        return Entry(self, record, handle)

    def records(self) -> list[Record]:
        """Every clone written down, oldest first. What cannot be read is passed over."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                found.append(Record.from_json(json.loads(path.read_text())))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def sweep(self) -> list[Record]:
        """Remove the clones whose owners are dead; returns them. Does nothing while another sweep runs."""
        if not self.folder.is_dir():
            return []
        try:
            with file_lock(self.folder / _SWEEP, "sweep"):
                swept = [record for record in self.records() if self._sweep_one(record)]
                self._tidy()
                return swept
        except LockHeldError:
            return []

    def strike(self, id: str) -> None:
        """Take a clone off the list."""
        (self.folder / f"{id}.json").unlink(missing_ok=True)
        (self.folder / f"{id}.lock").unlink(missing_ok=True)

    def _sweep_one(self, record: Record) -> bool:
        handle = self._lock(record.id)
        if handle is None:
            return False
        try:
            if record.owner.alive():
                return False
            stop_server(record.data)
            remove(record)
            self.strike(record.id)
            return True
        finally:
            os.close(handle)

    def _tidy(self) -> None:
        """Remove what processes left that died while they wrote a clone down."""
        for path in self.folder.glob("*.lock"):
            if path.name == _SWEEP or path.with_suffix(".json").exists():
                continue
            handle = self._lock(path.stem)
            if handle is not None:
                path.unlink(missing_ok=True)
                os.close(handle)
        for path in self.folder.glob(".tmp-*"):
            with suppress(FileNotFoundError):
                if clock.now().timestamp() - path.stat().st_mtime > _WRITING_SECONDS:
                    path.unlink()

    def _lock(self, id: str) -> int | None:
        """Hold a clone's lock: the handle to close, or None if somebody else has it."""
        path = self.folder / f"{id}.lock"
        with files.translated(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                    return handle
            except BlockingIOError:
                pass
            os.close(handle)
        return None

    def _open_up(self) -> None:
        # Root's servers run as another account, which has to pass through (not list) these folders.
        files.make_folder(self.folder, 0o711)
        if privileges.is_root():
            for folder in (self.folder, self.folder.parent):
                mode = stat.S_IMODE(folder.stat().st_mode)
                if mode & 0o111 != 0o111:
                    folder.chmod(mode | 0o111)


def sign(record: Record) -> None:
    """Sign the clone's folder as one that may be removed."""
    files.replace(record.root / _MARK, json.dumps({"id": record.id}).encode())


def remove(record: Record) -> None:
    """Remove a clone's folders. A folder that is not signed as this clone's is not ours, and stays.

    (A clone signs its folder before it writes anything else there, and removes the signature last.)
    """
    if record.socket_directory.name.startswith("kw-"):
        files.remove_tree(record.socket_directory)
    if record.root.is_dir() and (_signed(record) or not any(record.root.iterdir())):
        _remove_persistently(record)


def _signed(record: Record) -> bool:
    try:
        return bool(json.loads((record.root / _MARK).read_text())["id"] == record.id)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove_persistently(record: Record) -> None:
    # The children of a killed process end at once but not in the same instant: one may still write.
    # The signature goes last: half-removed, the folder must be known as a clone's.
    deadline = clock.monotonic() + _STOP_SECONDS
    while True:
        try:
            for entry in list(record.root.iterdir()):
                if entry.name == _MARK:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    files.remove_tree(entry)
                else:
                    entry.unlink(missing_ok=True)
            (record.root / _MARK).unlink(missing_ok=True)
            record.root.rmdir()
            return
        except FileNotFoundError:
            if not record.root.exists():
                return
        except OSError as error:
            if clock.monotonic() > deadline:
                raise HostError(f"cannot remove a clone: {error.strerror}", where=str(record.root)) from error
            clock.sleep(0.05)


def stop_server(data_directory: Path) -> None:
    """End the PostgreSQL processes that work in this very folder, the postmaster first.

    A process counts only if its current folder is `data_directory`, wherever its pid comes from.
    """
    found = others.working_in(data_directory, _SERVER_NAMES)
    try:
        pid = int((data_directory / "postmaster.pid").read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        pid = -1
    for process in found:
        if process.pid == pid:
            process.send_signal(signal.SIGQUIT)
    alive = others.wait_for(found, _STOP_SECONDS / 2)
    for process in alive:
        process.kill()
    others.wait_for(alive, _STOP_SECONDS / 2)
    if left := others.working_in(data_directory, _SERVER_NAMES):
        raise HostError(f"a server cannot be stopped (pid {left[0].pid})", where=str(data_directory))
