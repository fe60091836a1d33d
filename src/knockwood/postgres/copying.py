"""COPY between servers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

_BATCH_BYTES: Final = 256 * 1024


def batched(rows: Iterable[bytes | bytearray | memoryview]) -> Iterator[bytes]:
    """The bytes of a COPY, many rows at once: what the driver costs is by call, and it reads row by row."""
    held = bytearray()
    for row in rows:
        held += row
        if len(held) >= _BATCH_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)
