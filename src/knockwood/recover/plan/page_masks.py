"""Two copies of one heap page compared without what may differ between them, and what damage looks like. Pure.

Hint bits, pd_prune_xid, the checksum and free space are not logged as they change. The rules are those with
which PostgreSQL compares a page with its own replay (bufmask.c, heap_mask), less the page LSN.
"""

from __future__ import annotations

import struct
from typing import Final

from knockwood.recover.plan.page_wal import PAGE_BYTES

_SECTOR: Final = 512
_HEADER: Final = 24
_LP_NORMAL: Final = 1
# PD_HAS_FREE_LINES, PD_PAGE_FULL, PD_ALL_VISIBLE.
_PAGE_HINTS: Final = 0x0007
_XMIN_HINTS: Final = 0x0300
_XMAX_HINTS: Final = 0x0C00
_INFOMASK: Final = 20


def masked(page: bytes) -> bytes:
    """The heap page with zeros for the page LSN, checksum, hints and free space; a page that makes no sense
    as one comes back without the first two only."""
    whole = bytearray(page)
    whole[0:10] = bytes(10)
    if not any(page) or len(page) != PAGE_BYTES:
        return bytes(whole)
    flags, lower, upper, special = struct.unpack_from("<HHHH", page, 10)
    if not _HEADER <= lower <= upper <= special <= PAGE_BYTES:
        return bytes(whole)
    struct.pack_into("<H", whole, 10, flags & ~_PAGE_HINTS)
    whole[20:24] = bytes(4)
    whole[lower:upper] = bytes(upper - lower)
    for at in range(_HEADER, lower - 3, 4):
        (item,) = struct.unpack_from("<I", page, at)
        offset, state, length = item & 0x7FFF, item >> 15 & 3, item >> 17
        if state != _LP_NORMAL or length < _HEADER - 1 or not upper <= offset <= special - length:
            continue
        (infomask,) = struct.unpack_from("<H", page, offset + _INFOMASK)
        # Both bits of xmin say frozen, which is no hint.
        kept = ~_XMAX_HINTS if infomask & _XMIN_HINTS == _XMIN_HINTS else ~(_XMIN_HINTS | _XMAX_HINTS)
        struct.pack_into("<H", whole, offset + _INFOMASK, infomask & kept & 0xFFFF)
        # Free bytes up to the alignment of the next row.
        end = offset + length
        padding = min(-length % 8, special - end)
        whole[end : end + padding] = bytes(padding)
    return bytes(whole)


def same(one: bytes, other: bytes) -> bool:
    """Whether two images hold the same rows in the same places."""
    return masked(one) == masked(other)


def describe(damaged: bytes, good: bytes) -> str:
    """In words, how a damaged page differs from the good one."""
    if damaged == good:
        return "it does not differ"
    if not any(damaged):
        return "it is all zeros"
    differing = _differing(masked(damaged), masked(good)) or _differing(damaged, good)
    bits = sum((damaged[at] ^ good[at]).bit_count() for at in differing)
    sectors = sorted({at // _SECTOR for at in differing})
    if bits == 1:
        return f"one bit differs, in byte {differing[0]}"
    # Half-written: the header's LSN is of one version, a part that begins or ends the page of another.
    last = PAGE_BYTES // _SECTOR - 1
    if damaged[:8] != good[:8] and sectors[-1] < last:
        return f"torn: its first {(sectors[-1] + 1) * _SECTOR} bytes are not those of the good page"
    if damaged[:8] == good[:8] and sectors[0] > 0 and sectors[-1] == last:
        return f"torn: its last {(last + 1 - sectors[0]) * _SECTOR} bytes are not those of the good page"
    return f"{len(differing)} bytes differ, from byte {differing[0]} to {differing[-1]}"


def _differing(one: bytes, other: bytes) -> list[int]:
    return [at for at in range(min(len(one), len(other))) if one[at] != other[at]]
