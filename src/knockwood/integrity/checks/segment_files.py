"""Relation files against each other and against pg_class: none missing, none shorter than it must be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import psycopg

from knockwood.errors import KnockwoodError, PostgresError
from knockwood.host import clock
from knockwood.integrity.budget import pace
from knockwood.integrity.catalog import Names, Relation, relations, stake
from knockwood.integrity.check import NotChecked, Outcome, Subject, Weight
from knockwood.integrity.relation_files import DataFiles, RelationFile, data_files, listing
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import translated
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES, bad_pages

_SEGMENT_BYTES: Final = SEGMENT_PAGES * PAGE_BYTES
_MAP_HEADER: Final = 24
_HEAP_BLOCKS_PER_BYTE: Final = 4
_HEAP_BLOCKS_PER_PAGE: Final = (PAGE_BYTES - _MAP_HEADER) * _HEAP_BLOCKS_PER_BYTE
_SETTLE: Final = 0.5
_REMEDY: Final = "bring the relation back from the newest clean backup and the WAL: knockwood recover"

Fork = tuple[str, str]
"""A relation's path and a fork's name."""


class SegmentFiles:
    """Compares the files of each relation with each other, with pg_class and with the visibility map."""

    name = "segment_files"
    title = "Relation files: none missing, none too short"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        with data_files(subject) as data:
            names = Names(subject)
            yield from _broken_forks(data, names)
            pace(subject)
            yield from _cut_heaps(subject, data, names)
            yield from _database_folders(subject, data)
            for database in subject.databases():
                pace(subject)
                try:
                    yield from _against_catalog(subject, data, database)
                except (KnockwoodError, psycopg.Error) as error:
                    yield NotChecked(self.name, f"database {database}: {error}")


def _forks(data: DataFiles) -> dict[Fork, dict[int, RelationFile]]:
    found: dict[Fork, dict[int, RelationFile]] = {}
    for file in listing(data):
        found.setdefault((file.relation_path, file.fork), {})[file.segment] = file
    return found


# --- the segments of one fork ----------------------------------------------------------------------


def _broken_forks(data: DataFiles, names: Names) -> Iterator[Finding]:
    first = {key: flaw for key, segments in _forks(data).items() if (flaw := fork_flaw(segments))}
    if not first:
        return
    # A relation may be extended, truncated or dropped while the folder is listed: only what stays counts.
    clock.sleep(_SETTLE)
    again = _forks(data)
    for key in first:
        flaw = fork_flaw(again.get(key, {}))
        if flaw is None:
            continue
        segment, summary = flaw
        any_file = next(iter(again[key].values()))
        suffix = "" if key[1] == "main" else f"_{key[1]}"
        path = f"{key[0]}{suffix}" + (f".{segment}" if segment else "")
        relation = names.of(any_file)
        what = stake(relation, any_file.fork)
        place = relation.location(path) if relation else Location(file=path)
        yield Finding(
            SegmentFiles.name,
            what.severity,
            place,
            summary,
            f"everything the file held is gone: {what.meaning}",
            what.remedy,
            {"fork": any_file.fork, "segments": {str(n): f.bytes for n, f in sorted(again[key].items())}},
        )


def fork_flaw(segments: Mapping[int, RelationFile]) -> tuple[int, str] | None:
    """The segment that is wrong among those of one fork, and how; None if they fit.

    Segments but the last are exactly 1 GB. A truncation leaves segments of no bytes behind, so those at
    the end say nothing.
    """
    used = [number for number, file in segments.items() if file.bytes]
    if not used:
        return None
    last = max(used)
    for number in range(last + 1):
        file = segments.get(number)
        if file is None:
            return number, f"segment file {number} of {last + 1} is missing"
        if number < last and file.bytes != _SEGMENT_BYTES:
            return number, f"segment file {number} has {file.bytes} bytes and others follow it"
        if file.bytes % PAGE_BYTES:
            return number, f"the file's length, {file.bytes} bytes, is not a whole number of pages"
    return None


# --- heaps shorter than their visibility map -------------------------------------------------------


def _cut_heaps(subject: Subject, data: DataFiles, names: Names) -> Iterator[Outcome]:
    """A truncation clears the map's bits beyond the new end. Bits that are still set there show rows
    that were on pages which no longer exist."""
    suspects = [key for key, forks in _map_pairs(data).items() if _beyond_end(data, *forks) is not None]
    if not suspects:
        return
    # The heap is cut at once, the map's cleared bits may still wait in the buffers.
    try:
        with subject.connect() as connection, translated():
            connection.execute("checkpoint")
    except PostgresError as error:
        yield NotChecked(
            SegmentFiles.name, f"{len(suspects)} heaps look too short, a checkpoint would tell: {error}"
        )
        return
    again = _map_pairs(data)
    for key in suspects:
        if key not in again:
            continue
        last = _beyond_end(data, *again[key])
        if last is None:
            continue
        heap, _ = again[key]
        length = _blocks(heap)
        relation = names.of(next(iter(heap.values())))
        place = relation.location(key, length) if relation else Location(file=key, block=length)
        yield Finding(
            SegmentFiles.name,
            Severity.CRITICAL,
            place,
            f"the table ends before block {length}, its visibility map knows rows up to block {last}",
            "the tail of the table is cut off: its rows are missing, and no error will say so",
            _REMEDY,
            {"blocks": length, "last_block_known": last},
        )


_Segments = dict[int, RelationFile]


def _map_pairs(data: DataFiles) -> dict[str, tuple[_Segments, _Segments]]:
    forks = _forks(data)
    unlogged = {path for path, fork in forks if fork == "init"}
    return {
        path: (forks[path, "main"], segments)
        for (path, fork), segments in forks.items()
        if fork == "vm" and (path, "main") in forks and path not in unlogged
    }


def _blocks(segments: _Segments) -> int:
    return sum(file.bytes // PAGE_BYTES for file in segments.values())


def _beyond_end(data: DataFiles, heap: _Segments, visibility: _Segments) -> int | None:
    """The last heap block beyond the heap's end that the map has a bit for."""
    length = _blocks(heap)
    first_page = length // _HEAP_BLOCKS_PER_PAGE
    last: int | None = None
    for segment, file in sorted(visibility.items()):
        start = segment * SEGMENT_PAGES
        for page in range(max(first_page - start, 0), file.bytes // PAGE_BYTES):
            image = data.read(file.path, page * PAGE_BYTES, PAGE_BYTES)
            # A damaged map page is the page check's finding and proves nothing here.
            if len(image) < PAGE_BYTES or bad_pages(image, start + page, False):
                continue
            bits = np.frombuffer(image, np.uint8)[_MAP_HEADER:]
            base = (start + page) * _HEAP_BLOCKS_PER_PAGE
            set_blocks = np.flatnonzero((bits[:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3) + base
            beyond = set_blocks[set_blocks >= length]
            if len(beyond):
                last = int(beyond[-1])
    return last


# --- files against the catalog ---------------------------------------------------------------------


def _against_catalog(subject: Subject, data: DataFiles, database: str) -> Iterator[Finding]:
    with subject.connect(database) as connection:
        known = relations(connection, database)
    sizes = _sizes(data, {relation.path.rpartition("/")[0] for relation in known})
    wrong = [r for r in known if _catalog_flaw(r, sizes, subject.facts.in_recovery)]
    if not wrong:
        return
    clock.sleep(_SETTLE)
    # A relation dropped or rewritten in the meantime is gone from pg_class, or has another path there.
    with subject.connect(database) as connection:
        now = {relation.path: relation for relation in relations(connection, database)}
    sizes = _sizes(data, {relation.path.rpartition("/")[0] for relation in now.values()})
    for relation in wrong:
        if relation.path not in now or (relation.shared and database != subject.databases()[0]):
            continue
        flaw = _catalog_flaw(relation, sizes, subject.facts.in_recovery)
        if flaw is None:
            continue
        path, summary = flaw
        what = stake(relation, "main")
        yield Finding(
            SegmentFiles.name,
            what.severity,
            relation.location(path),
            summary,
            what.meaning
            if relation.is_index
            else "every row of the relation is gone, and queries on it fail",
            what.remedy,
            {"oid": relation.oid, "path": relation.path},
        )


def _sizes(data: DataFiles, folders: set[str]) -> dict[str, int]:
    return {f"{folder}/{name}": size for folder in folders for name, size in data.names(folder)}


def _catalog_flaw(relation: Relation, sizes: Mapping[str, int], in_recovery: bool) -> tuple[str, str] | None:
    if relation.persistence == "t":
        return None
    if relation.persistence == "u":
        if f"{relation.path}_init" not in sizes:
            return f"{relation.path}_init", "the init fork of an unlogged relation is missing"
        if in_recovery:  # there the init fork is all there is
            return None
    size = sizes.get(relation.path)
    if size is None:
        return relation.path, "the relation's file is missing"
    # Every index has a metapage once it is built, and every sequence its one row; an empty table has no bytes.
    if size == 0 and relation.kind in ("i", "S") and relation.ready:
        return relation.path, "the file is empty, and it never is for this kind of relation"
    return None


def _database_folders(subject: Subject, data: DataFiles) -> Iterator[Finding]:
    with subject.connect() as connection, translated():
        rows = connection.execute(
            "select oid::int8, datname from pg_catalog.pg_database"
            " where dattablespace = (select oid from pg_catalog.pg_tablespace where spcname = 'pg_default')"
            " order by oid"
        ).fetchall()
    for oid, database in rows:
        present = {name for name, _ in data.names(f"base/{oid}")}
        for name in ("PG_VERSION", "pg_filenode.map"):
            if name not in present and _still_there(subject, oid):
                yield Finding(
                    SegmentFiles.name,
                    Severity.CRITICAL,
                    Location(database=database, file=f"base/{oid}/{name}"),
                    "a file that every database needs is missing",
                    "nobody can connect to this database",
                    "bring the file back from the newest clean backup",
                )


def _still_there(subject: Subject, oid: int) -> bool:
    with subject.connect() as connection, translated():
        return connection.execute("select from pg_catalog.pg_database where oid = %s", [oid]).rowcount == 1


CHECK = SegmentFiles()
