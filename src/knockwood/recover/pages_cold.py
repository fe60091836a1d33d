"""Good images of pages that need no clone: what nobody has changed since the backup is in it as it has to be, and what
was changed last by a record with an image of the whole page is in the WAL.

Reading them costs some frames of the backup and the WAL since. They are proven by the same rule as a clone's images
(`pages_images`): for a page that no WAL record names that is the backup's page, for another the one of which the LSN
is that of its last record.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from knockwood.errors import KnockwoodError
from knockwood.integrity.check import Subject
from knockwood.integrity.staged_wal import StagedWal
from knockwood.model.wal import Lsn
from knockwood.postgres.pages import sealed
from knockwood.postgres.walimages import WalImages
from knockwood.postgres.walrefs import RelationEvent, relation_events
from knockwood.recover import pages_facts as facts
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_images import Good, doubt
from knockwood.recover.plan.page_wal import BlockRecord, WalFacts
from knockwood.repository.backups.model import Backup
from knockwood.repository.backups.partial import read_blocks
from knockwood.repository.repository import Repository

_NONE: Final[frozenset[int]] = frozenset()


def cold_images(
    subject: Subject,
    repository: Repository,
    chain: Sequence[Backup],
    target: Target,
    blocks: Collection[int],
    beyond: Mapping[int, Lsn],
) -> tuple[Good | None, Mapping[int, WalFacts]]:
    """Images of those of the blocks that the WAL since a backup does not name, or has whole in their last record
    (None if there are none), and what the WAL says of all of them.

    `chain` ends with the backup, and begins with the full one that it builds on. Nothing is taken where the WAL
    since has made, dropped or truncated the relation, or cannot be read: that is left to a clone, which replays it. So
    are pages that are empty in the backup.
    """
    backup = chain[-1]
    if backup.timeline != subject.facts.timeline:
        return None, {}
    until = facts.flush_wal(subject, target.database)
    came_or_went: list[RelationEvent] = []
    images: dict[int, bytes] = {}
    programs = subject.server_programs

    def note(wal: StagedWal, records: Mapping[int, Sequence[BlockRecord]]) -> None:
        events = relation_events(programs, wal.folder, wal.timeline, wal.start, wal.end, wal.segment_bytes)
        came_or_went.extend(event for event in events if _main(event.path) == target.path)
        for block in (block for block, some in records.items() if some):
            images.pop(block, None)
        images.update(_last_images(wal, records))

    wal = facts.wal_facts(subject, target, blocks, backup.start_lsn, until, beyond, note)
    if came_or_went:
        return None, wal
    cold = [block for block in sorted(blocks) if wal[block].known and wal[block].last is None]
    try:
        images |= read_blocks(repository, backup, target.path, cold, chain[:-1]) if cold else {}
    except KnockwoodError:
        return None, wal  # what is wrong with the backup a clone of it finds, and says
    good = {
        block: image
        for block, image in images.items()
        if any(image) and doubt(image, block, wal[block]) is None
    }
    if not good:
        return None, wal
    return Good(until, backup.start_lsn, good, {block: wal[block] for block in good}, _NONE), wal


def _last_images(wal: StagedWal, records: Mapping[int, Sequence[BlockRecord]]) -> Iterator[tuple[int, bytes]]:
    """The blocks that their last record brings whole, as it leaves them."""
    with WalImages(wal.folder, wal.timeline, wal.segment_bytes) as raw:
        for block, some in records.items():
            if some and some[-1].image:
                last = some[-1]
                page = raw.page(last.lsn, last.number, last.end)
                if page is not None:
                    yield block, sealed(page, block)


def _main(path: str) -> str:
    """The relation's own file, for that of any of its forks."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.partition('_')[0]}"
