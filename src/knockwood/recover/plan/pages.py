"""What is wrong with a page and which procedure is safe for it: values in, a judgement out. Pure.

Three places know a page: the disk, the server's buffers, and the WAL, which says what the last change to it
was. The damage is what they disagree on; the procedure follows from who is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from knockwood.model.wal import Lsn
from knockwood.recover.plan.page_wal import (
    PAGE_BYTES,
    BlockRecord,
    Poison,
    WalFacts,
    find_poison,
    only_read_since,
)

SEGMENT_PAGES: Final = 131072
FIRST_NORMAL_OID: Final = 16384
"""Relations with a lower oid are the catalogs and what initdb made (access/transam.h)."""


class PageClass(StrEnum):
    """What has happened to a page."""

    HEALTHY = "healthy"
    BAD_CHECKSUM = "bad checksum"
    MISDIRECTED = "misdirected"
    UNREADABLE = "unreadable"
    ZEROED = "zeroed"
    STALE = "stale"
    POISONED = "poisoned"
    GOOD_IN_BUFFERS = "good in buffers"
    INDEX = "index"
    MAP = "map"
    REFUSED = "refused"


class Procedure(StrEnum):
    """What heals it. In order of what it asks of those who use the table."""

    NOTHING = "nothing"
    WRITE = "write"
    """Nobody can read the page: the good image is written under a lock that lets readers and writers work."""
    SAVE_BUFFER = "save buffer"
    """The server holds the good page: have that one written."""
    REPLACE = "replace"
    """The bad page can be read: keep everyone away, drop it from the buffers, write the good image."""
    ROWS = "rows"
    """No good image of the present page exists: bring the lost changes over as rows."""
    REBUILD_MAP = "rebuild map"
    REINDEX = "reindex"
    REFUSE = "refuse"


LOCKS: Final = {
    Procedure.WRITE: "SHARE UPDATE EXCLUSIVE",
    Procedure.SAVE_BUFFER: "ACCESS EXCLUSIVE",
    Procedure.REPLACE: "ACCESS EXCLUSIVE",
    Procedure.ROWS: "SHARE ROW EXCLUSIVE",
}


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A page as the disk has it. `state`: good (header and checksum hold), zero, bad, missing (the file ends
    before it), unreadable (the disk says so). `belongs_to` are block numbers whose checksum it would fit."""

    state: str
    lsn: Lsn | None = None
    reason: str = ""
    belongs_to: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class InBuffers:
    """A page as the server's buffers have it. `state`: absent, present, unknown (nobody can tell)."""

    state: str
    lsn: Lsn | None = None
    zero: bool = False
    dirty: bool = False


@dataclass(frozen=True, slots=True)
class RelationFacts:
    """What the relation is. `kind` and `persistence` are pg_class's letters; `oid` tells catalogs."""

    oid: int
    kind: str
    persistence: str
    fork: str = "main"
    shared: bool = False
    method: str = "heap"


@dataclass(frozen=True, slots=True)
class ServerFactsForPages:
    """What the server offers. `can_evict`: pg_buffercache_evict (from 17 on); `sees_buffers`: pg_buffercache
    and pageinspect can be had."""

    checksums: bool
    full_page_writes: bool
    superuser: bool
    in_recovery: bool
    can_evict: bool
    sees_buffers: bool
    lax: tuple[str, ...] = ()
    """Settings that let damaged pages in: zero_damaged_pages, ignore_checksum_failure."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The class of a page, what to do, and why."""

    damage: PageClass
    procedure: Procedure
    reason: str

    @property
    def lock(self) -> str:
        return LOCKS.get(self.procedure, "nothing")


def classify(
    disk: OnDisk, buffers: InBuffers, wal: WalFacts, relation: RelationFacts, server: ServerFactsForPages
) -> Judgement:
    """Judge one block. Whatever is not proven safe is refused, with the reason."""
    refusal = _no_repair_of(relation)
    if refusal is not None:
        return _refuse(refusal)
    if relation.fork != "main":
        return Judgement(PageClass.MAP, Procedure.REBUILD_MAP, "the map holds no rows: it is made anew")
    if relation.kind == "i":
        return Judgement(PageClass.INDEX, Procedure.REINDEX, "an index is made anew from its table")
    refusal = _no_repair_on(server)
    if refusal is not None:
        return _refuse(refusal)
    if disk.state == "missing":
        return _refuse("the file ends before this block: a lost file or tail is not a damaged page")
    if disk.state in ("bad", "unreadable"):
        return _unreadable(disk, buffers, wal)
    return _readable(disk, buffers, wal, server)


