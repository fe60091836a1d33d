"""What row headers remember of transactions, of many heap pages at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from knockwood.postgres.pages import PAGE_BYTES, bad_pages

_HEADER: Final = 24
_ROW_HEADER: Final = 23
_NORMAL: Final = 1
_FIRST_NORMAL_XID: Final = 3
# htup_details.h
_XMIN_COMMITTED: Final = 0x0100
_XMIN_INVALID: Final = 0x0200
_XMAX_COMMITTED: Final = 0x0400
_XMAX_IS_MULTI: Final = 0x1000
_XMAX_LOCK_ONLY: Final = 0x0080


@dataclass(frozen=True, slots=True)
class Hints:
    """For each hint: its block, its row's item, the transaction, and whether it is said to be committed.
    `column` is xmin or xmax."""

    column: str
    blocks: NDArray[np.int64]
    items: NDArray[np.int64]
    xids: NDArray[np.int64]
    committed: NDArray[np.bool_]


def hints_of(pages: NDArray[np.uint8], first_block: int, checksums: bool) -> Iterator[Hints]:
    """The hint bits of the rows on heap `pages` (shape n, 8192). Pages that are not sound are passed over.

    A row's xmax hint `invalid` says nothing: it is also set for mere locks.
    """
    words = np.ascontiguousarray(pages).view("<u2").reshape(len(pages), PAGE_BYTES // 2)
    lower, special = words[:, 6].astype(np.int64), words[:, 8]
    usable = (lower > _HEADER) & (lower < PAGE_BYTES) & (special == PAGE_BYTES)
    for block, _ in bad_pages(pages.tobytes(), first_block, checksums):
        usable[block - first_block] = False
    which = np.flatnonzero(usable)
    counts = (lower[which] - _HEADER) // 4
    page_of = np.repeat(which, counts)
    item = np.arange(len(page_of)) - np.repeat(np.cumsum(counts) - counts, counts)
    low = words[page_of, _HEADER // 2 + item * 2].astype(np.int64)
    high = words[page_of, _HEADER // 2 + item * 2 + 1].astype(np.int64)
    start = (low | high << 16) & 0x7FFF
    rows = ((low | high << 16) >> 15 & 3 == _NORMAL) & (start >= _HEADER)
    rows &= (start + _ROW_HEADER <= PAGE_BYTES) & (start % 8 == 0)
    page_of, item, at = page_of[rows], item[rows], start[rows] // 2
    mask = words[page_of, at + 10]
    frozen = mask & (_XMIN_COMMITTED | _XMIN_INVALID) == _XMIN_COMMITTED | _XMIN_INVALID

    def hints(column: str, place: int, kept: NDArray[np.bool_], committed: NDArray[np.bool_]) -> Hints:
        xids = (
            words[page_of, at + place].astype(np.int64)
            | words[page_of, at + place + 1].astype(np.int64) << 16
        )
        kept = kept & (xids >= _FIRST_NORMAL_XID)
        return Hints(column, page_of[kept] + first_block, item[kept] + 1, xids[kept], committed[kept])

    has_xmin_hint = (mask & (_XMIN_COMMITTED | _XMIN_INVALID) != 0) & ~frozen
    yield hints("xmin", 0, has_xmin_hint, mask & _XMIN_COMMITTED != 0)
    has_xmax_hint = (mask & _XMAX_COMMITTED != 0) & (mask & (_XMAX_IS_MULTI | _XMAX_LOCK_ONLY) == 0)
    yield hints("xmax", 2, has_xmax_hint, np.ones(len(mask), np.bool_))
