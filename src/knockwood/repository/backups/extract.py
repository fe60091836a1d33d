"""Packs back into files: frames unpacked by several threads, each object checked against its sha256."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from knockwood.errors import KnockwoodError, ObjectDamagedError
from knockwood.host import files, privileges
from knockwood.host.privileges import Account
from knockwood.repository import age, codec
from knockwood.repository.backups.listing import StoredPack
from knockwood.repository.backups.model import Pack
from knockwood.repository.backups.tar import Member, read_tar
from knockwood.repository.repository import Repository

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CONTROL_FILE = "global/pg_control"
INCOMPLETE = ".incomplete"
_AHEAD = 6
_MAX_FRAME = 64 << 20
"""No frame is larger; what claims to be is damage, not a reason to take all memory."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a backup's files go: the data directory, and a folder per tablespace oid."""

    root: Path
    tablespaces: Mapping[int, Path] = field(default_factory=dict)

    def place(self, path: str) -> Path:
        """The file a member becomes; raises ObjectDamagedError for a path that leads outside."""
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts:
            raise ObjectDamagedError("a member of the backup leads outside the data directory", where=path)
        if parts[0] == "pg_tblspc" and len(parts) > 1 and parts[1].isdecimal():
            place = self.tablespaces.get(int(parts[1]))
            if place is not None:  # else it is one that lies in the data directory itself
                return place.joinpath(*parts[2:])
        return self.root.joinpath(*parts)


class Extractor:
    """Writes members to disk for one restore; `write` may run in several threads, one per pack.

    Folders get mode 0700, files 0600, both the account as owner. The control file gets the ending
    `.incomplete`, so that what a killed restore leaves cannot be started. With `flushing` what is written
    goes to the disk at once, so that whoever makes it durable later waits for little.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        account: Account | None,
        hold_control_file: bool,
        on_bytes: Callable[[int, str], None] | None = None,
        skip: Callable[[str], bool] = lambda path: False,
        flushing: bool = False,
    ) -> None:
        self.layout = layout
        self._account = account
        self._hold = hold_control_file
        self._on_bytes = on_bytes
        self._skip = skip
        self._flushing = flushing
        self._made: set[Path] = set()
        self._lock = threading.Lock()

    def write(self, raw: Iterable[bytes]) -> int:
        """Write the members of a raw tar archive; how many there were."""
        count = 0
        handle: int | None = None
        at = 0
        path = ""
        try:
            for entry in read_tar(raw, terminated=True):
                if isinstance(entry, Member):
                    if handle is not None:
                        os.close(handle)
                        handle = None
                    count += 1
                    path, at = entry.path, 0
                    handle = self.open(entry)
                elif handle is not None:
                    _write_all(handle, entry)
                    if self._flushing:
                        files.begin_flush(handle, at, len(entry))
                    at += len(entry)
                if not isinstance(entry, Member):
                    self.wrote(len(entry), path)
        finally:
            if handle is not None:
                os.close(handle)
        return count

    def open(self, member: Member) -> int | None:
        """Make what a member becomes; the handle to write a file's content to, None where there is none."""
        if self._skip(member.path):
            return None
        target = self.layout.place(member.path)
        if member.kind == "folder":
            self.folder(target)
            return None
        if member.kind == "link":
            if member.path.startswith("pg_tblspc/"):
                return None  # made anew, to where the tablespace lies now
            raise ObjectDamagedError("a symbolic link where a backup has none", where=member.path)
        if self._hold and member.path == CONTROL_FILE:
            target = target.with_name(target.name + INCOMPLETE)
        self.folder(target.parent)
        return create(target, self._account)

    def wrote(self, count: int, path: str) -> None:
        """Tell that so many bytes of a member were written."""
        if self._on_bytes is not None:
            self._on_bytes(count, path)

    def folder(self, path: Path) -> None:
        """Make a folder and its parents up to the layout's own."""
        if path in self._made:
            return
        with self._lock:
            missing = []
            step = path
            while step not in self._made and not step.exists():
                missing.append(step)
                step = step.parent
            for one in reversed(missing):
                one.mkdir(mode=0o700)
                privileges.give(one, self._account)
            self._made.add(path)