def _no_repair_of(relation: RelationFacts) -> str | None:
    """Why nothing of this relation is repaired page by page."""
    if relation.shared or relation.oid < FIRST_NORMAL_OID:
        return "a system catalog: what else hangs on its rows cannot be seen; restore the cluster"
    if relation.persistence == "u":
        return "an unlogged table: no WAL tells what its pages were; truncate it or restore it from a backup"
    if relation.persistence == "t":
        return "a temporary table: it lives in its session only"
    if relation.fork == "init":
        return "an init fork belongs to an unlogged relation"
    if relation.kind == "S":
        return "a sequence: set it again with setval() from the largest number in use"
    if relation.kind == "m":
        return "a materialized view: make it anew with REFRESH MATERIALIZED VIEW"
    if relation.kind not in ("r", "t", "i"):
        return f"relations of kind {relation.kind!r} have no pages to repair"
    if relation.kind in ("r", "t") and relation.method != "heap":
        return f"its pages belong to the access method {relation.method}, not to heap"
    return None


def _no_repair_on(server: ServerFactsForPages) -> str | None:
    if server.in_recovery:
        return "the server is a standby: rebuild it from its primary"
    if not server.superuser:
        return "page repair needs a superuser"
    if not server.checksums:
        return "data_checksums is off: neither the damage nor the good image can be proven"
    if not server.full_page_writes:
        return "full_page_writes is off: a page of the backup may be torn, and no image in the WAL mends it"
    if server.lax:
        return f"{' and '.join(server.lax)} is on: a damaged page may have been read and written back"
    return None


def _unreadable(disk: OnDisk, buffers: InBuffers, wal: WalFacts) -> Judgement:
    """The server would not accept the page: if it has none in its buffers, nobody can read or change it."""
    damage = PageClass.UNREADABLE if disk.state == "unreadable" else PageClass.BAD_CHECKSUM
    if disk.belongs_to:
        damage = PageClass.MISDIRECTED
    if buffers.state == "present":
        return _saved(buffers, wal, f"{disk.reason}; the server still holds the page in its buffers")
    if buffers.state != "absent":
        return _refuse("whether the server holds the page in its buffers cannot be told")
    what = disk.reason or "the server does not accept it"
    if disk.belongs_to:
        blocks = " or ".join(str(block) for block in disk.belongs_to)
        what += f"; it carries the checksum of block {blocks}: check that one for a lost write"
    return Judgement(damage, Procedure.WRITE, f"{what}; no buffer holds it, so nobody can change it")


def _saved(buffers: InBuffers, wal: WalFacts, what: str) -> Judgement:
    if buffers.zero or buffers.lsn is None:
        return _refuse(f"{what}, but what it holds cannot be proven to be the newest")
    if not wal.known:
        return _refuse(f"{what}, but the WAL cannot be read to prove it the newest: {wal.reason}")
    if wal.poison is not None:
        return _refuse(f"{what}, but that one was made from a page that had lost changes")
    if buffers.lsn <= wal.newest:
        return _refuse(f"{what}, but that one is older ({buffers.lsn}) than its last record ({wal.newest})")
    return Judgement(
        PageClass.GOOD_IN_BUFFERS, Procedure.SAVE_BUFFER, f"{what}, which is the newest ({buffers.lsn})"
    )


