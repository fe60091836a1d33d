"""What the WAL says of a page: its changes, the newest, and whether one was made of a page that had lost some. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from knockwood.model.wal import Lsn

PAGE_BYTES: Final = 8192

HINT: Final = "XLOG FPI_FOR_HINT"
_LEAVE_ROWS_ALONE: Final = frozenset({HINT, "Heap2 VISIBLE"})
_MAY_FREE_ITEMS: Final = ("VACUUM", "XLOG FPI")
"""Heap2 VACUUM, PRUNE_VACUUM_SCAN and PRUNE_VACUUM_CLEANUP, and what VACUUM logs of an empty page. Pruning on access
(and all PRUNE before 17) leaves an item for each row that was a root."""

READS: Final = frozenset({HINT, "Heap2 PRUNE_ON_ACCESS"})
"""Records that readers write: hints, and rows removed that were dead to all, which are as dead on the true page.
(Before 17 the pruning of VACUUM, which goes on to remove index entries, has the same name: there it counts as a
change.)"""


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """A WAL record that names a block. `end` is where it ends: the LSN it leaves on the page.

    `image_lsn` is the page LSN inside its full-page image: that of the change before. None without an image,
    or where it cannot be read (`image` tells which). `number` is that of the block reference in the record.
    """

    lsn: Lsn
    end: Lsn
    kind: str
    image: bool = False
    image_lsn: Lsn | None = None
    xid: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True)
class Poison:
    """The first record made from a page that had lost changes: a clone replayed past it is wrong too.

    The changes `lost` were on the page once; what the page held instead ended at `stale_lsn` (0: zeroes, so
    that what was on it before these changes is lost too; then `lost` may be empty).
    """

    first_after: Lsn
    stale_lsn: Lsn
    lost: tuple[Lsn, ...]
    xids: tuple[int, ...] = ()

    @property
    def emptied(self) -> bool:
        """Whether all that was on the page is lost."""
        return self.stale_lsn.value == 0


@dataclass(frozen=True, slots=True)
class WalFacts:
    """What the WAL from `since` up to `until` says of a block. `records` in order; `reason`: why not known.

    `beyond` is the start of a record that changed the block, known from elsewhere and perhaps older than
    `since`: a page that is not beyond it lacks that change. `held`: whether the page is known to have had rows
    at `since`.
    """

    known: bool
    records: tuple[BlockRecord, ...] = ()
    since: Lsn = field(default_factory=lambda: Lsn(0))
    until: Lsn = field(default_factory=lambda: Lsn(0))
    reason: str = ""
    beyond: Lsn | None = None
    held: bool = False

    def gone_on(self, later: WalFacts, until: Lsn) -> WalFacts:
        """With what WAL read from `self.until` or before says, up to `until`."""
        if not later.known:
            return replace(self, known=False, reason=later.reason)
        more = (record for record in later.records if self.until <= record.lsn < until)
        return replace(self, records=(*self.records, *more), until=until)

    @property
    def last(self) -> BlockRecord | None:
        return self.records[-1] if self.records else None

    @property
    def newest(self) -> Lsn:
        """The start of the last change known, wherever from; 0 if none is. The right page's LSN is after it."""
        last = self.last.lsn if self.last else Lsn(0)
        return last if self.beyond is None else max(last, self.beyond)

    @property
    def poison(self) -> Poison | None:
        found = (find_poison(self.records, self.beyond), find_begun_anew(self.records, held=self.held))
        return min((each for each in found if each), key=lambda each: each.first_after, default=None)

    @property
    def unread_image(self) -> BlockRecord | None:
        """The first full-page image of which nobody can tell whether it lacks a change made before it."""
        for number, record in enumerate(self.records):
            older = number > 0 or (self.beyond is not None and self.beyond < record.lsn)
            if older and record.image and record.image_lsn is None:
                return record
        return None


def only_read_since(records: Sequence[BlockRecord], poison: Poison) -> bool:
    """Whether all that the WAL has of the block since the damage was written by readers.

    Then nothing was built on the bad page: the page from just before the first of them is still the newest.
    """
    return all(record.kind in READS for record in records if record.lsn >= poison.first_after)


def find_poison(records: Sequence[BlockRecord], beyond: Lsn | None = None) -> Poison | None:
    """The first full-page image that was taken of a page which lacked changes made before.

    An image is taken before its own record's LSN is set, so the page LSN inside it is the end of the change
    before. If it is not beyond the start of the change that WAL has before, that change was lost in between.
    Images for hint bits may be logged twice at once and count as no change of their own. `beyond` is the start
    of a change that is known from elsewhere, for what comes after it.
    """
    changes: list[BlockRecord] = []
    for record in records:
        if record.image and record.image_lsn is not None:
            lost = {change.lsn: change.xid for change in changes if record.image_lsn <= change.lsn}
            if beyond is not None and record.image_lsn <= beyond < record.lsn:
                lost.setdefault(beyond, 0)
            if lost:
                xids = sorted({xid for xid in lost.values() if xid})
                return Poison(record.lsn, record.image_lsn, tuple(sorted(lost)), tuple(xids))
        if record.kind != HINT:
            changes.append(record)
    return None


def find_begun_anew(records: Sequence[BlockRecord], *, held: bool) -> Poison | None:
    """The first record that began the page anew although rows were on it: it had been zeroed, and was taken for
    a free one.

    PostgreSQL logs an insertion with +INIT (heap_insert, heap_multi_insert, heap_update) where the row is the
    page's first item and there is no other: on a new page, and on one whose items VACUUM has all freed. So no
    change but one of those may come before it; `held` says that the page had rows before all of the records.
    """
    changes: list[BlockRecord] = []
    rows_there = held
    for record in records:
        if record.kind.endswith("+INIT"):
            if rows_there:
                xids = sorted({change.xid for change in changes if change.xid})
                return Poison(record.lsn, Lsn(0), tuple(change.lsn for change in changes), tuple(xids))
            changes = []
        if record.kind not in _LEAVE_ROWS_ALONE:
            changes.append(record)
            rows_there = not any(word in record.kind for word in _MAY_FREE_ITEMS)
    return None


def proves_newest(image_lsn: Lsn, wal: WalFacts) -> str | None:
    """Why an image with this page LSN is not proven to be the newest of its block; None if it is."""
    if not wal.known:
        return wal.reason or "the WAL could not be read"
    if wal.beyond is not None and image_lsn <= wal.beyond:
        return (
            f"it is of {image_lsn}, before the record at {wal.beyond} that is known to have changed the block"
        )
    poison = wal.poison
    if poison is not None:
        return f"the image at {poison.first_after} was made from a page that had lost changes"
    if wal.beyond is not None and wal.unread_image is not None:
        return f"whether the image at {wal.unread_image.lsn} lacks changes cannot be told: it cannot be read"
    last = wal.last
    if last is None:
        if image_lsn > wal.since:
            return f"its LSN {image_lsn} is after {wal.since}, and the WAL since then does not name the block"
        return None
    if image_lsn <= last.lsn:
        return f"it is of {image_lsn}, before the block's last record at {last.lsn}"
    if image_lsn.value > last.end.value + PAGE_BYTES:
        return f"it is of {image_lsn}, after the block's last record, which ends at {last.end}"
    return None
