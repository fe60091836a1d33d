"""Two pages are compared by what they hold, not by hints."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from knockwood.recover.plan.page_masks import describe, masked, same


def heap_page(infomask: int = 0x0902, rows: int = 2) -> bytes:
    page = bytearray(8192)
    lower, upper = 24 + 4 * rows, 8192 - 40 * rows
    struct.pack_into("<IIHHHHHHI", page, 0, 1, 2, 0x1234, 0, lower, upper, 8192, 0x2004, 77)
    for row in range(rows):
        offset = 8192 - 40 * (row + 1)
        struct.pack_into("<I", page, 24 + 4 * row, offset | 1 << 15 | 36 << 17)
        page[offset : offset + 36] = bytes([row + 1]) * 36
        struct.pack_into("<H", page, offset + 20, infomask)
    return bytes(page)


def test_masks_leave_rows_and_drop_hints() -> None:
    page = heap_page()
    other = bytearray(heap_page(0x0502))
    struct.pack_into("<II", other, 0, 9, 9)
    struct.pack_into("<HH", other, 8, 0xFFFF, 0x0005)
    struct.pack_into("<I", other, 20, 12345)
    other[40:60] = b"x" * 20  # between the line pointers and the rows
    assert same(page, bytes(other))
    other[8191 - 4 - 8] ^= 1
    assert not same(page, bytes(other))
    assert not same(heap_page(0x0302), heap_page(0x0102))  # frozen is no hint
    assert masked(bytes(8192)) == bytes(8192)


@given(st.binary(max_size=120), st.binary(max_size=60))
def test_masks_take_any_bytes(head: bytes, tail: bytes) -> None:
    page = (head + heap_page()[len(head) :])[: 8192 - len(tail)] + tail
    assert len(masked(page)) == 8192
    assert masked(masked(page)) == masked(page)


def test_damage_in_words() -> None:
    good = heap_page()
    flipped = bytearray(good)
    flipped[8150] ^= 8
    assert describe(bytes(flipped), good) == "one bit differs, in byte 8150"
    assert describe(bytes(8192), good) == "it is all zeros"
    torn = good[:4096] + bytes(range(256)) * 16
    assert describe(torn, good).startswith("torn: its last")
