"""PostgreSQL's pages in bulk: checksums, headers, and which of many pages are bad."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from knockwood.host.files import Chunk
from knockwood.model import Lsn

PAGE_BYTES = 8192
SEGMENT_PAGES = 131072
"""Pages in one file of a relation (1 GB); the next go to `<file>.1`."""

_HEADER_BYTES = 24
_WORDS = 32
_ROWS = PAGE_BYTES // 4 // _WORDS
_BATCH = 512  # 4 MB of pages: less spends its time between numpy calls, more falls out of the caches
_PRIME = np.uint32(16777619)
_SHIFT = np.uint32(17)
_VALID_FLAGS = 0x0007
_VERSION = 4
_BIG = 1 << 20

# src/include/storage/checksum_impl.h, checksumBaseOffsets
_BASES = np.array(
    (
        *(0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C),
        *(0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB),
        *(0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4),
        *(0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756),
    ),
    dtype=np.uint32,
)

_HEADER = np.dtype(
    [
        ("lsn_high", "<u4"),
        ("lsn_low", "<u4"),
        ("checksum", "<u2"),
        ("flags", "<u2"),
        ("lower", "<u2"),
        ("upper", "<u2"),
        ("special", "<u2"),
        ("size_version", "<u2"),
        ("prune_xid", "<u4"),
    ]
)


@dataclass(frozen=True, slots=True)
class PageHeader:
    """The fixed part of a page's header; offsets in bytes from the start of the page."""

    lsn: Lsn
    checksum: int
    flags: int
    lower: int
    upper: int
    special: int
    page_bytes: int
    version: int
    prune_xid: int

    @property
    def new(self) -> bool:
        """What PostgreSQL calls a new page: never initialised, legal only if all of it is zero."""
        return self.upper == 0

    def flaw(self) -> str | None:
        """What makes the header impossible, or None."""
        if self.page_bytes != PAGE_BYTES or self.version != _VERSION:
            return f"page header: size {self.page_bytes}, layout {self.version}"
        if self.flags & ~_VALID_FLAGS:
            return f"page header: unknown flags {self.flags:#06x}"
        if not _HEADER_BYTES <= self.lower <= self.upper <= self.special <= PAGE_BYTES or self.special % 8:
            return f"page header: impossible bounds {self.lower}, {self.upper}, {self.special}"
        return None


_MODULUS: Final = 65535


def decode_header(page: Chunk) -> PageHeader:
    """The header of the page at the start of `page`."""
    row = np.frombuffer(page, _HEADER, 1)[0]
    size_version = int(row["size_version"])
    return PageHeader(
        lsn=Lsn((int(row["lsn_high"]) << 32) | int(row["lsn_low"])),
        checksum=int(row["checksum"]),
        flags=int(row["flags"]),
        lower=int(row["lower"]),
        upper=int(row["upper"]),
        special=int(row["special"]),
        page_bytes=size_version & 0xFF00,
        version=size_version & 0x00FF,
        prune_xid=int(row["prune_xid"]),
    )


