"""Which transactions a question means: one by its xid, or all that committed between two positions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from knockwood.errors import RefusedError, UsageError
from knockwood.history.index import ArchiveIndex
from knockwood.history.transaction import Transaction
from knockwood.model.wal import Lsn

_XID = re.compile(r"(?:xid[-:])?(\d+)\Z", re.IGNORECASE)
_RANGE = re.compile(r"([0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8})\.\.([0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8})\Z")

_LOWER_HALF = 0xFFFF_FFFF
_FIRST_NORMAL_XID = 3


@dataclass(frozen=True, slots=True)
class OneTransaction:
    """The transaction with an xid (32 bits), also by that of one of its subtransactions."""

    xid: int

    def __str__(self) -> str:
        return f"transaction {self.xid}"


@dataclass(frozen=True, slots=True)
class Between:
    """All transactions whose commit records begin at `since` or later, and at `until` or before."""

    since: Lsn
    until: Lsn

    def __str__(self) -> str:
        return f"{self.since}..{self.until}"


Subject = OneTransaction | Between


def parse_subject(text: str) -> Subject:
    """Read `XID` or `LSN..LSN`; raises UsageError."""
    words = text.strip()
    if match := _XID.match(words):
        # pg_current_xact_id() prints the epoch in the upper half; WAL has the lower only.
        xid = int(match[1]) & _LOWER_HALF
        if xid < _FIRST_NORMAL_XID:
            raise UsageError(f"not the number of a transaction: {text}", hint="they begin at 3")
        return OneTransaction(xid)
    if match := _RANGE.match(words):
        since, until = Lsn.parse(match[1]), Lsn.parse(match[2])
        if until < since:
            raise UsageError(f"the range ends before it begins: {text}", hint=f"write {until}..{since}")
        return Between(since, until)
    raise UsageError(
        f"neither a transaction nor a range: {text!r}",
        hint="write XID, or LSN..LSN as in 0/3000028..0/3000990; `knockwood log` lists both",
    )


def transactions_of(index: ArchiveIndex, subject: Subject) -> tuple[Transaction, ...]:
    """The committed transactions that are meant and changed something, in order of their commits.

    Raises ObjectMissingError for an unknown xid, RefusedError where a part of the range is not in the index:
    a difference that lacks transactions would be a lie.
    """
    if isinstance(subject, OneTransaction):
        return (index.transaction(subject.xid),)
    for hole in index.not_covered:
        if hole.range.start <= subject.until and subject.since < hole.range.end:
            raise RefusedError(
                f"the WAL of {hole.range} cannot be told of: {hole.reason}",
                hint="choose a range that the archive covers",
            )
    covered = index.covered
    if not covered or subject.since < covered[0].start:
        begin = covered[0].start if covered else "nowhere"
        raise RefusedError(
            f"the archive begins at {begin}, after {subject.since}", hint="choose a later start"
        )
    if subject.until >= covered[-1].end:
        raise RefusedError(
            f"the archive ends at {covered[-1].end}, before {subject.until}",
            hint="has the primary's newest WAL arrived? `knockwood wal receive` brings it",
        )
    found = index.transactions(since=subject.since, until=subject.until + 1)
    return tuple(each for each in found if each.relations or each.catalog_changes)
