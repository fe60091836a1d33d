"""Where images lie in a record."""

from __future__ import annotations

import struct

from knockwood.postgres.walimages import _image


def test_the_image_of_the_second_block() -> None:
    header = bytes(24)
    first = struct.pack("<BBH", 0, 0x10, 4) + struct.pack("<HHB", 6, 0, 0x02) + bytes(12) + bytes(4)
    second = struct.pack("<BBH", 1, 0x10 | 0x80, 0) + struct.pack("<HHB", 5, 0, 0x02) + bytes(4)
    main = bytes([255, 3])
    record = header + first + second + main + b"IMAGE1" + b"data" + b"image" + b"abc"
    begin = len(header + first + second + main)
    whole = len(record)
    assert _image(record[:80], 0, whole) == (begin, 6, 2, 0, 0)
    assert _image(record[:80], 1, whole) == (begin + 10, 5, 2, 0, 0)
    assert _image(record[:80], 2, whole) is None


def test_the_hole_that_an_image_leaves_out() -> None:
    """Its length is what is lacking of a page, or for a compressed image told in the header."""
    for info, more, hole in ((0x03, b"", 8192 - 90), (0x03 | 0x08, struct.pack("<H", 4000), 4000)):
        header = struct.pack("<BBH", 0, 0x10, 0) + struct.pack("<HHB", 90, 60, info) + more + bytes(16)
        record = bytes(24) + header + bytes([255, 0])
        found = _image(record, 0, len(record) + 90)
        assert found == (len(record), 90, info, 60, hole)
