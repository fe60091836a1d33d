"""Rows of a COPY come in larger pieces, and no byte is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from knockwood.postgres.copying import _batched


@given(st.lists(st.binary(max_size=400)), st.integers(1, 2000))
def test_every_byte_in_its_order(rows: list[bytes], times: int) -> None:
    given_rows = [row * times for row in rows]
    found = list(_batched(map(memoryview, given_rows)))
    assert b"".join(found) == b"".join(given_rows)
    assert all(found)
    assert all(len(piece) >= 256 * 1024 for piece in found[:-1])
