"""Some blocks of a relation on a partial clone, where fetching all of it would cost what the table costs.

The file has its length and holes. Blocks that were fetched are right after replay, because every record that
names one is replayed. What else such a record names gets a *fence* first: an empty page from the future, which
redo leaves alone (`XLogReadBufferForRedo` skips a page whose LSN is not older than the record). PostgreSQL would
read a hole as an empty page, so each stretch that is not here begins with a *bar*, a page that nobody can read:
whoever scans the table meets an error, and only who asks for blocks that are here is answered.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from knockwood.host import files, privileges
from knockwood.host.privileges import Account
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES, checksums_at
from knockwood.repository.backups.partial import segment_name

_FUTURE: Final = 0xFFFF_FFFF
_EMPTY: Final = struct.Struct("<IIHHHHHHI")  # bufpage.h, PageHeaderData
_HEADER_BYTES: Final = 24
_LAYOUT: Final = PAGE_BYTES | 4
_NO_FLAGS: Final = 0xFFFF


Spot = tuple[str, int]
"""A fork (`""` for the main one, `"vm"`, `"fsm"`) and a block in it."""


@dataclass(slots=True)
class Piece:
    """The blocks of one relation's main fork (first segment at `path`) that a clone holds.

    `pages` is the fork's length in the backup. `joined` is what the WAL made whole on the way, with the place
    where it did, `fenced` what redo has to leave alone; neither is for readers.
    """

    path: str
    blocks: frozenset[int]
    pages: int
    joined: dict[Spot, int] = field(default_factory=dict)
    fenced: set[Spot] = field(default_factory=set)
    _fences: set[Spot] = field(default_factory=set)
    _bars: set[int] = field(default_factory=set)

    def holds(self, spot: Spot, lsn: int) -> bool:
        """Whether a record at `lsn` that names it is to be replayed."""
        return (spot[0] == "" and spot[1] in self.blocks) or self.joined.get(spot, lsn + 1) <= lsn

    def beside(self, spot: Spot, lsn: int, made_whole: bool) -> None:
        """A record that is replayed names this too, and brings all of it or only changes it."""
        if made_whole:
            self.joined[spot] = min(lsn, self.joined.get(spot, lsn))
        else:
            self.fenced.add(spot)

    def bars(self) -> list[int]:
        """The first block of each stretch of which nothing is here."""
        end, found = 0, []
        others = {block for fork, block in {*self.joined, *self.fenced} if fork == ""}
        for block in [*sorted({*self.blocks, *others}), self.pages]:
            if end < block:
                found.append(end)
            end = max(end, block + 1)
        return [block for block in found if block < self.pages]

    def make(self, data_directory: Path, content: Mapping[int, bytes], account: Account | None) -> None:
        """Write the relation's segments: what the backup has of the blocks, holes elsewhere."""
        _lengthen(data_directory, self.path, max([self.pages, *(block + 1 for block in content)]), account)
        _write(data_directory, self.path, content.items())

    def outgrows(self, data_directory: Path) -> bool:
        """Whether a fence that is not there yet lies beyond the end of its file."""
        return any(
            _length(data_directory, f"{self.path}_{fork}" if fork else self.path, block)
            <= block % SEGMENT_PAGES
            for fork, block in self.fenced - self._fences
        )

    def guard(self, data_directory: Path, account: Account | None) -> None:
        """Write the fences and bars that are not there yet; the server is down.

        Each once: what replay made of a block since is not touched again.
        """
        forks: dict[str, list[int]] = {}
        for fork, block in sorted(self.fenced - self._fences):
            forks.setdefault(fork, []).append(block)
        for fork, blocks in forks.items():
            path = f"{self.path}_{fork}" if fork else self.path
            _lengthen(data_directory, path, blocks[-1] + 1, account)
            _write(data_directory, path, fences(blocks))
        bars = [block for block in self.bars() if block not in self._bars]
        _write(data_directory, self.path, ((block, bar()) for block in bars))
        self._fences.update(self.fenced)
        self._bars.update(bars)


def _length(data_directory: Path, path: str, block: int) -> int:
    """How many pages the segment has that a block belongs to."""
    try:
        return (data_directory / segment_name(path, block // SEGMENT_PAGES)).stat().st_size // PAGE_BYTES
    except FileNotFoundError:
        return 0


def _lengthen(data_directory: Path, path: str, pages: int, account: Account | None) -> None:
    """Make a fork's segments at least so long; what is new is a hole."""
    for segment in range((max(pages, 1) - 1) // SEGMENT_PAGES + 1):
        target = data_directory / segment_name(path, segment)
        length = min(pages - segment * SEGMENT_PAGES, SEGMENT_PAGES) * PAGE_BYTES
        with files.translated(target):
            handle = os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(handle).st_size < length:
                    os.ftruncate(handle, length)
            finally:
                os.close(handle)
            privileges.give(target, account)


def stub(data_directory: Path, path: str, first: bytes, account: Account | None) -> None:
    """An index of which the planner can read the metapage, and nobody anything else."""
    target = data_directory / path
    with files.translated(target):
        target.write_bytes(first + bar())
        target.chmod(0o600)
    privileges.give(target, account)


def fences(blocks: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """For each block an empty page newer than any record."""
    page = bytearray(PAGE_BYTES)
    _EMPTY.pack_into(page, 0, _FUTURE, _FUTURE, 0, 0, _HEADER_BYTES, PAGE_BYTES, PAGE_BYTES, _LAYOUT, 0)
    content = bytes(page)
    for block, checksum in zip(blocks, checksums_at(content, blocks), strict=True):
        yield block, content[:8] + checksum.to_bytes(2, "little") + content[10:]


def bar() -> bytes:
    """A page whose header PostgreSQL refuses, with checksums or without."""
    page = bytearray(b"\xff" * PAGE_BYTES)
    _EMPTY.pack_into(page, 0, 0, 1, 0, _NO_FLAGS, PAGE_BYTES, _HEADER_BYTES, PAGE_BYTES, _LAYOUT, 0)
    return bytes(page)


def _write(data_directory: Path, path: str, pages: Iterable[tuple[int, bytes]]) -> None:
    for segment, some in _by_segment(pages):
        target = data_directory / segment_name(path, segment)
        with files.translated(target):
            handle = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for within, page in some:
                    os.pwrite(handle, page, within * PAGE_BYTES)
            finally:
                os.close(handle)


def _by_segment(pages: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, list[tuple[int, bytes]]]]:
    found: dict[int, list[tuple[int, bytes]]] = {}
    for block, page in pages:
        found.setdefault(block // SEGMENT_PAGES, []).append((block % SEGMENT_PAGES, page))
    yield from found.items()