def create(path: Path, account: Account | None) -> int:
    """Open a file that must not exist yet, owned by the account; the handle."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    if account is not None:
        os.fchown(handle, account.uid, account.gid)
    return handle


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


def extract_pack(
    repository: Repository, pack: Pack, stored: StoredPack, extractor: Extractor, pool: ThreadPoolExecutor
) -> None:
    """Write the files of a pack. Raises ObjectMissingError, ObjectDamagedError, WrongKeyError, naming it."""
    where = f"{repository.storage.url}/{pack.name}"
    counted = codec.Counted(repository.storage.read(pack.name))
    try:
        with files.translated(extractor.layout.root):
            count = extractor.write(_raw(repository, pack, stored, counted, pool))
        if count != stored.members:
            raise ObjectDamagedError(f"{count} members, recorded are {stored.members}")
        for _ in counted:
            pass
    except ObjectDamagedError as error:
        raise ObjectDamagedError(_damage(error, counted, pack), where=where, hint=_HINT) from error
    except KnockwoodError as error:
        error.where = error.where or where
        raise
    if counted.bytes != pack.bytes or counted.sha256 != pack.sha256:
        raise ObjectDamagedError(
            f"{counted.bytes} stored bytes whose sha256 is not the recorded one", where=where, hint=_HINT
        )


_HINT = "use another backup, and look at the disk that holds the repository"


def _damage(error: ObjectDamagedError, counted: codec.Counted, pack: Pack) -> str:
    place = f" ({error.where})" if error.where and error.where != pack.name else ""
    if counted.bytes < pack.bytes and "cut short" in error.what:
        return f"{error.what}: {counted.bytes} bytes, recorded are {pack.bytes}{place}"
    return error.what + place


def _raw(
    repository: Repository,
    pack: Pack,
    stored: StoredPack,
    chunks: codec.Counted,
    pool: ThreadPoolExecutor,
) -> Iterator[bytes]:
    compressed: Iterable[bytes] = (bytes(chunk) for chunk in chunks)
    if pack.name.endswith(codec.ENCRYPTED_SUFFIX):
        compressed = age.decrypt(compressed, repository.identities)
    ahead: deque[Future[bytes]] = deque()
    try:
        for frame in cut(compressed, [start for start, _ in stored.frames]):
            ahead.append(pool.submit(unpack_frame, frame))
            if len(ahead) >= _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def cut(chunks: Iterable[bytes], starts: list[int]) -> Iterator[bytes]:
    """Cut a stream at the given places (ascending, the first 0) into frames; the last ends with it."""
    held = bytearray()
    begin = 0
    pending = deque(starts[1:])
    for chunk in chunks:
        held += chunk
        while pending and len(held) >= pending[0] - begin:
            size = pending.popleft() - begin
            yield bytes(held[:size])
            del held[:size]
            begin += size
        if len(held) > _MAX_FRAME:
            raise ObjectDamagedError("more stored bytes than its frames have")
    if pending:
        raise ObjectDamagedError("compressed content is cut short")
    yield bytes(held)


def unpack_frame(frame: bytes) -> bytes:
    """The content of exactly one zstd frame; raises ObjectDamagedError."""
    decompressor = zstd.ZstdDecompressor()
    try:
        data = decompressor.decompress(frame, _MAX_FRAME)
    except zstd.ZstdError as error:
        raise ObjectDamagedError(f"not valid zstd: {error}".lower()) from error
    if not decompressor.eof:
        raise ObjectDamagedError("compressed content is cut short")
    if decompressor.unused_data:
        raise ObjectDamagedError("more stored bytes than its frames have")
    return data
