"""What disk, buffers and WAL say of some blocks of one relation, gathered in the order that makes it true."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import psycopg

from knockwood.errors import HostError, ObjectMissingError, RefusedError
from knockwood.host.direct import read_block
from knockwood.integrity.check import Subject
from knockwood.integrity.mended import Mended
from knockwood.integrity.staged_wal import StagedWal, in_windows
from knockwood.model.wal import Lsn
from knockwood.postgres.connection import Connection, connect, translated, with_words
from knockwood.postgres.pages import bad_pages, decode_header, fitting_blocks
from knockwood.postgres.walmessages import commit_nothing
from knockwood.postgres.walrefs import RelationEvent, relation_events
from knockwood.recover.pages_wal import Node, block_records
from knockwood.recover.plan.page_wal import (
    PAGE_BYTES,
    BlockRecord,
    WalFacts,
    find_begun_anew,
    find_poison,
)
from knockwood.recover.plan.pages import OnDisk, RelationFacts, segment_of, segment_path

NOTHING_KNOWN: Final[Mapping[int, Lsn]] = MappingProxyType({})
_MOST_MATCHES: Final = 3


@dataclass(frozen=True, slots=True)
class Target:
    """A relation with pages. `path` is its first main file, relative to the data directory; `owner` the table
    to lock: itself, or the table that a TOAST table or an index belongs to. Names are quoted for SQL."""

    database: str
    oid: int
    name: str
    kind: str
    persistence: str
    method: str
    shared: bool
    path: str
    node: Node
    owner_oid: int
    owner: str
    owner_kind: str

    def facts(self, fork: str = "main") -> RelationFacts:
        return RelationFacts(self.oid, self.kind, self.persistence, fork, self.shared, self.method)


_TARGET: Final = """
select c.oid::int8, pg_catalog.format('%%I.%%I', n.nspname, c.relname), c.relkind::text,
       c.relpersistence::text, coalesce(a.amname, ''), c.relisshared, pg_catalog.pg_relation_filepath(c.oid),
       case when c.relisshared then 1664 when c.reltablespace <> 0 then c.reltablespace
            else d.dattablespace end::int8,
       case when c.relisshared then 0 else d.oid end::int8,
       pg_catalog.pg_relation_filenode(c.oid)::int8,
       coalesce(o.oid, c.oid)::int8,
       pg_catalog.format('%%I.%%I', coalesce(om.nspname, n.nspname), coalesce(o.relname, c.relname)),
       coalesce(o.relkind, c.relkind)::text
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
join pg_catalog.pg_database d on d.datname = pg_catalog.current_database()
left join pg_catalog.pg_am a on a.oid = c.relam
left join pg_catalog.pg_index i on i.indexrelid = c.oid
left join pg_catalog.pg_class o on o.oid = i.indrelid or (c.relkind = 't' and o.reltoastrelid = c.oid)
left join pg_catalog.pg_namespace om on om.oid = o.relnamespace
where c.oid = %s and pg_catalog.pg_relation_filenode(c.oid) is not null
"""


def target_of(connection: Connection, database: str, oid: int) -> Target:
    """The relation with this oid; raises ObjectMissingError where it is gone or has no pages."""
    with translated():
        row = connection.execute(_TARGET, [oid]).fetchone()
    if row is None:
        raise ObjectMissingError(f"there is no relation {oid} with pages", where=f"database {database}")
    oid, name, kind, persistence, method, shared, path, space, base, filenode, *owner = row
    return Target(
        database, oid, name, kind, persistence, method, shared, path, (space, base, filenode), *owner
    )


def target_named(connection: Connection, database: str, name: str) -> Target:
    """The relation of this name (`schema.table`, quoted as SQL wants it); raises ObjectMissingError."""
    with translated():
        row = connection.execute("select pg_catalog.to_regclass(%s)::oid::int8", [name]).fetchone()
    if row is None or row[0] is None:
        raise ObjectMissingError(f"there is no relation {name}", where=f"database {database}")
    return target_of(connection, database, row[0])


def target_at(connection: Connection, database: str, node: Node) -> Target:
    """The relation that lies in this file now; raises ObjectMissingError if none does any more."""
    with translated():
        # 0 stands for the database's own tablespace.
        row = connection.execute(
            "select pg_catalog.pg_filenode_relation("
            " case when %s = (select dattablespace from pg_catalog.pg_database"
            " where datname = pg_catalog.current_database()) then 0 else %s end::oid, %s::oid)::oid::int8",
            [node[0], node[0], node[2]],
        ).fetchone()
    if row is None or row[0] is None:
        raise ObjectMissingError(f"no relation lies in file {node[2]} any more", where=f"database {database}")
    return target_of(connection, database, row[0])


def file_is_gone(subject: Subject, path: str) -> bool:
    """Whether a relation's first file is no more, or waits, emptied, for the next checkpoint to remove it."""
    folder = subject.data_directory
    assert folder is not None
    try:
        return (folder / path).stat().st_size == 0
    except FileNotFoundError:
        return True
    except OSError as error:
        raise HostError(f"cannot look at the file: {error.strerror}", where=path) from error


def read_page(subject: Subject, path: str, block: int) -> bytes | None:
    """A page as the disk has it; None where the disk refuses to read it. Empty beyond the file's end."""
    if subject.data_directory is None:
        raise RefusedError(
            "page repair needs the server's files", hint="set data_directory in the settings, on that host"
        )
    _, offset = segment_of(block)
    try:
        return read_block(subject.data_directory / segment_path(path, block), offset, PAGE_BYTES)
    except HostError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == 5:  # EIO
            return None
        raise


