"""Index entries without their rows: what zeroed, old and cut-off heap pages leave behind.

Counting does not see it: a scan through an index fetches the row from the damaged page and drops the
entry in silence, and an index-only scan counts it only where the page is all visible. But no healthy
index entry ever points at an unused or missing item: VACUUM removes the entries first. So every entry of
one btree index per table is followed, in the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from knockwood.errors import PostgresError
from knockwood.integrity.budget import pace
from knockwood.integrity.catalog import Relation, relations
from knockwood.integrity.check import NotChecked, Outcome, Subject, Weight
from knockwood.integrity.databases import attempt, in_each_database
from knockwood.integrity.extensions import schema_of
from knockwood.integrity.index_pages import DanglingMap, leaf_entries
from knockwood.integrity.relation_files import DataFiles, data_files
from knockwood.model import Finding, Lsn, Severity
from knockwood.postgres.connection import Connection, translated
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES, bad_pages, decode_header

_CHUNK: Final = 4 << 20
_ROUNDS: Final = 3
_WORDS: Final = {
    "zero": "the page is all zeros, and an index has entries for rows on it",
    "unused": "an index has entries for rows that the page does not hold",
    "beyond the end": "the table ends before this block, and an index has entries for rows on it",
}
_GONE: Final = ("zero", "beyond the end")

# One full btree index per table, the smallest: each row must be in it.
_PAIRS: Final = """
select distinct on (i.indrelid) i.indrelid::int8, i.indexrelid::int8
from pg_catalog.pg_index i
join pg_catalog.pg_class x on x.oid = i.indexrelid
join pg_catalog.pg_am a on a.oid = x.relam
where a.amname = 'btree' and i.indisvalid and i.indisready and i.indpred is null and x.relkind = 'i'
order by i.indrelid, x.relpages, i.indexrelid
"""


class HeapIndexCounts:
    """Follows every entry of one btree index per table to its row."""

    name = "heap_index_counts"
    title = "Rows that an index knows and the table lacks"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        with data_files(subject) as data:

            def look(connection: Connection, database: str) -> Iterator[Outcome]:
                known = {relation.oid: relation for relation in relations(connection, database)}
                for table_oid, index_oid in connection.execute(_PAIRS).fetchall():
                    table, index = known.get(table_oid), known.get(index_oid)
                    if table is None or index is None or not _stored(table, subject):
                        continue
                    pair = _Pair(subject, data, connection, table, index)
                    yield from attempt(self.name, f"database {database}, table {table.name}", pair.run)

            yield from in_each_database(subject, self.name, look)


def _stored(table: Relation, subject: Subject) -> bool:
    return table.persistence == "p" and table.method == "heap" and table.kind in ("r", "m", "t")


@dataclass(frozen=True, slots=True)
class _Suspect:
    heap_block: int
    item: int
    index_block: int


_Verdicts = dict[_Suspect, str | None]


class _Pair:
    def __init__(
        self, subject: Subject, data: DataFiles, connection: Connection, table: Relation, index: Relation
    ) -> None:
        self.subject = subject
        self.data = data
        self.connection = connection
        self.table = table
        self.index = index

    def run(self) -> Iterator[Outcome]:
        heap = DanglingMap()
        for first, pages in self._chunks(self.table.path):
            heap.add_heap_pages(first, pages)
        suspects: dict[int, _Suspect] = {}
        entries = 0
        for first, pages in self._chunks(self.index.path):
            blocks, rows, items = leaf_entries(pages, first)
            entries += len(blocks)
            wrong = heap.dangling(rows, items)
            for at in wrong[np.unique(rows[wrong], return_index=True)[1]]:
                suspects.setdefault(int(rows[at]), _Suspect(int(rows[at]), int(items[at]), int(blocks[at])))
        if suspects:
            yield from self._settle(list(suspects.values()), entries)

    def _chunks(self, path: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The fork's pages, in pieces: the first block's number and the pages (n, 8192)."""
        segment = 0
        while True:
            offset = 0
            name = f"{path}.{segment}" if segment else path
            while chunk := self.data.read(name, offset, _CHUNK):
                whole = len(chunk) - len(chunk) % PAGE_BYTES
                if not whole:
                    break
                pages = np.frombuffer(chunk, np.uint8, whole).reshape(-1, PAGE_BYTES)
                yield segment * SEGMENT_PAGES + offset // PAGE_BYTES, pages
                offset += whole
                pace(self.subject)
            if offset < SEGMENT_PAGES * PAGE_BYTES:
                return
            segment += 1

    def _settle(self, suspects: list[_Suspect], entries: int) -> Iterator[Outcome]:
        """Only what a checkpoint confirms: of two pages that have not changed since its redo position the
        disk holds the state at that very position, so an entry and its row must agree."""
        open_ones = suspects
        for attempt_number in range(_ROUNDS):
            # Most suspects only wait to be flushed: the last checkpoint tells that without a new one.
            redo = self._checkpoint() if attempt_number else self._redo()
            verdicts = self._confirmed({suspect: self._again(suspect, redo) for suspect in open_ones}, redo)
            for suspect, verdict in verdicts.items():
                if verdict in _WORDS:
                    yield self._finding(suspect, verdict, entries)
            yield from self._not_known(
                s.heap_block for s, verdict in verdicts.items() if verdict == "unknown"
            )
            open_ones = [suspect for suspect, verdict in verdicts.items() if verdict == "changing"]
            if not open_ones:
                return
        blocks = sorted({suspect.heap_block for suspect in open_ones})
        yield NotChecked(
            HeapIndexCounts.name,
            f"table {self.table.name}: {len(blocks)} blocks changed again each time they were looked at"
            f" (the first: {blocks[0]}); no checkpoint lay between, or writers were faster",
        )

    def _confirmed(self, verdicts: _Verdicts, redo: Lsn) -> _Verdicts:
        """A file that VACUUM cut, extended with zeros again or not, shows that on disk at once; the index
        shows only when it is flushed that its entries went before. So for pages that are gone the server's
        own index page must be as old, or a checkpoint that begins now must not change the answer."""
        gone = [suspect for suspect, verdict in verdicts.items() if verdict in _GONE]
        if not gone:
            return verdicts
        schema = schema_of(self.subject, self.connection, "pageinspect")
        if schema is not None and self.subject.facts.is_superuser:
            return verdicts | {s: self._by_server(schema, s, redo, verdicts[s]) for s in gone}
        seen, later = self._now(), self._checkpoint()
        # In recovery a checkpoint is made only where the WAL has one.
        return verdicts | {s: self._again(s, later) if later >= seen else "unknown" for s in gone}

    def _by_server(self, schema: str, suspect: _Suspect, redo: Lsn, verdict: str | None) -> str | None:
        """The verdict after a look at the index page as the server has it, be it on disk yet or not."""
        query = sql.SQL("select {}.get_raw_page(%s, 'main', %s)").format(sql.Identifier(schema))
        with translated():
            row = self.connection.execute(
                query, [self.index.name, suspect.index_block], binary=True
            ).fetchone()
        assert row is not None
        leaf = np.frombuffer(row[0], np.uint8).reshape(1, PAGE_BYTES)
        if _lsn(leaf) < redo:
            return verdict
        _, rows, _ = leaf_entries(leaf, suspect.index_block)
        return "changing" if suspect.heap_block in rows else None

    def _not_known(self, heap_blocks: Iterable[int]) -> Iterator[NotChecked]:
        if blocks := sorted(set(heap_blocks)):
            yield NotChecked(
                HeapIndexCounts.name,
                f"table {self.table.name}: {len(blocks)} blocks are gone from disk (the first: {blocks[0]}), and"
                " whether their rows are gone from the index too is not on disk yet: no checkpoint could be"
                " made, and pageinspect is not there or not allowed",
            )

    def _now(self) -> Lsn:
        """The end of the WAL: whatever was read from disk was written before it."""
        with translated():
            row = self.connection.execute(
                "select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn()"
                " else pg_catalog.pg_current_wal_insert_lsn() end::text"
            ).fetchone()
        assert row is not None
        return Lsn.parse(row[0])

    def _checkpoint(self) -> Lsn:
        try:
            with self.subject.connect() as connection, translated():
                connection.execute("checkpoint")
        except PostgresError:
            pass  # not allowed: the last checkpoint there was has to do
        return self._redo()

    def _redo(self) -> Lsn:
        with translated():
            row = self.connection.execute(
                "select redo_lsn::text from pg_catalog.pg_control_checkpoint()"
            ).fetchone()
        assert row is not None
        return Lsn.parse(row[0])

    def _again(self, suspect: _Suspect, redo: Lsn) -> str | None:
        """What is wrong with the row's item, `changing` if it cannot be told, None if all is well."""
        leaf = self._page(self.index.path, suspect.index_block)
        heap = self._page(self.table.path, suspect.heap_block)
        if leaf is None or not self._same_paths():
            return None
        _, rows, items = leaf_entries(leaf, suspect.index_block)
        mine = items[rows == suspect.heap_block]
        if not len(mine) or self._unreadable(leaf, suspect.index_block):
            return None
        verdict = "beyond the end" if heap is None else self._state(heap, suspect.heap_block, mine)
        if verdict is None or (heap is not None and _lsn(heap) >= redo):
            return None  # a page written since is the server's own, not what a disk lost
        return "changing" if _lsn(leaf) >= redo else verdict

    def _state(self, heap: NDArray[np.uint8], block: int, items: NDArray[np.int64]) -> str | None:
        known = DanglingMap()
        known.add_heap_pages(block, heap)
        if not len(known.dangling(np.full(len(items), block, np.int64), items)):
            return None
        if self._unreadable(heap, block):
            return None  # page_checksums names it
        return "zero" if not heap.any() else "unused"

    def _unreadable(self, page: NDArray[np.uint8], block: int) -> bool:
        return bool(bad_pages(page.tobytes(), block, self.subject.facts.checksums))

    def _page(self, path: str, block: int) -> NDArray[np.uint8] | None:
        segment, rest = divmod(block, SEGMENT_PAGES)
        page = self.data.read(f"{path}.{segment}" if segment else path, rest * PAGE_BYTES, PAGE_BYTES)
        return np.frombuffer(page, np.uint8).reshape(1, PAGE_BYTES) if len(page) == PAGE_BYTES else None

    def _same_paths(self) -> bool:
        """Whether neither was dropped or rewritten meanwhile."""
        with translated():
            row = self.connection.execute(
                "select pg_catalog.pg_relation_filepath(%s::oid), pg_catalog.pg_relation_filepath(%s::oid)",
                [self.table.oid, self.index.oid],
            ).fetchone()
        return row == (self.table.path, self.index.path)

    def _finding(self, suspect: _Suspect, verdict: str, entries: int) -> Finding:
        return Finding(
            HeapIndexCounts.name,
            Severity.CRITICAL,
            self.table.location(self.table.path, suspect.heap_block),
            _WORDS[verdict],
            "the rows of this page are gone from the table without an error: queries return fewer rows",
            "bring the page back from the newest clean backup and the WAL: knockwood recover."
            " Do not REINDEX: the index is the proof of what is missing",
            {
                "item": suspect.item,
                "index": self.index.name,
                "index_block": suspect.index_block,
                "index_entries": entries,
                "state": verdict,
            },
        )


def _lsn(page: NDArray[np.uint8]) -> Lsn:
    return decode_header(page.tobytes()).lsn


CHECK = HeapIndexCounts()
