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
from enum import IntEnum
from typing import Final, NamedTuple

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

MANAGERS: Final = frozenset({"Hash", "Heap2", "XLOG"})
"""The resource managers of which some records are no plain changes."""


class Touch(IntEnum):
    """What a record does to a block that it names."""

    CHANGE = 0
    """The page's LSN becomes the record's end."""

    PERHAPS = 1
    """It may leave the page's LSN as it was."""

    VISIBLE = 2
    """The page became all visible, and its LSN was set if that was asked for then."""

    BARE = 3
    """A full-page image and no change: of a page made anew, perhaps zeroes, or copied from elsewhere."""

    HINT = 4
    """A full-page image for hint bits. The page's LSN is set unless the page is being written just then, or two
    readers set hints at once (MarkBufferDirtyHint): at least it is the one inside the image."""


def touch_of(kind: Kind, fork: str, hints_are_logged: bool) -> Touch:
    """What a record of this kind (of one of MANAGERS) does to the block."""
    if kind in _PERHAPS_UNCHANGED:
        return Touch.PERHAPS
    if kind[0] == "XLOG":
        return Touch.HINT if kind[1] == "FPI_FOR_HINT" else Touch.BARE
    if kind == ("Heap2", "VISIBLE") and fork == "main":
        # Without checksums and wal_log_hints setting a page all visible does not change its LSN.
        return Touch.VISIBLE if hints_are_logged else Touch.PERHAPS
    return Touch.CHANGE


_ROW: Final = np.dtype(
    [
        ("fork", "<u4"),
        ("block", "<u4"),
        ("start", "<u8"),
        ("limit", "<u8"),
        ("sure", "<u8"),
        ("touch", "u1"),
        ("image", "i1"),
        ("unsure", "?"),
    ]
)
_PENDING: Final = 200_000


@dataclass(slots=True)
class Expectation:
    """The last record known to have changed a block starts at `start`; its end is at most `limit`.

    `image` is the number of its full-page image of the block, -1 without one; `unsure` tells that a later record
    may have changed it too. `sure` is the start of the last record that set the page's LSN whatever the settings
    were; 0 if none is known.
    """

    start: int
    limit: int
    sure: int = 0
    touch: Touch = Touch.CHANGE
    image: int = -1
    unsure: bool = False

    @property
    def bare(self) -> bool:
        """Whether it was a full-page image and no change."""
        return self.touch in (Touch.BARE, Touch.HINT)


class Expected:
    """The last changes of some blocks of one fork, as columns in the order of the blocks."""

    def __init__(self, rows: NDArray[np.void]) -> None:
        self._rows = rows
        self.blocks: NDArray[np.uint32] = rows["block"]
        self.sure: NDArray[np.uint64] = rows["sure"]

    def __getitem__(self, at: int) -> Expectation:
        row = self._rows[at]
        return _expectation(row)

    def part(self, begin: int, end: int) -> Expected:
        return Expected(self._rows[begin:end])

    def only(self, chosen: NDArray[np.bool_]) -> Expected:
        return Expected(self._rows[chosen])

    def doubtful(self, lsns: NDArray[np.uint64], until: Lsn, now: Lsn) -> NDArray[np.intp]:
        """The pages that `judge` could find fault with; `lsns` are theirs, 0 for a zero or missing page."""
        start, limit = self._rows["start"], self._rows["limit"]
        foreign = (limit < lsns) & (lsns < np.uint64(until.value)) & ~self._rows["unsure"]
        return np.flatnonzero((lsns <= start) | (lsns > np.uint64(now.value)) | foreign)


def _expectation(row: np.void) -> Expectation:
    return Expectation(
        start=int(row["start"]),
        limit=int(row["limit"]),
        sure=int(row["sure"]),
        touch=Touch(row["touch"]),
        image=int(row["image"]),
        unsure=bool(row["unsure"]),
    )


class ImageTaken(NamedTuple):
    """A full-page image of a block: reference `number` of the record at `lsn`. `before` is the start of the last
    record before that set the page's LSN for sure; 0 where the stretch has none."""

    fork: Fork
    block: int
    lsn: int
    number: int
    before: int


