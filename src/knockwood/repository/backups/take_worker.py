"""One worker process of a backup: reads whole files, checks, compresses, encrypts and stores them.

Its parent runs `main` in a new interpreter and writes lines of JSON to the standard
input: the job, then lists of paths, at last null. It answers in lines whose first letter says what
they are: i a line of the index of members, m one of the manifest, s a page that failed, c (control) how
far it is, that it wants more, its end, or its failure. If the input ends before the work, the parent
is dead and the worker ends at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knockwood.errors import InternalError, KnockwoodError
from knockwood.host import files
from knockwood.repository.backups.packs import PackWriter
from knockwood.repository.backups.pagecheck import PageCheck
from knockwood.repository.backups.take_manifest import manifest_entry
from knockwood.repository.backups.tar import Member
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage

PARENT_GONE = 125
_READ_BYTES = 1 << 20
_TELL_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is told first. Its packs are numbered `first`, `first + step` and so on."""

    storage: str
    recipients: tuple[str, ...]
    data_directory: str
    folder: str
    first: int
    step: int
    level: int
    checksums: bool
    block_bytes: int
    digests: bool


class FileReader:
    """Reads files of the data directory as members: whole, with the size each has when it is opened.

    A file that grows is cut there and one that shrinks is filled up with zeros, as the server does: the
    WAL of the backup makes both right. One that is gone is left out.
    """

    def __init__(self, root: Path, *, digests: bool) -> None:
        self.root = root
        self.bytes = 0
        self._digests = digests
        self._buffer = memoryview(bytearray(_READ_BYTES))

    def read(self, path: str) -> Iterator[Member | memoryview | str]:
        """The member, its content in pieces (each valid until the next), at last its line of the manifest."""
        with files.translated(self.root / path):
            try:
                handle = os.open(self.root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                return
        try:
            status = os.fstat(handle)
            mode, mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
            yield Member(path, status.st_size, mode, mtime)
            digest = hashlib.sha256() if self._digests else None
            for piece in self._content(handle, status.st_size, path):
                if digest is not None:
                    digest.update(piece)
                yield piece
        finally:
            os.close(handle)
        checksum = ("SHA256", digest.hexdigest()) if digest is not None else None
        yield manifest_entry(path, status.st_size, mtime, checksum)

    def _content(self, handle: int, size: int, path: str) -> Iterator[memoryview]:
        at = 0
        zeros = False
        while at < size:
            wanted = self._buffer[: min(size - at, _READ_BYTES)]
            with files.translated(self.root / path):
                count = 0 if zeros else os.preadv(handle, [wanted], at)
            if count == 0:
                # Zeros to the end, even if it grows again: what was between is not what lay there.
                zeros, count = True, len(wanted)
                wanted[:] = bytes(count)
            at += count
            self.bytes += count
            yield wanted[:count]


class _Lines:
    """The standard output; `write` takes lines of the index, as a text file would."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def write(self, text: str, /) -> int:
        self.send("i", text)
        return len(text)

    def send(self, kind: str, text: str) -> None:
        data = memoryview(f"{kind}{text.rstrip()}\n".encode())
        while data:
            data = data[os.write(self._handle, data) :]

    def control(self, **message: Any) -> None:
        self.send("c", json.dumps(message))


class _Orders:
    """The lines from the parent, read by a thread that notices its death at once."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def _read(self) -> None:
        held = bytearray()
        while data := os.read(0, 1 << 16):
            held += data
            *whole, rest = held.split(b"\n")
            held = bytearray(rest)
            for line in whole:
                self._lines.put(json.loads(line))
        os._exit(PARENT_GONE)

    def job(self) -> Job:
        value: Mapping[str, Any] = self._lines.get()
        return Job(**{**value, "recipients": tuple(value["recipients"])})

    def batches(self) -> Iterator[list[str]]:
        while (batch := self._lines.get()) is not None:
            yield batch


def _entries(orders: _Orders, reader: FileReader, out: _Lines) -> Iterator[Member | memoryview]:
    told = 0
    for batch in orders.batches():
        for path in batch:
            for entry in reader.read(path):
                if isinstance(entry, str):
                    out.send("m", entry)
                    continue
                yield entry
                if reader.bytes - told >= _TELL_BYTES:
                    out.control(read=reader.bytes, path=path)
                    told = reader.bytes
        out.control(read=reader.bytes, path=batch[-1], more=True)


@contextmanager
def _may_be_ended() -> Iterator[None]:
    """Let SIGTERM end the work in the block, once: a second one must not break off what cleans up after it."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _work(orders: _Orders, out: _Lines) -> None:
    job = orders.job()
    repository = Repository.open(open_storage(job.storage), recipients=job.recipients)
    check = PageCheck(job.checksums, block_bytes=job.block_bytes)
    reader = FileReader(Path(job.data_directory), digests=job.digests)
    packer = PackWriter(
        repository,
        lambda number: f"{job.folder}pack-{number:05d}.tar",
        index=out,
        check=check,
        level=job.level,
        workers=2,
        first=job.first,
        step=job.step,
    )
    with packer as writer, _may_be_ended():
        writer.write(_entries(orders, reader, out))
        packs = writer.finish()
    for one in check.suspects:
        out.send("s", json.dumps([one.file, one.block, one.reason, one.lsn.value]))
    out.control(packs=[pack.as_json() for pack in packs], overflow=check.overflow, pages=check.pages)


def main() -> None:
    out = _Lines(1)
    try:
        _work(_Orders(), out)
    except BaseException as error:
        told = error if isinstance(error, KnockwoodError) else InternalError(f"a worker failed: {error!r}")
        with suppress(OSError):  # nobody may listen any more
            out.control(failed=type(told).__name__, what=told.what, where=told.where, hint=told.hint)
    finally:
        # The thread that waits for orders would hold up an ordinary end.
        os._exit(0)
