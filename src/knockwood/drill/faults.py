"""Damage, made on purpose, in the files of a stopped server. For drills and tests only.

Each function changes one thing and returns a Change that holds what was there and what is there now,
so that whoever injected it knows the truth. A running server would answer from its buffers or write over
the damage: use `offline`, which stops the server (its buffers go to disk) and starts it again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from knockwood.errors import HostError
from knockwood.postgres.pages import checksums
from knockwood.postgres.server import LocalServer

BLOCK: Final = 8192
SEGMENT_BLOCKS: Final = 131072

_XACTS_PER_SEGMENT: Final = 32 * BLOCK * 4
_VM_HEAP_BLOCKS: Final = (BLOCK - 24) * 4


@dataclass(frozen=True, slots=True)
class Change:
    """What a fault did: `before` became `after` at `offset` bytes of the file `path` (relative to the data
    directory). `block` counts from the start of the fork. A file that is gone has no `after`."""

    kind: str
    path: str
    block: int | None
    offset: int
    before: bytes
    after: bytes | None


@contextmanager
def offline(server: LocalServer) -> Iterator[Path]:
    """The data directory while the server is stopped cleanly; it is started again afterwards."""
    server.stop("fast")
    yield server.data_directory
    server.start()


def read_block(data_directory: Path, path: str, block: int) -> bytes:
    """A block's image on disk, to be brought back later by `stale_block`."""
    file, offset = _place(path, block)
    image = _read(data_directory / file, offset, BLOCK)
    if len(image) != BLOCK:
        raise HostError(f"the file has no block {block}", where=file)
    return image


def bit_flip(data_directory: Path, path: str, block: int, offset: int = 8000, bit: int = 3) -> Change:
    """One bit flips on disk; the page checksum no longer fits."""
    page = bytearray(read_block(data_directory, path, block))
    page[offset] ^= 1 << bit
    return _write_block(data_directory, "bit_flip", path, block, bytes(page))


def flip_before_checksum(data_directory: Path, path: str, block: int, offset: int, bit: int = 3) -> Change:
    """One bit flipped in memory before the checksum was made: the page is valid and its content wrong."""
    page = bytearray(read_block(data_directory, path, block))
    page[offset] ^= 1 << bit
    return _write_block(data_directory, "flip_before_checksum", path, block, sealed(page, block))


def zero_block(data_directory: Path, path: str, block: int) -> Change:
    """A block becomes all zeros, which PostgreSQL takes for a new page."""
    read_block(data_directory, path, block)
    return _write_block(data_directory, "zero_block", path, block, bytes(BLOCK))


