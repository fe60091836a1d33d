"""Have the WAL hold mended pages whole.

A page that is written to its file is in no WAL: standbys, clones, restores and incremental backups go on with what they
had, which is the damaged page where a backup was taken in between, or the page was read and so logged. A lock on one of
its rows changes nothing that anybody sees, but is a record; and the first record of a page after a checkpoint brings
all of it (`full_page_writes`). The transaction that takes it is rolled back, like everything else of a repair session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psycopg

from knockwood.postgres.pages import decode_header
from knockwood.recover import pages_facts as facts
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_session import Session


def log_pages(session: Session, target: Target, images: Mapping[int, bytes]) -> list[int]:
    """The blocks of which the WAL has an image by now that is as new as the one given, or newer.

    Others have no row that can be locked (all are dead, or it is a TOAST table), were logged since the last checkpoint
    already, or the server's full_page_writes is off.
    """
    if target.kind != "r" or target.persistence != "p":
        return []
    begin = facts.flush_wal(session.subject, target.database)
    _lock_rows(session, target, sorted(images))
    end = facts.flush_wal(session.subject, target.database)
    told = facts.wal_facts(session.subject, target, images, begin, end)
    return [
        block
        for block, page in sorted(images.items())
        if told[block].known
        and any(
            record.image_lsn is not None and record.image_lsn >= decode_header(page).lsn
            for record in told[block].records
        )
    ]


def _lock_rows(session: Session, target: Target, blocks: Sequence[int]) -> None:
    """Lock one row of each block that has one; all at once, one by one only where one cannot be read."""
    connection = session.connection
    try:
        with connection.transaction(), connection.pipeline():
            for block in blocks:
                connection.execute(_statement(target, block))
    except psycopg.Error:
        if connection.closed or len(blocks) == 1:
            return
        for block in blocks:
            _lock_rows(session, target, [block])


def _statement(target: Target, block: int) -> bytes:
    return (
        f"select 1 from only {target.name} where ctid >= '({block},0)'::tid and ctid < '({block + 1},0)'::tid"
        " limit 1 for key share skip locked"
    ).encode()