class Expectations:
    """The last change of every block that a stretch of WAL touched, in 35 bytes each; beside them the full-page
    images that were taken of pages of tables and indexes."""

    def __init__(self) -> None:
        self._numbers: dict[Fork, int] = {}
        self._pending: list[tuple[int, int, int, int, int, int, int, bool]] = []
        self._rows: NDArray[np.void] = np.empty(0, _ROW)
        self._taken: list[tuple[NDArray[np.void], NDArray[np.uint64]]] = []

    @property
    def count(self) -> int:
        """How many blocks are remembered, at most: those just added may be the same ones."""
        return len(self._rows) + len(self._pending)

    def add(self, references: Iterable[BlockReference]) -> None:
        """Take the next references, in the order of the WAL; their `touch` is of `touch_of`."""
        numbers, pending = self._numbers, self._pending
        for lsn, following, fork, block, touch, image in references:
            if fork[3] == "fsm":  # written without WAL for the most part
                continue
            number = numbers.setdefault(fork, len(numbers))
            limit = _NO_LIMIT if following is None else following
            sure = 0 if touch else lsn
            pending.append((number, block, lsn, limit, sure, touch, image, False))
        if len(pending) >= _PENDING:
            self._settle()

    def _settle(self) -> None:
        """Keep the last change of each block, unsure if one came later that may be none."""
        if not self._pending:
            return
        rows = np.concatenate([self._rows, np.array(self._pending, _ROW)])
        fresh = np.arange(len(rows)) >= len(self._rows)
        self._pending.clear()
        order = np.lexsort((rows["touch"] == Touch.PERHAPS, rows["start"], rows["block"], rows["fork"]))
        rows, fresh = rows[order], fresh[order]
        new = np.ones(len(rows), np.bool_)
        new[1:] = (rows["fork"][1:] != rows["fork"][:-1]) | (rows["block"][1:] != rows["block"][:-1])
        begins = np.flatnonzero(new)
        ends = np.append(begins[1:], len(rows)) - 1
        self._note_images(rows, fresh, begins[np.cumsum(new) - 1])
        change = np.maximum.reduceat(_places(rows, rows["touch"] != Touch.PERHAPS), begins)
        known = change >= 0
        kept = rows[change[known]]
        kept["sure"] = np.maximum.reduceat(rows["sure"], begins)[known]
        kept["unsure"] |= change[known] < ends[known]
        self._rows = kept

    def _note_images(
        self, rows: NDArray[np.void], fresh: NDArray[np.bool_], begins: NDArray[np.intp]
    ) -> None:
        """Note the images that come with fresh rows, with the change before; `begins`: where each row's block does.

        A bare image that is not for hints may be of a page made anew, or a copy of another one.
        """
        last = np.maximum.accumulate(_places(rows, rows["sure"] > 0))
        taken = np.flatnonzero(fresh & (rows["image"] >= 0) & (rows["touch"] != Touch.BARE))
        before = last[taken - 1]  # of the first row the last one's, which lies after it
        known = (before >= begins[taken]) & (before < taken)
        order = np.argsort(rows["start"][taken])
        self._taken.append((rows[taken[order]], np.where(known, rows["sure"][before], 0)[order]))

    def images(self) -> Iterator[ImageTaken]:
        """The images noted since this was asked last, in the order of the WAL for each time that it was settled."""
        self._settle()
        forks = list(self._numbers)
        noted, self._taken = self._taken, []
        for rows, before in noted:
            columns = [rows[name].tolist() for name in ("fork", "block", "start", "image")]
            for fork, *place in zip(*columns, before.tolist(), strict=True):
                if forks[fork][3] == "main":
                    yield ImageTaken(forks[fork], *place)

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


def _places(rows: NDArray[np.void], chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The places of the rows chosen, -1 for the others."""
    return np.where(chosen, np.arange(len(rows)), -1)


@dataclass(frozen=True, slots=True)
class Deviation:
    """A block that is not as the WAL left it. `page_lsn` is None for a page that is zero or missing.

    `image` is the start of the record that was made from the old page, where one was: then the page on disk
    agrees with the WAL from there on. `if_hints_were_logged`: only then that record would have set the page's LSN.
    """

    fork: Fork
    block: int
    kind: str  # stale, zeroed, missing, foreign, future
    expected: Lsn
    page_lsn: Lsn | None
    image: Lsn | None = None
    if_hints_were_logged: bool = False

    @property
    def certain(self) -> bool:
        """Whether nothing that happened since explains it, as a truncation does missing and zero pages."""
        return self.kind not in ("zeroed", "missing") and self.image is None and not self.if_hints_were_logged


def lacks(had: Lsn, last: Expectation, hinted: Lsn | None) -> bool:
    """Whether a page with the LSN `had` lacks the last change that WAL has of it.

    If that was for hint bits, what counts is the page LSN inside its image, `hinted`; None: nobody can tell.
    """
    if had.value > last.start:
        return False
    return last.touch is not Touch.HINT or (hinted is not None and had < hinted)


def of_old_page(had: Lsn, before: int) -> bool:
    """Whether a full-page image with the page LSN `had` was taken of a page that lacked the change at `before`.

    An image is taken before its own record's LSN is set, so `had` is the end of the change before. 0 and 1 are
    pages made anew.
    """
    return _GIST_BUILD_LSN < had.value <= before


def judge(
    fork: Fork,
    block: int,
    expected: Expectation,
    page_lsn: Lsn | None,
    missing: bool,
    until: Lsn,
    now: Lsn,
    hinted: Lsn | None = None,
) -> Deviation | None:
    """What is wrong with a page read after the checkpoint whose redo position is not before `until`.

    `page_lsn` is None for an all-zero page. `expected` comes from WAL that ends at `until`; `now` is the
    end of the server's WAL after the page was read; `hinted` as for `lacks`.
    """
    start = Lsn(expected.start)
    if missing:
        return Deviation(fork, block, "missing", start, None)
    if page_lsn is None:
        # A bare image of a new page is a zero page without an LSN.
        return None if expected.bare else Deviation(fork, block, "zeroed", start, None)
    if expected.bare and page_lsn.value == _GIST_BUILD_LSN:
        return None
    if lacks(page_lsn, expected, hinted):
        doubt = expected.touch is Touch.VISIBLE and page_lsn.value > expected.sure
        return Deviation(fork, block, "stale", start, page_lsn, if_hints_were_logged=doubt)
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
