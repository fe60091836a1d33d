"""CRC-32C against its published check values and its definition bit by bit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from knockwood.repository.contents import Crc32c, digest_of


def _plain(data: bytes) -> str:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return (state ^ 0xFFFFFFFF).to_bytes(4, "little").hex()


def test_published_values() -> None:
    # RFC 3720, B.4, and the usual check value.
    for data, value in (
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ):
        digest = Crc32c()
        digest.update(data)
        assert digest.hexdigest() == value.to_bytes(4, "little").hex()
    assert Crc32c().hexdigest() == "00000000"


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_pieces_of_any_size_give_the_whole(pieces: list[bytes]) -> None:
    digest = digest_of("CRC32C")
    for piece in pieces:
        digest.update(piece)
    assert digest.hexdigest() == _plain(b"".join(pieces))
