"""Rows before and after, gathered from a clone into a store, table by table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from knockwood.errors import InternalError
from knockwood.history.chains import ChainId, Chains, Place, follow_moves
from knockwood.history.ddl import LARGE_OBJECTS, STATISTICS
from knockwood.history.reading import Reader, Row, updaters
from knockwood.history.rowstore import AFTER, BEFORE, Entry, RowStore
from knockwood.history.shapes import Catalog, Relation, TableShape, databases_of, open_catalog
from knockwood.history.standing import Standing
from knockwood.history.touched import FileId, Touched, TouchedFile
from knockwood.history.transaction import ColumnValue, TableId


@dataclass(frozen=True, slots=True)
class Unread:
    """Rows that a transaction changed and that are not given: where, why, and how many if known."""

    table: TableId | str
    reason: str
    rows: int | None = None

    def as_json(self) -> dict[str, object]:
        return {"table": str(self.table), "reason": self.reason, "rows": self.rows}


class Gathering:
    """Reads what `touched` names: some tables at a stop where they are not locked yet, the rest before
    the commit, all of them after it.

    `table` (schema or None, name) leaves out all but that table and its partitions. `strict` checks raw
    xmax and xmin against the transactions (before: only where they have written already).
    """

    def __init__(
        self, touched: Touched, store: RowStore, whole_limit: int, table: tuple[str | None, str] | None
    ) -> None:
        self._touched = touched
        self._store = store
        self._whole_limit = whole_limit
        self._table = table
        files = sorted({*touched.files, *touched.dropped, *touched.created})
        self._numbers: dict[FileId, int] = {file: number for number, file in enumerate(files)}
        self.before: dict[int, TableShape] = {}
        self.after: dict[int, TableShape] = {}
        self.unread: list[Unread] = []
        self.notes: list[str] = []
        self.catalogs: set[str] = set()
        self.catalogs_of: set[int] = set()
        self._relations: dict[FileId, Relation] = {}
        self._whole: dict[int, int] = {}
        self._done: set[FileId] = set()

    def shape(self, file: int, side: int) -> TableShape:
        return (self.before if side == BEFORE else self.after)[file]

    # --- before ------------------------------------------------------------------------------------

    def read_before(self, clone: Standing, locked: Collection[tuple[int, int]] | None, strict: bool) -> None:
        """Read the tables among the `locked` (database, oid), None: all that were not read yet."""
        for database, catalog in self._catalogs(clone):
            with catalog:
                found = self._look(catalog, database)
                if locked is not None:
                    mine = [oid for base, oid in locked if base == database]
                    owners = catalog.owners(mine) if mine else set()
                    found = [relation for relation in found if relation.oid in owners]
                else:
                    self._remark(catalog)
                # What was read at an earlier stop is locked by now.
                found = [relation for relation in found if relation.file not in self._done]
                shapes = catalog.shapes([relation.oid for relation in found])
                self._done.update(relation.file for relation in found)
                for shape in shapes.values():
                    self._read_before(clone, catalog, shape, strict)

    def _look(self, catalog: Catalog, database: int) -> list[Relation]:
        """The users' tables among the touched files; catalogs are noted."""
        files = [file for file in self._numbers if file[1] in (database, 0)]
        found = catalog.relations(files)
        mine = {file: found[file] for file in files if file in found}
        self._relations.update(mine)
        written = {r.name for f, r in mine.items() if r.is_catalog and f in self._touched.files}
        self.catalogs |= written
        if written - STATISTICS - LARGE_OBJECTS:
            self.catalogs_of.add(database)
        tables = [relation for relation in mine.values() if relation.is_plain_table]
        if self._table is not None:
            wanted = set(catalog.named(*self._table))
            tables = [relation for relation in tables if relation.oid in wanted]
        return tables

    def _remark(self, catalog: Catalog) -> None:
        unlogged = catalog.unlogged()
        if unlogged:
            names = ", ".join(unlogged[:5]) + (" and others" if len(unlogged) > 5 else "")
            self.notes.append(
                f"unlogged tables have no WAL: what was done to {names} of {catalog.database} is not known"
            )
        views = [r for f, r in self._relations.items() if r.kind == "m" and f in self._touched.files]
        self.notes += [f"rows of materialized view {r.schema}.{r.name} are not compared" for r in views]

    def _read_before(self, clone: Standing, catalog: Catalog, shape: TableShape, strict: bool) -> None:
        number = self._numbers[shape.file]
        self.before[number] = shape
        reader = Reader(catalog, shape, clone.held(shape.file))
        if shape.file in self._touched.dropped:
            self._read_whole(reader, shape, number, BEFORE)
            return
        touched = self._touched.files.get(shape.file)
        if touched is None:
            return
        origins: dict[Place, int] = {}
        for net in touched.chains.net():
            if net.origin is not None:
                # A place used again later: what lay there before is the first.
                origins.setdefault(net.origin, net.number)
        rows = reader.at(sorted(origins))
        if strict:
            rows = self._checked_before(catalog, shape, rows)
        kept = self._store.put(
            BEFORE, shape.family, ((number, origins[row.place], *_keyed(shape, row)) for row in rows)
        )
        if kept != len(origins):
            self._account_for(shape, origins, touched, number)

    def _checked_before(self, catalog: Catalog, shape: TableShape, rows: Iterable[Row]) -> Iterator[Row]:
        """Every row names one of the transactions as the one that deleted it, alone or in a multixact."""
        xids = self._touched.xids
        multis: dict[int, bool] = {}
        for row in rows:
            if row.xmax not in xids:
                if row.xmax not in multis:
                    multis[row.xmax] = bool(updaters(catalog.connection, [row.xmax]) & xids)
                if not multis[row.xmax]:
                    raise InternalError(
                        f"a row of {shape.table} carries xmax {row.xmax}, not that of the transaction",
                        where=f"block {row.place >> 16}, offset {row.place & 0xFFFF}",
                    )
            yield row

    def _account_for(
        self, shape: TableShape, origins: Mapping[Place, int], touched: TouchedFile, file: int
    ) -> None:
        """Old versions that are not visible are rows that the transaction itself put at unknown offsets."""
        lost = [
            place
            for place, chain in origins.items()
            if place >> 16 not in touched.vague and not self._store.has(BEFORE, file, chain)
        ]
        if lost:
            raise InternalError(
                f"{len(lost)} rows of {shape.table} that were changed are not on the clone",
                where=f"block {lost[0] >> 16}, offset {lost[0] & 0xFFFF}",
            )

    def _read_whole(self, reader: Reader, shape: TableShape, number: int, side: int) -> None:
        count = reader.count()
        self._whole[number] = count
        if count > self._whole_limit:
            self.unread.append(
                Unread(
                    shape.table,
                    f"its file was replaced (truncated or rewritten) and it holds more than "
                    f"{self._whole_limit:,} rows {'before' if side == BEFORE else 'after'} ({shape.bytes:,} bytes)",
                    count,
                )
            )
            return
        entries = ((number, at, *_keyed(shape, row, always=True)) for at, row in enumerate(reader.all()))
        self._store.put(side, shape.family, entries)

    # --- after -------------------------------------------------------------------------------------

    def read_after(self, clone: Standing) -> None:
        """Read everything on the clone after the commit, and settle what became of which row."""
        survivors: set[tuple[str, int]] = set()
        for database, catalog in self._catalogs(clone):
            with catalog:
                found = self._look(catalog, database)
                known = [
                    shape.oid for shape in self.before.values() if shape.table.database == catalog.database
                ]
                shapes = catalog.shapes([*known, *(relation.oid for relation in found)])
                survivors |= {(catalog.database, oid) for oid in shapes}
                for relation in found:
                    self._read_after(clone, catalog, shapes[relation.oid])
        self._leave_out_dropped(survivors)
        self._store.move(self._moves())
        self._store.join()
        self._leave_out_halves()
        if self.catalogs & LARGE_OBJECTS:
            self.unread.append(Unread("large objects", "their content is not compared"))

    def _read_after(self, clone: Standing, catalog: Catalog, shape: TableShape) -> None:
        number = self._numbers[shape.file]
        self.after[number] = shape
        reader = Reader(catalog, shape, clone.held(shape.file))
        if shape.file in self._touched.created:
            self._read_whole(reader, shape, number, AFTER)
            return
        touched = self._touched.files.get(shape.file)
        if touched is None:
            return
        heads = {net.head: net.number for net in touched.chains.net() if net.head is not None}
        if touched.vague:
            fresh = (
                where
                for where in reader.written_by(touched.vague, self._touched.xids)
                if not touched.chains.ends_at(where)
            )
            heads.update({where: len(touched.chains) + index for index, where in enumerate(fresh)})
        rows = self._checked_after(shape, reader.at(sorted(heads)))
        kept = self._store.put(
            AFTER, shape.family, ((number, heads[row.place], *_keyed(shape, row)) for row in rows)
        )
        if kept != len(heads):
            raise InternalError(
                f"{len(heads) - kept} rows of {shape.table} that were written are not on the clone"
            )

    def _checked_after(self, shape: TableShape, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            if row.xmin not in self._touched.xids:
                raise InternalError(
                    f"a row of {shape.table} carries xmin {row.xmin}, not that of the transaction",
                    where=f"block {row.place >> 16}, offset {row.place & 0xFFFF}",
                )
            yield row

    def _leave_out_dropped(self, survivors: set[tuple[str, int]]) -> None:
        """The rows of a dropped table went with it: that is told as a change of the schema."""
        for number, shape in self.before.items():
            if (shape.table.database, shape.oid) not in survivors:
                rows = self._whole.get(number)
                self._store.forget(number)
                self.unread = [each for each in self.unread if each.table != shape.table]
                self.unread.append(Unread(shape.table, "the table was dropped, with its rows", rows))

    def _leave_out_halves(self) -> None:
        """A table of which one side was too large is not compared: the other side alone would be a lie."""
        lost = {each.table for each in self.unread}
        for shapes in (self.before, self.after):
            for number, shape in shapes.items():
                if shape.table in lost:
                    self._store.leave_out(number)

    def _moves(self) -> Iterator[tuple[ChainId, ChainId]]:
        families: dict[tuple[str, int], dict[int, Chains]] = defaultdict(dict)
        for shapes in (self.before, self.after):
            for number, shape in shapes.items():
                touched = self._touched.files.get(shape.file)
                if touched is not None and shape.root_oid:
                    families[shape.table.database, shape.root_oid][number] = touched.chains
        for family in families.values():
            yield from follow_moves(family).items()

    # --- both --------------------------------------------------------------------------------------

    def _catalogs(self, clone: Standing) -> Iterator[tuple[int, Catalog]]:
        """The databases touched, each with an open connection; shared catalogs alone are seen from any."""
        names = databases_of(clone.dsn(clone.entrance))
        wanted = {database for _, database, _ in self._numbers if database}
        if not wanted and self._numbers:
            wanted = {oid for oid, name in names.items() if name == clone.entrance}
        for database in sorted(wanted):
            if database in names:
                yield database, open_catalog(clone.dsn(names[database]), names[database])
            elif all(each.table != f"database {database}" for each in self.unread):
                self.unread.append(Unread(f"database {database}", "it is gone, or takes no connections"))


def _keyed(shape: TableShape, row: Row, always: bool = False) -> tuple[bytes | None, list[ColumnValue]]:
    """What pairs a deleted row with one inserted again: its key, or the whole row where `always` wants one."""
    names = shape.key or (tuple(column.name for column in shape.columns) if always else ())
    if not names:
        return None, row.values
    chosen = [value for column, value in zip(shape.columns, row.values, strict=True) if column.name in names]
    return b"".join(map(_framed, chosen)), row.values


def _framed(value: ColumnValue) -> bytes:
    """A value's image (its text where it has none) behind its length, so that columns stay apart."""
    if value.text is None:
        return b"\xff\xff\xff\xff"
    content = value.image if value.image is not None else value.text.encode("utf-8", "surrogateescape")
    return len(content).to_bytes(4, "big") + content


__all__ = ["AFTER", "BEFORE", "STATISTICS", "Entry", "Gathering", "Unread"]
