"""Transactions of a protected server, found in its archive without the index."""

from __future__ import annotations

import re

from fix_clones import Protected
from knockwood.history.staging import StagedArchive
from knockwood.history.touched import read_stretch
from knockwood.history.transaction import Transaction
from knockwood.model import Lsn, Timeline
from knockwood.postgres.connection import connect, server_facts
from knockwood.postgres.waldump import parse_time
from knockwood.postgres.walreader import parse_lsn, record_end

_RECORD = re.compile(
    rb"^rmgr: (\w+) +len \(rec/tot\): +\d+/ +(\d+), tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+),"
    rb" prev [0-9A-F/]+, desc: ([^\n]*)",
    re.MULTILINE,
)
_COMMIT = re.compile(rb"COMMIT(?:_PREPARED (\d+):)? (\d{4}-\S+ \S+) UTC")
_CHILDREN = re.compile(rb"; subxacts:((?: \d+)+)")


def committed(made: Protected, since: Lsn) -> dict[int, Transaction]:
    """Every transaction that committed after `since`, by xid. All WAL so far is archived first."""
    with connect(made.server.dsn()) as connection:
        timeline = server_facts(connection).timeline
        row = connection.execute("select pg_current_wal_flush_lsn()::text").fetchone()
        assert row is not None
        end = Lsn.parse(row[0])
    made.flush()
    first: dict[int, Lsn] = {}
    found: dict[int, Transaction] = {}
    archive = StagedArchive(made.repository, Timeline(timeline), since)

    def take(block: bytes) -> None:
        for manager, size, xid, at, text in _RECORD.findall(block):
            lsn = Lsn(parse_lsn(at))
            if lsn >= since and int(xid):
                first.setdefault(int(xid), lsn)
            match = _COMMIT.match(text) if manager == b"Transaction" else None
            if match is None:
                continue
            top = int(match[1] or xid)
            children = _CHILDREN.search(text)
            below = tuple(map(int, children[1].split())) if children else ()
            begins = [first[each] for each in (top, *below) if each in first]
            found[top] = Transaction(
                top, Timeline(timeline), min(begins), lsn,
                record_end(lsn, int(size), made.repository.header.segment_bytes),
                parse_time(match[2]), below,
            )  # fmt: skip

    for stretch in archive.stretches(since, end):
        read_stretch(made.server.programs, stretch, [], take)
    return found
