"""Packs: the files of a backup as plain tar archives, made of many zstd frames, encrypted if wanted.

Frames follow one another, so that `zstd -d` (after `age -d`) gives one tar archive. Each begins at a
known place of both the stored and the raw bytes: without encryption one relation's file is fetched
without reading the rest.

The members come in the caller's thread; worker threads check pages and compress, one frame each; a
thread per pack encrypts, hashes and stores. A fixed number of buffers goes round, which bounds memory.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from knockwood.postgres.pages import PAGE_BYTES
from knockwood.repository import age, codec
from knockwood.repository.backups.model import Pack
from knockwood.repository.backups.pagecheck import FileCheck, PageCheck, Piece
from knockwood.repository.backups.tar import TERMINATOR, Member
from knockwood.repository.repository import Repository

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACK_BYTES: Final = 64 << 20
"""Raw bytes after which a pack ends; a file of that size or more gets one of its own."""

FRAME_BYTES: Final = 4 << 20
_GROUP_BYTES: Final = 1 << 20
_STORING: Final = 3
"""Packs that are stored at the same time."""

NameOf = Callable[[int], str]


class _Lines(Protocol):
    """A text file, as far as it is needed here."""

    def write(self, text: str, /) -> int: ...


@dataclass(slots=True)
class _Frame:
    """Raw bytes to compress, and the pages to check in them."""

    buffer: bytearray
    used: int = 0
    pieces: list[tuple[Piece, int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Compressed:
    buffer: bytearray
    raw_bytes: int
    data: bytes


class _OpenPack:
    """A pack that a thread of its own stores while its frames are still being made."""

    def __init__(
        self, repository: Repository, name: str, number: int, free: queue.SimpleQueue[bytearray]
    ) -> None:
        self.number = number
        self.name = name + codec.suffix(repository.recipients)
        self.raw_bytes = 0
        self.members: list[dict[str, Any]] = []
        self.frames: list[tuple[int, int]] = []
        self.failure: BaseException | None = None
        self.stored: Pack | None = None
        self._repository = repository
        self._free = free
        self._frames: queue.SimpleQueue[Future[_Compressed] | BaseException | None] = queue.SimpleQueue()
        self._ended = False
        self._thread = threading.Thread(target=self._store, name=self.name, daemon=True)
        self._thread.start()

    def put(self, frame: Future[_Compressed]) -> None:
        self._frames.put(frame)

    def end(self, failure: BaseException | None = None) -> None:
        """No more frames; with a failure nothing is stored."""
        self._frames.put(failure)

    def wait(self) -> Pack:
        self._thread.join()
        if self.failure is not None:
            raise self.failure
        assert self.stored is not None
        return self.stored

    def join(self) -> None:
        self._thread.join()

    def _store(self) -> None:
        recipients = self._repository.recipients
        content = age.encrypt(self._compressed(), recipients) if recipients else self._compressed()
        try:
            counted = codec.Counted(content)
            self._repository.storage.put_new(self.name, counted)
            self.stored = Pack(self.name, counted.bytes, self.raw_bytes, counted.sha256)
        except BaseException as error:
            self.failure = error
            self._drain()

    def _compressed(self) -> Generator[bytes, None, None]:
        stored = raw = 0
        while (frame := self._next()) is not None:
            self.frames.append((stored, raw))
            stored += len(frame.data)
            raw += frame.raw_bytes
            yield frame.data
        self.raw_bytes = raw

    def _next(self) -> _Compressed | None:
        item = self._frames.get()
        self._ended = not isinstance(item, Future)
        if item is None:
            return None
        if isinstance(item, BaseException):
            raise item
        try:
            frame = item.result()
        except BaseException:
            self._free.put(bytearray(FRAME_BYTES))
            raise
        self._free.put(frame.buffer)
        return frame

    def _drain(self) -> None:
        # The buffers go back, or the thread that fills them would wait for ever instead of hearing of it.
        while not self._ended:
            with contextlib.suppress(BaseException):
                self._next()


class PackWriter:
    """Writes members into packs. Use as a context manager: leaving it with an error stores nothing more.

    `index` receives one JSON line per member, and after the members of a pack one for the pack.
    """

    def __init__(
        self,
        repository: Repository,
        name_of: NameOf,
        *,
        index: _Lines,
        check: PageCheck,
        level: int = 1,
        workers: int = 2,
        first: int = 0,
        step: int = 1,
    ) -> None:
        self._repository = repository
        self._name_of = name_of
        self._index = index
        self._check = check
        self._level = level
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="pack")
        self._local = threading.local()
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(workers + 4):
            self._free.put(bytearray(FRAME_BYTES))
        self._next, self._step = first, step
        self._storing: list[_OpenPack] = []
        self._done: list[Pack] = []
        self._pack: _OpenPack | None = None
        self._pack_raw = 0
        self._frame: _Frame | None = None
        self._file: FileCheck | None = None
        self._file_at = 0
        self._piece_start = 0
        self._piece_offset = 0
        self._limit = 0
        self.raw_bytes = 0

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            for pack in [*self._storing, *([self._pack] if self._pack else [])]:
                pack.end(error)
            for pack in [*self._storing, *([self._pack] if self._pack else [])]:
                pack.join()
        self._workers.shutdown()

    # --- in --------------------------------------------------------------------------------------

    def write(self, entries: Iterable[Member | memoryview]) -> None:
        """Add members, each file followed by its content in pieces."""
        current: Member | None = None
        for entry in entries:
            if isinstance(entry, Member):
                if current is not None:
                    self._end_member(current)
                self._begin_member(entry)
                current = entry
            else:
                self._content(entry)
        if current is not None:
            self._end_member(current)

    def finish(self) -> tuple[Pack, ...]:
        """End the last pack and wait until all are stored."""
        self._end_pack()
        for pack in self._storing:
            self._collect(pack)
        self._storing = []
        return tuple(sorted(self._done, key=lambda pack: pack.name))

    def _begin_member(self, member: Member) -> None:
        if self._pack is not None and self._pack_raw and self._pack_raw + member.size > PACK_BYTES:
            self._end_pack()
        if self._pack is None:
            self._begin_pack()
        frame = self._frame
        if frame is not None and frame.used and (frame.used >= _GROUP_BYTES or member.size >= _GROUP_BYTES):
            self._cut()
        self._raw(member.header())
        assert self._pack is not None
        line: dict[str, Any] = {"path": member.path, "kind": member.kind}
        line |= {"size": member.size, "mode": member.mode}
        if member.target:
            line["target"] = member.target
        self._pack.members.append(line | {"pack": self._pack.number, "offset": self._pack_raw})
        self._file = self._check.open(member)
        self._file_at = 0
        self._open_piece()

    def _open_piece(self) -> None:
        # A frame ends after a whole page of the file, so that each frame can be checked by itself.
        frame = self._need_frame()
        self._piece_start, self._piece_offset = frame.used, self._file_at
        self._limit = frame.used + (FRAME_BYTES - frame.used) // PAGE_BYTES * PAGE_BYTES

    def _content(self, view: memoryview) -> None:
        position, size = 0, len(view)
        while position < size:
            frame = self._frame
            if frame is None or frame.used >= self._limit:
                self._cut()
                self._open_piece()
                frame = self._need_frame()
            taken = min(size - position, self._limit - frame.used)
            frame.buffer[frame.used : frame.used + taken] = view[position : position + taken]
            frame.used += taken
            position += taken
            self._file_at += taken
            self._pack_raw += taken

    def _end_member(self, member: Member) -> None:
        self._close_piece()
        self._file = None
        if member.padding:
            self._raw(bytes(member.padding))

    def _raw(self, data: bytes) -> None:
        frame = self._need_frame()
        if frame.used + len(data) > FRAME_BYTES:
            self._cut()
            frame = self._need_frame()
        frame.buffer[frame.used : frame.used + len(data)] = data
        frame.used += len(data)
        self._pack_raw += len(data)

    # --- frames ----------------------------------------------------------------------------------

    def _need_frame(self) -> _Frame:
        if self._frame is None:
            self._frame = _Frame(self._free.get())
        return self._frame

    def _close_piece(self) -> None:
        frame = self._frame
        if self._file is None or frame is None or frame.used == self._piece_start:
            return
        start, end = self._piece_start, frame.used
        with memoryview(frame.buffer) as whole, whole[start:end] as content:
            piece = self._file.piece(content, self._piece_offset)
        if piece is not None:
            frame.pieces.append((piece, start, end))
        self._piece_start, self._piece_offset = frame.used, self._file_at

    def _cut(self) -> None:
        self._close_piece()
        frame, self._frame = self._frame, None
        if frame is None:
            return
        assert self._pack is not None
        self._pack.put(self._workers.submit(self._work, frame))
        self.raw_bytes += frame.used
        if self._pack.failure is not None:
            raise self._pack.failure

    def _work(self, frame: _Frame) -> _Compressed:
        with memoryview(frame.buffer) as whole:
            for piece, start, end in frame.pieces:
                self._check.check(piece, whole[start:end])
            compressor = self._compressor()
            data = compressor.compress(whole[: frame.used], zstd.ZstdCompressor.FLUSH_FRAME)
        return _Compressed(frame.buffer, frame.used, data)

    def _compressor(self) -> zstd.ZstdCompressor:
        found: zstd.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if found is None:
            parameter = zstd.CompressionParameter
            options: dict[int, int] = {parameter.compression_level: self._level, parameter.checksum_flag: 1}
            found = self._local.compressor = zstd.ZstdCompressor(options=options)
        return found

    # --- packs -----------------------------------------------------------------------------------

    def _begin_pack(self) -> None:
        self._pack = _OpenPack(self._repository, self._name_of(self._next), self._next, self._free)
        self._next += self._step
        self._pack_raw = 0

    def _end_pack(self) -> None:
        if self._pack is None:
            return
        self._raw(TERMINATOR)
        self._cut()
        self._pack.end()
        self._storing.append(self._pack)
        self._pack = None
        while len(self._storing) > _STORING:
            self._collect(self._storing[0])
            del self._storing[0]

    def _collect(self, pack: _OpenPack) -> None:
        self._done.append(pack.wait())
        for line in pack.members:
            self._index.write(json.dumps(line) + "\n")
        last = {"pack": pack.number, "name": pack.name, "members": len(pack.members), "frames": pack.frames}
        self._index.write(json.dumps(last) + "\n")
