"""What the WAL says each page's LSN must be, and which pages on disk say otherwise. Pure.

After a checkpoint has passed, the page on disk holds every change from before the checkpoint's redo
position. So its LSN is after the start of the last record that touched it before that position; and
unless it was changed again since, it is the end of that very record, which is not after the start of the
next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from knockwood.model import Lsn
from knockwood.postgres.walrefs import BlockReference, Fork, Kind, RelationEvent

_NO_LIMIT: Final = (1 << 64) - 1
# A GiST index built by sorting logs its pages and keeps this LSN on them (up to 16).
_GIST_BUILD_LSN: Final = 1

# Pages that a record names only to have them locked when it is replayed keep their LSN
# (REGBUF_NO_CHANGE, from 16 on); which page of the record that is depends.
_PERHAPS_UNCHANGED: Final = frozenset(
    {("Hash", "DELETE"), ("Hash", "SQUEEZE_PAGE"), ("Hash", "MOVE_PAGE_CONTENTS")}
)

MANAGERS: Final = frozenset({"Hash", "Heap2"})
"""The resource managers of which some records may leave a page's LSN as it was."""

_ROW: Final = np.dtype(
    [("fork", "<u4"), ("block", "<u4"), ("start", "<u8"), ("limit", "<u8"), ("image", "?"), ("unsure", "?")]
)
_PENDING: Final = 200_000


def may_keep_lsn(kind: Kind, fork: str, hints_are_logged: bool) -> bool:
    """Whether a record of this kind (of one of MANAGERS) may leave the page's LSN as it was."""
    if kind in _PERHAPS_UNCHANGED:
        return True
    # Without checksums and wal_log_hints setting a page all visible does not change its LSN.
    return kind == ("Heap2", "VISIBLE") and fork == "main" and not hints_are_logged


@dataclass(slots=True)
class Expectation:
    """The last record known to have changed a block starts at `start`; its end is at most `limit`.

    `image` tells that it was a bare full-page image, which can be that of a zero page; `unsure` that a
    later record may have changed it too.
    """

    start: int
    limit: int
    image: bool
    unsure: bool = False


class Expected:
    """The last changes of some blocks of one fork, as columns in the order of the blocks."""

    def __init__(self, rows: NDArray[np.void]) -> None:
        self._rows = rows
        self.blocks: NDArray[np.uint32] = rows["block"]
        self.starts: NDArray[np.uint64] = rows["start"]
        self.unsure: NDArray[np.bool_] = rows["unsure"]

    def __getitem__(self, at: int) -> Expectation:
        row = self._rows[at]
        return Expectation(int(row["start"]), int(row["limit"]), bool(row["image"]), bool(row["unsure"]))

    def part(self, begin: int, end: int) -> Expected:
        return Expected(self._rows[begin:end])

    def doubtful(self, lsns: NDArray[np.uint64], until: Lsn, now: Lsn) -> NDArray[np.intp]:
        """The pages that `judge` could find fault with; `lsns` are theirs, 0 for a zero or missing page."""
        start, limit = self._rows["start"], self._rows["limit"]
        foreign = (limit < lsns) & (lsns < np.uint64(until.value)) & ~self._rows["unsure"]
        return np.flatnonzero((lsns <= start) | (lsns > np.uint64(now.value)) | foreign)


