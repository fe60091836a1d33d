"""What the WAL says each page's LSN must be, and which pages on disk say otherwise. Pure.

After a checkpoint has passed, the page on disk holds every change from before the checkpoint's redo
position. So its LSN is after the start of the last record that touched it before that position; and
unless it was changed again since, it is the end of that very record, which is not after the start of the
next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from knockwood.model import Lsn
from knockwood.postgres.walrefs import BlockReference, RelationEvent

_NO_LIMIT: Final = 1 << 64
# A GiST index built by sorting logs its pages and keeps this LSN on them (up to 16).
_GIST_BUILD_LSN: Final = 1

# Pages that a record names only to have them locked when it is replayed keep their LSN
# (REGBUF_NO_CHANGE, from 16 on); which page of the record that is depends.
_PERHAPS_UNCHANGED: Final = frozenset(
    {("Hash", "DELETE"), ("Hash", "SQUEEZE_PAGE"), ("Hash", "MOVE_PAGE_CONTENTS")}
)

Fork = tuple[int, int, int, str]
"""Tablespace, database, relation file number, fork."""


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


class Expectations:
    """The last change of every block that a stretch of WAL touched."""

    def __init__(self, hints_are_logged: bool) -> None:
        self.blocks: dict[Fork, dict[int, Expectation]] = {}
        self.count = 0
        self._hints_are_logged = hints_are_logged
        self._open: list[Expectation] = []
        self._open_at = -1

    def add(self, reference: BlockReference) -> None:
        """Take the next reference; they come in the order of the WAL."""
        if reference.lsn != self._open_at:
            for expectation in self._open:
                expectation.limit = reference.lsn
            self._open.clear()
            self._open_at = reference.lsn
        if reference.fork == "fsm":  # written without WAL for the most part
            return
        fork = (reference.tablespace, reference.database, reference.relation, reference.fork)
        known = self.blocks.setdefault(fork, {})
        if self._keeps_lsn(reference):
            if reference.block in known:
                known[reference.block].unsure = True
            return
        self.count += reference.block not in known
        fresh = Expectation(reference.lsn, _NO_LIMIT, reference.rmgr == "XLOG")
        known[reference.block] = fresh
        self._open.append(fresh)

    def _keeps_lsn(self, reference: BlockReference) -> bool:
        if (reference.rmgr, reference.operation) in _PERHAPS_UNCHANGED:
            return True
        # Without checksums and wal_log_hints setting a page all visible does not change its LSN.
        visible = reference.rmgr == "Heap2" and reference.operation == "VISIBLE"
        return visible and reference.fork == "main" and not self._hints_are_logged

    def clear(self) -> None:
        """Forget all, to bound memory; what comes later is judged by itself."""
        self.blocks.clear()
        self._open.clear()
        self.count = 0


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