def torn_block(data_directory: Path, path: str, block: int, image: bytes) -> Change:
    """A torn write: the second half of the page is that of another image (of `read_block`)."""
    page = read_block(data_directory, path, block)
    return _write_block(data_directory, "torn_block", path, block, page[: BLOCK // 2] + image[BLOCK // 2 :])


def stale_block(data_directory: Path, path: str, block: int, image: bytes) -> Change:
    """A lost write: an image from before (of `read_block`) is on disk again, its checksum valid."""
    return _write_block(data_directory, "stale_block", path, block, image)


def misdirect(
    data_directory: Path, source: str, source_block: int, target: str, target_block: int | None = None
) -> Change:
    """A write went astray: the source's block lies over the target's (the same number, if None)."""
    image = read_block(data_directory, source, source_block)
    block = source_block if target_block is None else target_block
    return _write_block(data_directory, "misdirect", target, block, image)


def truncate_tail(data_directory: Path, path: str, blocks: int, extra_bytes: int = 0) -> Change:
    """The last segment file loses its last blocks, less `extra_bytes` of a torn one that stays."""
    file = _last_segment(data_directory, path)
    size = (data_directory / file).stat().st_size
    kept = size - blocks * BLOCK
    if kept < 0 or not 0 <= extra_bytes < BLOCK:
        raise HostError(f"the file has no {blocks} blocks to lose", where=file)
    before = _read(data_directory / file, kept, size - kept)
    with (data_directory / file).open("r+b") as handle:
        handle.truncate(kept + extra_bytes)
    first = (int(file.rpartition(".")[2]) * SEGMENT_BLOCKS if "." in file else 0) + kept // BLOCK
    return Change("truncate_tail", file, first, kept + extra_bytes, before, b"")


def remove_file(data_directory: Path, path: str) -> Change:
    """A file is gone. `before` keeps at most its first 64 MB."""
    file = data_directory / path
    before = _read(file, 0, 64 << 20)
    file.unlink()
    return Change("remove_file", path, None, 0, before, None)


def remove_segment(data_directory: Path, path: str, segment: int) -> Change:
    """One 1 GB segment file of a relation is gone."""
    return remove_file(data_directory, f"{path}.{segment}" if segment else path)


def xact_flip(data_directory: Path, xid: int, status: int = 2) -> Change:
    """pg_xact now tells another end of a transaction (0 running, 1 committed, 2 aborted)."""
    file = f"pg_xact/{xid // _XACTS_PER_SEGMENT:04X}"
    offset, shift = xid % _XACTS_PER_SEGMENT // 4, xid % 4 * 2
    old = _read(data_directory / file, offset, 1)
    new = bytes([old[0] & ~(3 << shift) | status << shift])
    _write(data_directory / file, offset, new)
    return Change("xact_flip", file, offset // BLOCK, offset, old, new)


def vm_flip(data_directory: Path, path: str, heap_block: int, bits: int = 3) -> Change:
    """The visibility map now says `bits` (1 all visible, 2 all frozen) of a heap block; checksum valid."""
    block, rest = divmod(heap_block, _VM_HEAP_BLOCKS)
    page = bytearray(read_block(data_directory, f"{path}_vm", block))
    shift = rest % 4 * 2
    page[24 + rest // 4] = page[24 + rest // 4] & ~(3 << shift) | bits << shift
    return _write_block(data_directory, "vm_flip", f"{path}_vm", block, sealed(page, block))


def drop_entry(data_directory: Path, path: str, block: int) -> Change:
    """The page's last item is forgotten (index entry or row); the checksum is valid."""
    page = bytearray(read_block(data_directory, path, block))
    (lower,) = struct.unpack_from("<H", page, 12)
    if lower < 28:
        raise HostError(f"block {block} has no items", where=path)
    struct.pack_into("<H", page, 12, lower - 4)
    return _write_block(data_directory, "drop_entry", path, block, sealed(page, block))


def swap_items(data_directory: Path, path: str, block: int) -> Change:
    """The page's last two items change places, so that an index is out of order; checksum valid."""
    page = bytearray(read_block(data_directory, path, block))
    (lower,) = struct.unpack_from("<H", page, 12)
    if lower < 32:
        raise HostError(f"block {block} has no two items", where=path)
    page[lower - 8 : lower] = page[lower - 4 : lower] + page[lower - 8 : lower - 4]
    return _write_block(data_directory, "swap_items", path, block, sealed(page, block))


def shrink_brin_range(data_directory: Path, path: str, block: int, item: int = 0) -> Change:
    """The range of a BRIN minmax summary on one int4 column shrinks to its minimum; checksum valid."""
    page = bytearray(read_block(data_directory, path, block))
    (pointer,) = struct.unpack_from("<I", page, 24 + 4 * item)
    start = pointer & 0x7FFF
    data = start + (page[start + 4] & 0x1F)  # bt_info: the low five bits are the data's offset
    page[data + 4 : data + 8] = page[data : data + 4]
    return _write_block(data_directory, "shrink_brin_range", path, block, sealed(page, block))


def sealed(page: bytes | bytearray, block: int) -> bytes:
    """The page with the checksum that belongs to its content and block number."""
    whole = bytearray(page)
    struct.pack_into("<H", whole, 8, int(checksums(bytes(whole), block)[0]))
    return bytes(whole)


def _place(path: str, block: int) -> tuple[str, int]:
    segment, rest = divmod(block, SEGMENT_BLOCKS)
    return (f"{path}.{segment}" if segment else path), rest * BLOCK


def _last_segment(data_directory: Path, path: str) -> str:
    segment = 0
    while (data_directory / f"{path}.{segment + 1}").exists():
        segment += 1
    return f"{path}.{segment}" if segment else path


def _write_block(data_directory: Path, kind: str, path: str, block: int, after: bytes) -> Change:
    file, offset = _place(path, block)
    before = _read(data_directory / file, offset, BLOCK)
    _write(data_directory / file, offset, after)
    return Change(kind, file, block, offset, before, after)


def _read(file: Path, offset: int, length: int) -> bytes:
    with file.open("rb") as handle:
        handle.seek(offset)
        return handle.read(length)


def _write(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        handle.write(data)