def _readable(disk: OnDisk, buffers: InBuffers, wal: WalFacts, server: ServerFactsForPages) -> Judgement:
    """The server accepts the page: only the WAL can say that it is wrong."""
    if not wal.known:
        return _refuse(f"the page looks valid, and what it should be cannot be told: {wal.reason}")
    poison = wal.poison
    if poison is not None and only_read_since(wal.records, poison):
        reason = f"the page on disk is of {poison.stale_lsn}; since it was lost it was read, and nothing more"
        return _replaced(PageClass.STALE, reason, buffers, server)
    if poison is not None and _lost_again(disk, buffers, wal.records, poison):
        return _refuse(
            f"it had lost changes before the record at {poison.first_after}, and has lost some again: what was on it"
            " since cannot be told (a full backup after the first repair would tell)"
        )
    if poison is not None and poison.emptied:
        reason = (
            f"the record at {poison.first_after} was made from zeroes, taken for an empty page:"
            " all rows that were on it are lost on disk, and the archive went on without them"
        )
        return Judgement(PageClass.POISONED, Procedure.ROWS, reason)
    if poison is not None:
        return Judgement(
            PageClass.POISONED,
            Procedure.ROWS,
            f"the record at {poison.first_after} was made from an old page of {poison.stale_lsn};"
            f" {len(poison.lost)} changes before it are lost on disk and in the archive's image",
        )
    stale = disk.lsn is None or disk.lsn <= wal.newest
    if disk.state == "good" and wal.newest.value == 0:
        return Judgement(
            PageClass.HEALTHY,
            Procedure.NOTHING,
            f"the page is valid, and the WAL since {wal.since} names it nowhere",
        )
    if disk.state == "good" and not stale:
        return Judgement(PageClass.HEALTHY, Procedure.NOTHING, "the page is as the WAL left it")
    return _lost(disk, buffers, wal, server)


def _lost_again(disk: OnDisk, buffers: InBuffers, records: Sequence[BlockRecord], poison: Poison) -> bool:
    """Whether the page, used again after the damage, lacks changes made to it since then too.

    Bringing the first ones over as rows, or finding that this was done, would leave the others lost.
    """
    later = [record for record in records if record.lsn >= poison.first_after]
    if find_poison(later) is not None:
        return True
    shown = [lsn for lsn in (disk.lsn, buffers.lsn) if lsn is not None]
    return buffers.state != "unknown" and (not shown or max(shown) <= later[-1].lsn)


def _lost(disk: OnDisk, buffers: InBuffers, wal: WalFacts, server: ServerFactsForPages) -> Judgement:
    """The disk lacks a change that it should have; of a page that no WAL names the clone has to tell."""
    newest = wal.newest
    if buffers.state == "present" and not buffers.zero and buffers.lsn is not None and buffers.lsn > newest:
        if buffers.dirty:
            return Judgement(PageClass.HEALTHY, Procedure.NOTHING, "its newest change waits to be written")
        return _saved(buffers, wal, "the newest change was lost on its way to the disk")
    if wal.unread_image is not None:
        return _refuse(
            f"the full-page image at {wal.unread_image.lsn} cannot be read:"
            " whether the archive has a good image cannot be told"
        )
    damage = PageClass.ZEROED if disk.state == "zero" else PageClass.STALE
    shown = "zero" if disk.state == "zero" else f"of {disk.lsn}"
    told = (
        f"its last record is {newest}"
        if newest.value
        else f"it had rows before {wal.since} if the clone has them"
    )
    return _replaced(damage, f"the page on disk is {shown}, {told}", buffers, server)


def _replaced(damage: PageClass, reason: str, buffers: InBuffers, server: ServerFactsForPages) -> Judgement:
    """Replace a page that can be read, if it can be kept out of the buffers."""
    if not server.sees_buffers:
        return _refuse(
            "without pg_buffercache and pageinspect nobody can tell whether a buffer holds the page"
        )
    if not server.can_evict and buffers.state != "absent":
        return _refuse(
            "the server holds the bad page in its buffers, and this version cannot drop it:"
            " restart the server and try again at once, or wait until the page has left the buffers"
        )
    return Judgement(damage, Procedure.REPLACE, reason)


def segment_of(block: int) -> tuple[int, int]:
    """The number of the 1 GB file that holds a block of a fork, and the offset (bytes) inside it."""
    segment, page = divmod(block, SEGMENT_PAGES)
    return segment, page * PAGE_BYTES


def segment_path(path: str, block: int) -> str:
    """The file that holds a block; `path` is that of the fork's first file."""
    segment, _ = segment_of(block)
    return f"{path}.{segment}" if segment else path


def _refuse(reason: str) -> Judgement:
    return Judgement(PageClass.REFUSED, Procedure.REFUSE, reason)