class Expectations:
    """The last change of every block that a stretch of WAL touched: 26 bytes for each."""

    def __init__(self) -> None:
        self._numbers: dict[Fork, int] = {}
        self._pending: list[tuple[int, int, int, int, bool, bool]] = []
        self._rows: NDArray[np.void] = np.empty(0, _ROW)

    @property
    def count(self) -> int:
        """How many blocks are remembered, at most: those just added may be the same ones."""
        return len(self._rows) + len(self._pending)

    def add(self, references: Iterable[BlockReference]) -> None:
        """Take the next references, in the order of the WAL; those told apart are of `may_keep_lsn`."""
        numbers, pending = self._numbers, self._pending
        for lsn, following, fork, block, image, apart in references:
            if fork[3] == "fsm":  # written without WAL for the most part
                continue
            number = numbers.setdefault(fork, len(numbers))
            pending.append((number, block, lsn, _NO_LIMIT if following is None else following, image, apart))
        if len(pending) >= _PENDING:
            self._settle()

    def _settle(self) -> None:
        """Keep the last change of each block, unsure if one came later that may be none."""
        if not self._pending:
            return
        rows = np.concatenate([self._rows, np.array(self._pending, _ROW)])
        # What is pending marks with `unsure` a record that may have changed nothing; the rest are changes.
        perhaps = rows["unsure"].copy()
        perhaps[: len(self._rows)] = False
        self._pending.clear()
        order = np.lexsort((perhaps, rows["start"], rows["block"], rows["fork"]))
        rows, perhaps = rows[order], perhaps[order]
        new = np.ones(len(rows), np.bool_)
        new[1:] = (rows["fork"][1:] != rows["fork"][:-1]) | (rows["block"][1:] != rows["block"][:-1])
        begins = np.flatnonzero(new)
        ends = np.append(begins[1:], len(rows)) - 1
        change = np.maximum.reduceat(np.where(perhaps, -1, np.arange(len(rows))), begins)
        known = change >= 0
        kept = rows[change[known]]
        kept["unsure"] |= change[known] < ends[known]
        self._rows = kept

    def by_fork(self) -> Iterator[tuple[Fork, Expected]]:
        """The blocks of each fork, in order of the forks."""
        self._settle()
        for fork, number in sorted(self._numbers.items()):
            begin, end = np.searchsorted(self._rows["fork"], (number, number + 1))
            if begin < end:
                yield fork, Expected(self._rows[begin:end])

    def clear(self) -> None:
        """Forget all, to bound memory; what comes later is judged by itself."""
        self._settle()
        self._numbers.clear()
        self._rows = np.empty(0, _ROW)


@dataclass(frozen=True, slots=True)
class Deviation:
    """A block that is not as the WAL left it. `page_lsn` is None for a page that is zero or missing."""

    fork: Fork
    block: int
    kind: str  # stale, zeroed, missing, foreign, future
    expected: Lsn
    page_lsn: Lsn | None

    @property
    def may_be_explained(self) -> bool:
        """Whether a truncation or a drop would explain it; an old image is never explained."""
        return self.kind in ("zeroed", "missing")


def judge(
    fork: Fork, block: int, expected: Expectation, page_lsn: Lsn | None, missing: bool, until: Lsn, now: Lsn
) -> Deviation | None:
    """What is wrong with a page read after the checkpoint whose redo position is not before `until`.

    `page_lsn` is None for an all-zero page. `expected` comes from WAL that ends at `until`; `now` is the
    end of the server's WAL after the page was read.
    """
    start = Lsn(expected.start)
    if missing:
        return Deviation(fork, block, "missing", start, None)
    if page_lsn is None:
        # A bare image of a new page is a zero page without an LSN.
        return None if expected.image else Deviation(fork, block, "zeroed", start, None)
    if expected.image and page_lsn.value == _GIST_BUILD_LSN:
        return None
    if page_lsn <= start:
        return Deviation(fork, block, "stale", start, page_lsn)
    if page_lsn > now:
        return Deviation(fork, block, "future", start, page_lsn)
    if not expected.unsure and expected.limit < page_lsn.value and page_lsn < until:
        return Deviation(fork, block, "foreign", start, page_lsn)
    return None


_PLACE = re.compile(r"(?:global|base/\d+|pg_tblspc/\d+/[^/]+/\d+)/\d+")


def explained(deviation: Deviation, path: str, events: Iterable[RelationEvent]) -> bool:
    """Whether the relation (its path relative to the data directory) was dropped, truncated or made anew
    after the record that touched the block."""
    for event in events:
        match = _PLACE.match(event.path)
        if match is None or match[0] != path or event.lsn <= deviation.expected.value:
            continue
        if event.kind != "truncate" or deviation.fork[3] != "main":
            return True
        if event.blocks is not None and event.blocks <= deviation.block:
            return True
    return False
