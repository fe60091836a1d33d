"""The first bytes of compressed images."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from knockwood.postgres.walcompression import lz4_head, pglz_head, zstd_head

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def test_pglz_literals_and_matches() -> None:
    assert pglz_head(b"\x00abcdefgh", 8) == b"abcdefgh"
    # One literal, then a match of 3 + 4 bytes, one byte back.
    assert pglz_head(bytes([0b10]) + b"x" + bytes([0x04, 0x01]), 8) == b"xxxxxxxx"
    # A long match has a byte more for its length.
    assert pglz_head(bytes([0b10]) + b"y" + bytes([0x0F, 0x01, 0x02]), 8) == b"yyyyyyyy"
    # A match that points before the beginning is no pglz.
    assert pglz_head(bytes([0b1, 0x01, 0x05]), 8) == b""


def test_lz4_literals_and_matches() -> None:
    assert lz4_head(bytes([0x80]) + b"abcdefgh", 8) == b"abcdefgh"
    # Two literals, then a match of 4 + 4 bytes, two bytes back; then literals to the end.
    assert lz4_head(bytes([0x24]) + b"xy" + bytes([2, 0]) + bytes([0x50]) + b"abcde", 12) == b"xyxyxyxyxyab"
    # 15 + 255 + 3 literals.
    assert lz4_head(bytes([0xF0, 255, 3]) + bytes(range(256)) + bytes(17), 8) == bytes(range(8))
    # A match that points before the beginning is no LZ4.
    assert lz4_head(bytes([0x10]) + b"x" + bytes([9, 0, 0]), 8) == b""


@given(st.binary(max_size=40))
def test_what_is_no_output_of_theirs_does_no_harm(data: bytes) -> None:
    for head in (pglz_head, lz4_head, zstd_head):
        assert len(head(data, 8)) <= 8


def test_zstd() -> None:
    assert zstd_head(zstd.compress(b"abcdefgh" * 1000), 8) == b"abcdefgh"
    assert zstd_head(b"no frame", 8) == b""