def on_disk(image: bytes | None, block: int, blocks: int) -> OnDisk:
    """Judge a page read from the disk; `blocks` is the relation's length in blocks."""
    if image is None:
        return OnDisk("unreadable", reason="the disk cannot read it")
    if len(image) < PAGE_BYTES:
        return OnDisk("missing")
    if not any(image):
        return OnDisk("zero")
    for _, reason in bad_pages(image, block, True):
        header = decode_header(image)
        fitting = fitting_blocks(image, blocks) if header.flaw() is None and not header.new else []
        return OnDisk("bad", None, reason, tuple(fitting) if 0 < len(fitting) <= _MOST_MATCHES else ())
    return OnDisk("good", decode_header(image).lsn)


def flush_wal(subject: Subject, database: str) -> Lsn:
    """Write all WAL so far to disk, by a commit that changes nothing; where a record ends after all of it.

    (What is flushed may end in the midst of a record: WAL read on from there would lack it.)
    """
    dsn = with_words(subject.dsn, dbname=database)
    with connect(dsn, application_name="knockwood repair") as connection:
        return commit_nothing(connection, "page repair")


def say_mended(subject: Subject, target: Target, images: Mapping[int, Lsn]) -> None:
    """Say in the WAL that the blocks have what these records' images of old pages lack: what was lost is seen in
    the images for ever, that it was brought back is not."""
    dsn = with_words(subject.dsn, dbname=target.database)
    with connect(dsn, application_name="knockwood repair") as connection, translated():
        connection.execute("set synchronous_commit = local")
        for block, image in sorted(images.items()):
            connection.execute(Mended(target.path, block, image).statement.encode())


def wal_facts(
    subject: Subject,
    target: Target,
    blocks: Collection[int],
    since: Lsn,
    until: Lsn,
    beyond: Mapping[int, Lsn] = NOTHING_KNOWN,
    beside: Callable[[StagedWal, Mapping[int, Sequence[BlockRecord]]], None] | None = None,
) -> Mapping[int, WalFacts]:
    """What the WAL in [since, until) says of the blocks, from the server's pg_wal or else the archive.

    `beyond` are starts of records known to have changed blocks. Never raises for WAL that cannot be had: then
    nothing is known, with the reason. `beside` is given each window of it, with its records (see `in_windows`), to
    look for something else.
    """
    if not blocks:
        return {}

    def read(wal: StagedWal) -> Mapping[int, Sequence[BlockRecord]]:
        programs, size = subject.server_programs, wal.segment_bytes
        records = block_records(
            programs, wal.folder, wal.timeline, wal.start, wal.end, size, target.node, blocks
        )
        if beside is not None:
            beside(wal, records)
        return records

    found: dict[int, list[BlockRecord]] = {block: [] for block in blocks}
    try:
        for records in in_windows(subject, since, until, read):
            for block, some in records.items():
                seen = found[block][-1].lsn if found[block] else Lsn(0)
                found[block] += (record for record in some if record.lsn > seen)
        if any(find_poison(each) or find_begun_anew(each, held=False) for each in found.values()):
            # A page that was cut off and made again had to lack what was there before.
            cuts = cuts_of(subject, target, since, until)
            for block, each in found.items():
                found[block] = [record for record in each if record.lsn.value > last_cut(cuts, block)]
    except (HostError, ObjectMissingError) as error:
        return {block: WalFacts(False, (), since, until, str(error), beyond.get(block)) for block in blocks}
    return {
        block: WalFacts(True, tuple(found[block]), since, until, beyond=beyond.get(block)) for block in blocks
    }


def cuts_of(subject: Subject, target: Target, since: Lsn, until: Lsn) -> Sequence[RelationEvent]:
    """Where the WAL in [since, until) cuts the relation, or makes its file anew. Raises HostError where that WAL
    cannot be read."""
    programs = subject.server_programs

    def read(wal: StagedWal) -> list[RelationEvent]:
        events = relation_events(programs, wal.folder, wal.timeline, wal.start, wal.end, wal.segment_bytes)
        return [event for event in events if event.path == target.path]

    return [event for events in in_windows(subject, since, until, read) for event in events]


def last_cut(cuts: Iterable[RelationEvent], block: int) -> int:
    """The position of the last of them that took the block away; 0 if none did."""
    return max((cut.lsn for cut in cuts if cut.blocks is None or cut.blocks <= block), default=0)


def length(connection: Connection, target: Target) -> int:
    """How many blocks the relation has."""
    with translated():
        row = connection.execute(
            "select pg_catalog.pg_relation_size(%s::oid::regclass) / %s", [target.oid, PAGE_BYTES]
        ).fetchone()
    return int(row[0]) if row and row[0] is not None else 0


def readable(connection: Connection, target: Target, block: int) -> bool:
    """Whether the server can read the block; if it cannot, no valid buffer holds it."""
    try:
        connection.execute(
            f"select 1 from only {target.name} where ctid = '({block},1)'::tid".encode()
        ).fetchall()
    except (psycopg.errors.DataCorrupted, psycopg.errors.IndexCorrupted, psycopg.errors.IoError):
        return False
    return True
