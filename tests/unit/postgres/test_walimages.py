"""The first bytes of compressed images, and where images lie in a record."""

from __future__ import annotations

import struct

from knockwood.postgres.walimages import _image, _pglz_head


def test_pglz_literals_and_matches() -> None:
    assert _pglz_head(b"\x00abcdefgh", 8) == b"abcdefgh"
    # One literal, then a match of 3 + 4 bytes, one byte back.
    assert _pglz_head(bytes([0b10]) + b"x" + bytes([0x04, 0x01]), 8) == b"xxxxxxxx"
    # A long match has a byte more for its length.
    assert _pglz_head(bytes([0b10]) + b"y" + bytes([0x0F, 0x01, 0x02]), 8) == b"yyyyyyyy"
    # A match that points before the beginning is no pglz.
    assert _pglz_head(bytes([0b1, 0x01, 0x05]), 8) == b""


def test_the_image_of_the_second_block() -> None:
    header = bytes(24)
    first = struct.pack("<BBH", 0, 0x10, 4) + struct.pack("<HHB", 6, 0, 0x02) + bytes(12) + bytes(4)
    second = struct.pack("<BBH", 1, 0x10 | 0x80, 0) + struct.pack("<HHB", 5, 0, 0x02) + bytes(4)
    main = bytes([255, 3])
    record = header + first + second + main + b"IMAGE1" + b"data" + b"image" + b"abc"
    begin = len(header + first + second + main)
    assert _image(record, 0) == (begin, 6, 2)
    assert _image(record, 1) == (begin + 10, 5, 2)
    assert _image(record, 2) is None
