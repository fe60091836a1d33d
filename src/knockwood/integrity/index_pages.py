"""Btree leaves and heap item arrays of many pages at once."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from knockwood.postgres.pages import PAGE_BYTES

_HEADER: Final = 24
_LEAF: Final = 1
_DELETED: Final = 1 << 2
_HALF_DEAD: Final = 1 << 4
_ALTERNATIVE_TID: Final = 0x2000  # in t_info: the tid holds other things
_POSTING: Final = 0x2000  # in the tid's item number: a list of tids
_ITEM_MASK: Final = 0x0FFF
_NORMAL: Final = 1
_MOST_ITEMS: Final = 291  # MaxHeapTuplesPerPage
_MAP_LIMIT: Final = 2_000_000
"""Blocks (16 GB) up to which every item is remembered; beyond that only how many items each page has."""

_NOTHING = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))

Entries = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""For each entry: its index block, its row's heap block, its row's item number."""


def _words(pages: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(pages).view("<u2").reshape(len(pages), PAGE_BYTES // 2)


def leaf_entries(pages: NDArray[np.uint8], first_block: int) -> Entries:
    """The live entries of the btree leaf pages among `pages` (shape n, 8192). Pages that are no sound leaf
    are passed over: other checks name them."""
    words = _words(pages)
    lower, special = words[:, 6].astype(np.int64), words[:, 8].astype(np.int64)
    sound = (lower > _HEADER) & (lower <= special) & (special == PAGE_BYTES - 16)
    flags = words[:, (PAGE_BYTES - 16 + 12) // 2]
    right = words[:, (PAGE_BYTES - 16 + 4) // 2].astype(np.int64) | words[:, (PAGE_BYTES - 16 + 6) // 2]
    sound &= (flags & _LEAF != 0) & (flags & (_DELETED | _HALF_DEAD) == 0)
    leaves = np.flatnonzero(sound)
    if not len(leaves):
        return _NOTHING
    counts = (lower[leaves] - _HEADER) // 4
    page_of = np.repeat(leaves, counts)
    item = np.arange(len(page_of)) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = (item > 0) | (right[page_of] == 0)  # a leaf with a right neighbour begins with its high key
    page_of, item = page_of[keep], item[keep]
    low = words[page_of, _HEADER // 2 + item * 2].astype(np.int64)
    high = words[page_of, _HEADER // 2 + item * 2 + 1].astype(np.int64)
    start = (low | high << 16) & 0x7FFF
    state = (low | high << 16) >> 15 & 3
    keep = (state == _NORMAL) & (start % 2 == 0) & (start >= _HEADER) & (start <= PAGE_BYTES - 24)
    return _tids(words, page_of[keep], start[keep] // 2, first_block)


def _tids(
    words: NDArray[np.uint16], page_of: NDArray[np.int64], at: NDArray[np.int64], first_block: int
) -> Entries:
    number = words[page_of, at + 2].astype(np.int64)
    posting = (words[page_of, at + 3] & _ALTERNATIVE_TID != 0) & (number & _POSTING != 0)
    single = ~posting & (words[page_of, at + 3] & _ALTERNATIVE_TID == 0)
    blocks, rows, items = [], [], []

    def take(pages: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        blocks.append(pages + first_block)
        rows.append(words[pages, places].astype(np.int64) << 16 | words[pages, places + 1])
        items.append(words[pages, places + 2].astype(np.int64))

    take(page_of[single], at[single])
    # A posting list: where it starts is the tid's block number, how many there are its item number.
    lists, begin = page_of[posting], at[posting]
    count = number[posting] & _ITEM_MASK
    offset = words[lists, begin].astype(np.int64) << 16 | words[lists, begin + 1]
    fits = (begin * 2 + offset + count * 6 <= PAGE_BYTES) & (offset % 2 == 0)
    lists, begin, count, offset = lists[fits], begin[fits], count[fits], offset[fits]
    step = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    take(np.repeat(lists, count), np.repeat(begin + offset // 2, count) + step * 3)
    return np.concatenate(blocks), np.concatenate(rows), np.concatenate(items)


class DanglingMap:
    """Which items of a heap are in use: fed with its pages in any order, then asked about entries."""

    def __init__(self) -> None:
        self._counts: dict[int, NDArray[np.uint16]] = {}
        self._used: dict[int, NDArray[np.uint8]] = {}
        self._firsts: list[int] = []
        self._blocks = 0

    def add_heap_pages(self, first_block: int, pages: NDArray[np.uint8]) -> None:
        """Take pages (shape n, 8192) that follow each other."""
        words = _words(pages)
        lower = words[:, 6].astype(np.int64)
        counts = np.where((lower >= _HEADER) & (lower <= PAGE_BYTES), (lower - _HEADER) // 4, 0)
        counts = np.minimum(counts, _MOST_ITEMS)
        self._firsts.append(first_block)
        self._counts[first_block] = counts.astype(np.uint16)
        self._blocks += len(pages)
        if self._blocks > _MAP_LIMIT:
            self._used.clear()
            return
        most = int(counts.max(initial=0))
        high = words[:, _HEADER // 2 : _HEADER // 2 + 2 * most : 2].astype(np.uint32)
        high |= words[:, _HEADER // 2 + 1 : _HEADER // 2 + 1 + 2 * most : 2].astype(np.uint32) << 16
        in_use = (high >> 15 & 3 != 0) & (np.arange(most) < counts[:, None])
        self._used[first_block] = np.packbits(in_use, axis=1)

    def dangling(self, rows: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of the entries whose row's item does not exist or is unused."""
        firsts = np.array(sorted(self._firsts), np.int64)
        wrong = np.ones(len(rows), np.bool_)
        if not len(firsts) or not len(rows):
            return np.flatnonzero(wrong)
        part = np.searchsorted(firsts, rows, "right") - 1
        for number in np.unique(part[part >= 0]):
            first = int(firsts[number])
            mine = np.flatnonzero(part == number)
            wrong[mine] = self._missing(first, rows[mine] - first, items[mine])
        return np.flatnonzero(wrong)

    def _missing(self, first: int, rows: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.bool_]:
        counts = self._counts[first]
        there = rows < len(counts)
        inside = np.where(there, rows, 0)
        missing = ~there | (items < 1) | (items > counts[inside])
        used = self._used.get(first)
        if used is not None and used.shape[1]:
            place = np.clip(items - 1, 0, used.shape[1] * 8 - 1)
            bit = used[inside, place >> 3] >> (7 - (place & 7)).astype(np.uint8) & 1
            missing |= bit == 0
        return missing
