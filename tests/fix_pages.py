"""Pages to judge, and what the WAL says of them."""

from __future__ import annotations

from knockwood.model import Lsn
from knockwood.recover.plan.page_wal import (
    BlockRecord,
    WalFacts,
)
from knockwood.recover.plan.pages import (
    InBuffers,
    RelationFacts,
    ServerFactsForPages,
)

TABLE = RelationFacts(20000, "r", "p")

SERVER = ServerFactsForPages(
    checksums=True,
    full_page_writes=True,
    superuser=True,
    in_recovery=False,
    can_evict=True,
    sees_buffers=True,
)

ABSENT = InBuffers("absent")

LAST = BlockRecord(Lsn(5000), Lsn(5100), "Heap UPDATE")
WAL = WalFacts(True, (BlockRecord(Lsn(1000), Lsn(1100), "Heap INSERT"), LAST), Lsn(500), Lsn(9000))
KNOWN = WalFacts(True, (), Lsn(6000), Lsn(9000), beyond=Lsn(4000))
"""Of a change from before the WAL that was read."""


def chain(*pieces: tuple[int, str, int | None]) -> list[BlockRecord]:
    return [
        BlockRecord(
            Lsn(at), Lsn(at + 50), kind, inner is not None, None if inner is None else Lsn(inner), xid=at
        )
        for at, kind, inner in pieces
    ]