def has_items(page: Chunk) -> bool:
    """Whether a heap page has line pointers in use (storage/itemid.h); False where its header is none."""
    header = decode_header(page)
    if header.flaw() is not None:
        return False
    items = np.frombuffer(page, "<u4", max(header.lower - _HEADER_BYTES, 0) // 4, _HEADER_BYTES)
    return bool((items >> 15 & 3).any())


def checksums(buffer: Chunk, first_block: int = 0) -> NDArray[np.uint16]:
    """The checksum each page of `buffer` should have, as blocks `first_block` and following.

    The algorithm is PostgreSQL's (checksum_impl.h): 32 FNV-1a sums in parallel, two rounds of zeros,
    folded by XOR, mixed with the block number. The checksum field itself counts as zero. Raises
    ValueError unless `buffer` is whole pages.
    """
    pages = _pages(buffer)
    blocks = np.arange(first_block, first_block + len(pages), dtype=np.uint64).astype(np.uint32)
    return checksums_of(pages, blocks)


def checksums_of(pages: NDArray[np.uint32], blocks: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """The same for pages (shape n, 64, 32) at the given block numbers (shape n)."""
    result = np.empty(len(pages), np.uint16)
    for start in range(0, len(pages), _BATCH):
        batch = pages[start : start + _BATCH]
        sums = _sums(batch)
        folded = np.bitwise_xor.reduce(sums, axis=1) ^ blocks[start : start + _BATCH]
        result[start : start + _BATCH] = folded % np.uint32(65535) + np.uint32(1)
    return result


def checksums_at(page: Chunk, blocks: Sequence[int]) -> list[int]:
    """The checksums that one page should have at each of some block numbers."""
    folded = np.bitwise_xor.reduce(_sums(_pages(page)[:1]), axis=1)
    found: list[int] = ((folded ^ np.array(blocks, np.uint32)) % np.uint32(65535) + np.uint32(1)).tolist()
    return found


def fitting_blocks(page: Chunk, count: int) -> list[int]:
    """The block numbers below `count` at which the page's stored checksum would be right.

    A page that was written to the wrong place still carries the checksum of the right one. By chance one
    number in 65536 fits any page.
    """
    stored = decode_header(page).checksum
    if not stored:
        return []  # no checksum is ever 0
    folded = int(np.bitwise_xor.reduce(_sums(_pages(page)[:1]), axis=1)[0])
    # Numbers below `count` differ from each other in their low bits only, and what gives this checksum is known,
    # so that a table's length costs little: see `checksums_of`.
    span = 1 << max(count - 1, 0).bit_length()
    low = folded & -span
    first = low + (stored - 1 - low) % _MODULUS
    return sorted(block for mixed in range(first, low + span, _MODULUS) if (block := mixed ^ folded) < count)


def sealed(page: Chunk, block: int) -> bytes:
    """The page with the checksum that belongs to its content and block number."""
    whole = bytearray(page)
    whole[8:10] = int(checksums(whole, block)[0]).to_bytes(2, "little")
    return bytes(whole)


def _sums(batch: NDArray[np.uint32]) -> NDArray[np.uint32]:
    sums = np.empty((len(batch), _WORDS), np.uint32)
    mixed = np.empty_like(sums)
    first = batch[:, 0, :].copy()
    first[:, 2] &= np.uint32(0xFFFF0000)
    np.bitwise_xor(first, _BASES, out=mixed)
    for row in range(_ROWS + 2):
        np.multiply(mixed, _PRIME, out=sums)
        np.right_shift(mixed, _SHIFT, out=mixed)
        np.bitwise_xor(sums, mixed, out=sums)
        if row < _ROWS - 1:
            np.bitwise_xor(sums, batch[:, row + 1, :], out=mixed)
        else:
            np.copyto(mixed, sums)
    return sums


def bad_pages(buffer: Chunk, first_block: int, checksums: bool) -> list[tuple[int, str]]:
    """The pages of `buffer` that PostgreSQL would not accept, as (block number, reason).

    `buffer` holds whole pages, the first of them block `first_block` of the relation's fork. An
    all-zero page is legal. Without `checksums` only the headers are looked at. A page read while the
    server writes it may look bad: read it again before believing this.
    """
    count = len(memoryview(buffer)) // PAGE_BYTES
    return bad_blocks(buffer, np.arange(first_block, first_block + count, dtype=np.int64), checksums)


def bad_blocks(buffer: Chunk, blocks: NDArray[np.int64], checksums: bool) -> list[tuple[int, str]]:
    """The same for pages that do not follow one another: `blocks` holds their block numbers."""
    pages = _pages(buffer)
    if len(pages) == 0:
        return []
    headers = np.frombuffer(buffer, np.uint8).reshape(-1, PAGE_BYTES)[:, :_HEADER_BYTES]
    fields = np.ascontiguousarray(headers).view(_HEADER).reshape(-1)
    good = _headers_hold(fields)
    expected = checksums_of(pages, blocks.astype(np.uint32)) if checksums else None
    if expected is not None:
        good &= fields["checksum"] == expected
    found = []
    for index in np.flatnonzero(~good):
        reason = _reason(buffer, pages, int(index), None if expected is None else int(expected[index]))
        if reason is not None:
            found.append((int(blocks[index]), reason))
    return found


def _headers_hold(fields: NDArray[np.void]) -> NDArray[np.bool_]:
    lower, upper, special = fields["lower"], fields["upper"], fields["special"]
    good: NDArray[np.bool_] = (lower >= _HEADER_BYTES) & (lower <= upper) & (upper <= special)
    good &= (special <= PAGE_BYTES) & (special % 8 == 0) & (fields["flags"] & ~np.uint16(_VALID_FLAGS) == 0)
    good &= fields["size_version"] == PAGE_BYTES | _VERSION
    return good


def _reason(buffer: Chunk, pages: NDArray[np.uint32], index: int, expected: int | None) -> str | None:
    if not pages[index].any():
        return None
    header = decode_header(memoryview(buffer)[index * PAGE_BYTES : index * PAGE_BYTES + _HEADER_BYTES])
    if expected is not None and header.checksum != expected and not header.new:
        return f"checksum {header.checksum:#06x} stored, {expected:#06x} computed"
    if header.new:
        return "page header: zero, the rest is not"
    return header.flaw()


def _pages(buffer: Chunk) -> NDArray[np.uint32]:
    size = len(memoryview(buffer))
    if size % PAGE_BYTES:
        raise ValueError(f"{size} bytes are not whole pages")
    return np.frombuffer(buffer, "<u4").reshape(-1, _ROWS, _WORDS)


_RELATION_FILE = re.compile(
    r"(?P<folder>base/\d+|global|pg_tblspc/\d+/PG_[^/]+/\d+)/(?P<incremental>INCREMENTAL\.)?"
    r"(?P<node>\d+)(?:_(?P<fork>fsm|vm|init))?(?:\.(?P<segment>\d+))?\Z"
)


@dataclass(frozen=True, slots=True)
class RelationFile:
    """A file of pages: which relation, fork and segment, and where it lies in the data directory."""

    path: str
    node: int
    fork: str
    segment: int
    incremental: bool

    @property
    def first_block(self) -> int:
        """The block number, within the fork, of the file's first page."""
        return self.segment * SEGMENT_PAGES

    @property
    def relation_path(self) -> str:
        """The path of the fork's first segment, without the mark of an incremental backup."""
        folder = self.path.rsplit("/", 1)[0]
        return f"{folder}/{self.node}" + (f"_{self.fork}" if self.fork != "main" else "")

    @property
    def server_path(self) -> str:
        """The path of this segment on the server."""
        return self.relation_path + (f".{self.segment}" if self.segment else "")


def relation_file(path: str) -> RelationFile | None:
    """What `path` (relative to the data directory) is, if it is a permanent relation's file."""
    match = _RELATION_FILE.match(path)
    if match is None:
        return None
    return RelationFile(
        path=path,
        node=int(match["node"]),
        fork=match["fork"] or "main",
        segment=int(match["segment"] or 0),
        incremental=match["incremental"] is not None,
    )


INCREMENTAL_HEAD_BYTES: Final = 12
_INCREMENTAL_MAGIC: Final = 0xD3AE1F0D


@dataclass(frozen=True, slots=True)
class IncrementalHead:
    """The beginning of a file `INCREMENTAL.*`: how many blocks it holds, and the file's length in blocks.

    Their numbers follow, 4 bytes each, zeros up to a whole page if there are any, then the pages
    (src/include/backup/basebackup_incremental.h).
    """

    blocks: int
    length: int

    @property
    def bytes(self) -> int:
        """What comes before the zeros."""
        return INCREMENTAL_HEAD_BYTES + 4 * self.blocks


def incremental_head(data: Chunk) -> IncrementalHead | None:
    """Decode it; None if it is none, or too short."""
    if len(data) < INCREMENTAL_HEAD_BYTES:
        return None
    magic, blocks, length = struct.unpack_from("<III", data)
    return IncrementalHead(blocks, length) if magic == _INCREMENTAL_MAGIC else None
