"""A local folder as storage: every object complete and durable before its name appears."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from knockwood.errors import HostError, ObjectExistsError, ObjectMissingError
from knockwood.host import files
from knockwood.host.files import Chunk
from knockwood.repository.storage.base import ObjectInfo
from knockwood.repository.storage.names import checked, checked_prefix

_LEFTOVER_SECONDS: Final = 24 * 3600
"""An unfinished write that nobody added to for so long belongs to a process that was killed."""

_ABSENT: Final = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""How the system says that there is no file of that name."""


class LocalStorage:
    """Objects as files below `root`, which is made by the first write.

    The file system must know hard links, or renames that do not replace.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._durable: set[Path] = set()

    def __repr__(self) -> str:
        return f"LocalStorage({str(self.root)!r})"

    @property
    def url(self) -> str:
        return str(self.root)

    def put_new(self, name: str, chunks: Iterable[Chunk]) -> int:
        path = self._path(name)
        with files.translated(path):
            exists = path.is_file()
        if exists:
            # Whoever wrote it may have been killed before its name was durable, and our caller may
            # take "already stored" for leave to drop the original.
            self._make_durable(path.parent, again=True)
            raise ObjectExistsError("already stored", where=str(path))
        files.make_folder(path.parent)
        self._make_durable(path.parent)
        return files.write_new(path, chunks)

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        path = self._path(name)
        try:
            with files.translated(path):
                yield from files.read_chunks(path, start=start, end=end)
        except HostError as error:
            if isinstance(error.__cause__, _ABSENT):
                raise ObjectMissingError("no such object", where=str(path)) from error
            raise

    def info(self, name: str) -> ObjectInfo | None:
        path = self._path(name)
        with files.translated(path):
            return _info(name, path)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """As promised by Storage; leftovers of killed writers that are older than a day are removed."""
        folder = checked_prefix(prefix).rpartition("/")[0]
        yield from self._walk(self.root / folder, f"{folder}/" if folder else "", prefix)

    def _walk(self, folder: Path, above: str, prefix: str) -> Iterator[ObjectInfo]:
        with files.translated(folder):
            try:
                # A folder sorts as its name with the slash: `a.json` comes before `a/b`.
                entries = sorted(
                    (entry.name + "/" if entry.is_dir() else entry.name) for entry in folder.iterdir()
                )
            except _ABSENT:
                return
        for entry in entries:
            name = above + entry
            if entry.startswith("."):
                _sweep(folder / entry)
            elif entry.endswith("/"):
                if name.startswith(prefix) or prefix.startswith(name):
                    yield from self._walk(folder / entry, name, prefix)
            elif name.startswith(prefix):
                with files.translated(folder / entry):
                    found = _info(name, folder / entry)
                if found is not None:
                    yield found

    def delete(self, name: str) -> None:
        path = self._path(name)
        with files.translated(path):
            try:
                path.unlink()
            except _ABSENT:
                return
            files.fsync_file(path.parent)

    def _path(self, name: str) -> Path:
        return self.root / checked(name)

    def _make_durable(self, folder: Path, *, again: bool = False) -> None:
        # A folder that is there may have been made by a process that was killed before it was durable.
        if folder in self._durable and not again:
            return
        with files.translated(folder):
            for step in (folder, *folder.parents):
                files.fsync_file(step)
                if step == self.root:
                    break
            files.fsync_file(self.root.parent)
        self._durable.add(folder)


def _info(name: str, path: Path) -> ObjectInfo | None:
    try:
        status = path.stat()
    except _ABSENT:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return ObjectInfo(name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _sweep(path: Path) -> None:
    if not path.name.startswith(".tmp-"):
        return
    try:
        if time.time() - path.lstat().st_mtime > _LEFTOVER_SECONDS:
            path.unlink()
    except OSError:
        # Gone already, or not ours to remove: it does no harm.
        return
