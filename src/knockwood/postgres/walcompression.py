"""The first bytes of what the methods of wal_compression made; nothing of what is no output of theirs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def _or_nothing(head: Callable[[bytes, int], bytes]) -> Callable[[bytes, int], bytes]:
    """Nothing where the data end before they should."""

    @wraps(head)
    def guarded(data: bytes, wanted: int) -> bytes:
        try:
            return head(data, wanted)
        except IndexError:
            return b""

    return guarded


@_or_nothing
def pglz_head(data: bytes, wanted: int) -> bytes:
    """Of pglz (common/pg_lzcompress.c)."""
    out = bytearray()
    at = 0
    while at < len(data) and len(out) < wanted:
        control = data[at]
        at += 1
        for bit in range(8):
            if at >= len(data) or len(out) >= wanted:
                break
            if control >> bit & 1:
                length = (data[at] & 0x0F) + 3
                back = (data[at] & 0xF0) << 4 | data[at + 1]
                at += 2
                if length == 18:
                    length += data[at]
                    at += 1
                if not 0 < back <= len(out):
                    return b""
                for _ in range(length):
                    out.append(out[-back])
            else:
                out.append(data[at])
                at += 1
    return bytes(out[:wanted])


@_or_nothing
def lz4_head(data: bytes, wanted: int) -> bytes:
    """Of LZ4's block format: literals and matches in turn, each length of 15 or more going on in further bytes."""
    out = bytearray()
    at = 0
    while at < len(data) and len(out) < wanted:
        token = data[at]
        length, at = _length(token >> 4, data, at + 1)
        out += data[at : at + length]
        at += length
        if at >= len(data) or len(out) >= wanted:
            break
        back = data[at] | data[at + 1] << 8
        length, at = _length(token & 0x0F, data, at + 2)
        if not 0 < back <= len(out):
            return b""
        for _ in range(min(length + 4, wanted)):
            out.append(out[-back])
    return bytes(out[:wanted])


def _length(length: int, data: bytes, at: int) -> tuple[int, int]:
    """A length that begins with these 4 bits, and where it ends."""
    more = 255 if length == 15 else 0
    while more == 255:
        more = data[at]
        length, at = length + more, at + 1
    return length, at


def zstd_head(data: bytes, wanted: int) -> bytes:
    """Of a zstd frame."""
    try:
        return zstd.ZstdDecompressor().decompress(data, max_length=wanted)
    except zstd.ZstdError:
        return b""
