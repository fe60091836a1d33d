"""Good images of pages from a clone, each proven from WAL to be the newest of its block."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from knockwood.errors import RefusedError
from knockwood.host.direct import read_block
from knockwood.integrity.check import Subject
from knockwood.model.wal import Lsn
from knockwood.postgres.connection import connect, translated
from knockwood.postgres.pages import bad_pages, decode_header
from knockwood.recover.pages_facts import NOTHING_KNOWN, Target, wal_facts
from knockwood.recover.plan.page_wal import PAGE_BYTES, WalFacts, proves_newest
from knockwood.recover.plan.pages import segment_of, segment_path
from knockwood.repository.plans import RestorePlan


class CloneOfFiles(Protocol):
    """What is asked of a clone: its files and how far it has replayed."""

    reached_lsn: Lsn
    promoted: bool
    plan: RestorePlan

    @property
    def entrance(self) -> str: ...

    @property
    def data_directory(self) -> Path: ...

    def dsn(self, database: str = "postgres") -> str: ...

    def promote(self) -> None: ...


class UnprovenError(RefusedError):
    """The clone's image of a block is not proven to be the newest good one."""


@dataclass(frozen=True, slots=True)
class Good:
    """Images of blocks as of `reached`, and what the WAL from `since` up to there says of them.

    `doubts` are blocks of which no image is proven, with the reason. `empty` are blocks that are all zeros on
    the clone too, and that no WAL names: nothing ever was on them.
    """

    reached: Lsn
    since: Lsn
    images: Mapping[int, bytes]
    wal: Mapping[int, WalFacts]
    empty: frozenset[int] = frozenset()
    doubts: Mapping[int, str] = field(default_factory=dict)


def good_images(
    subject: Subject,
    clone: CloneOfFiles,
    target: Target,
    blocks: Collection[int],
    *,
    beyond: Mapping[int, Lsn] = NOTHING_KNOWN,
    known: Mapping[int, WalFacts] | None = None,
    may_promote: bool = True,
    since: Lsn | None = None,
) -> Good:
    """The newest images of the blocks as of where the clone stands.

    A page on the clone's disk is believed when its LSN is that of the last record for its block, in the WAL
    as the server or the archive has it, and after the record in `beyond`, if one is known to have changed the
    block. Pages that are still in the clone's buffers only need a checkpoint
    there; one that has replayed none since its last must be promoted for it, and can replay no further then.
    What is not proven is in `doubts`. What is `known` of the WAL since the clone's backup is not read again. `since`
    is a later position up to which every change is on the clone's disk.
    """
    since = since or clone.plan.chain[-1].start_lsn
    wal = _facts(subject, target, blocks, since, clone.reached_lsn, beyond, known or {})
    images, doubts = _read(clone, target, blocks, wal)
    if doubts:
        _checkpoint(clone)
        images, doubts = _read(clone, target, blocks, wal)
    if doubts and may_promote and not clone.promoted:
        clone.promote()
        _checkpoint(clone)
        images, doubts = _read(clone, target, blocks, wal)
    empty = frozenset(block for block, image in images.items() if not any(image))
    return Good(clone.reached_lsn, since, images, wal, empty, doubts)


def _facts(
    subject: Subject,
    target: Target,
    blocks: Collection[int],
    since: Lsn,
    until: Lsn,
    beyond: Mapping[int, Lsn],
    known: Mapping[int, WalFacts],
) -> Mapping[int, WalFacts]:
    """What the WAL in [since, until) says, going on from what is known of all the blocks."""
    some = [known[block] for block in blocks if block in known]
    usable = all(each.known and each.since == since and each.until <= until for each in some)
    if len(some) < len(set(blocks)) or not some or not usable:
        return wal_facts(subject, target, blocks, since, until, beyond)
    later = wal_facts(subject, target, blocks, min(each.until for each in some), until, beyond)
    return {block: known[block].gone_on(later[block], until) for block in blocks}


def require_proven(target: Target, doubts: Mapping[int, str]) -> None:
    """Raise UnprovenError, naming a block and the reason, if there is a doubt."""
    if doubts:
        block, reason = min(doubts.items())
        more = f" (and {len(doubts) - 1} more)" if len(doubts) > 1 else ""
        raise UnprovenError(
            f"the clone's image of block {block}{more} is not proven good: {reason}",
            where=target.name,
            hint="restore the table, or the cluster, from a backup from before the damage",
        )


def _checkpoint(clone: CloneOfFiles) -> None:
    with connect(clone.dsn(clone.entrance)) as connection, translated():
        connection.execute("checkpoint")


def _read(
    clone: CloneOfFiles, target: Target, blocks: Collection[int], wal: Mapping[int, WalFacts]
) -> tuple[dict[int, bytes], dict[int, str]]:
    images: dict[int, bytes] = {}
    doubts: dict[int, str] = {}
    for block in blocks:
        _, offset = segment_of(block)
        image = read_block(clone.data_directory / segment_path(target.path, block), offset, PAGE_BYTES)
        if len(image) < PAGE_BYTES and wal[block].known and wal[block].newest.value == 0:
            image = bytes(PAGE_BYTES)  # zero pages at the end of a file are made without WAL
        reason = doubt(image, block, wal[block])
        if reason is None:
            images[block] = image
        else:
            doubts[block] = reason
    return images, doubts


def doubt(image: bytes, block: int, wal: WalFacts) -> str | None:
    """Why an image is not proven to be the newest good one of the block; None if it is."""
    if len(image) < PAGE_BYTES:
        return "its file ends before the block (was the table truncated or rewritten?)"
    if not any(image):
        named = not wal.known or wal.newest.value > 0
        return "it is all zeros there too" if named else None
    for _, reason in bad_pages(image, block, True):
        return f"it is damaged there too: {reason}"
    return proves_newest(decode_header(image).lsn, wal)
