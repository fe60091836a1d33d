"""Whether the archive holds all that a transaction wrote: one that ran before it begins may have written more."""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence

from knockwood.errors import RefusedError
from knockwood.history.staging import StagedArchive
from knockwood.history.touched import read_stretch
from knockwood.history.transaction import Transaction
from knockwood.model.wal import Lsn
from knockwood.postgres.binaries import Programs
from knockwood.repository.repository import Repository

_RUNNING = re.compile(rb"^rmgr: Standby [^\n]*?desc: RUNNING_XACTS nextXid (\d+) ", re.MULTILINE)
_ROUND = 1 << 32


def require_whole(
    repository: Repository,
    programs: Programs,
    transactions: Sequence[Transaction],
    since: Lsn,
    following: MutableMapping[Lsn, int] | None = None,
) -> None:
    """Raise RefusedError unless each transaction got its xid where the archive has WAL without a gap.

    `since` is a position from which there is none (a backup's start). What is running is logged at every
    checkpoint, and a backup begins with one: a number given out after that belongs to a transaction that
    had written nothing before. Older ones are looked for from the archive's beginning on. `following` keeps the
    next number as of `since` for further questions.
    """
    known = following.get(since) if following is not None else None
    if known is not None and not _not_after(transactions, known):
        return
    last = max(transactions, key=lambda each: each.commit_lsn)
    archive = StagedArchive(repository, last.timeline, last.commit_lsn)
    found = _next_xid(programs, archive, since, last.commit_lsn)
    if following is not None and found is not None:
        following[since] = found
    doubtful = _not_after(transactions, found)
    if doubtful:
        begin = archive.unbroken_from(since)
        if begin < since:
            doubtful = _not_after(doubtful, _next_xid(programs, archive, begin, last.commit_lsn))
    if doubtful:
        first = doubtful[0]
        raise RefusedError(
            f"transaction {first.xid} may have been running before the archive's WAL begins: what it wrote there"
            " is not known",
            hint="only a transaction that began after the archive did can be told whole",
        )


def _not_after(transactions: Sequence[Transaction], following: int | None) -> list[Transaction]:
    """Those whose xid was given out before `following` was the next one (numbers go round)."""
    if following is None:
        return list(transactions)
    return [each for each in transactions if (each.xid - following) % _ROUND >= _ROUND // 2]


def _next_xid(programs: Programs, archive: StagedArchive, start: Lsn, end: Lsn) -> int | None:
    """The next xid as the first record from `start` on tells that logs what is running."""
    found: list[int] = []

    def take(block: bytes) -> None:
        if not found and (match := _RUNNING.search(block)):
            found.append(int(match[1]))

    for stretch in archive.stretches(start, end, chunk_bytes=archive.segment_bytes):
        read_stretch(programs, stretch, ["--rmgr=Standby"], take)
        if found:
            return found[0]
    return None
