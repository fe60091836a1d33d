"""Which relation a file belongs to, as pg_class knows it."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg

from knockwood.errors import KnockwoodError
from knockwood.integrity.check import Subject
from knockwood.integrity.relation_files import RelationFile
from knockwood.model import Location, Severity
from knockwood.postgres.connection import Connection, translated


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation with storage. `kind` and `persistence` are pg_class's letters, `path` is relative to the
    data directory, `pages` the planner's estimate. An index names its table, a TOAST table its owner.
    `ready` is false for an index whose concurrent build has only been announced: its file is empty."""

    database: str
    oid: int
    name: str
    kind: str
    persistence: str
    path: str
    method: str | None
    shared: bool
    pages: int
    owner: str | None
    ready: bool

    @property
    def is_index(self) -> bool:
        return self.kind == "i"

    def location(self, file: str | None = None, block: int | None = None, **more: str) -> Location:
        """Where a finding in this relation is."""
        return Location(
            database=None if self.shared else self.database,
            relation=self.owner if self.is_index else self.name,
            index=self.name if self.is_index else None,
            file=file,
            block=block,
            key=more.get("key"),
        )


_RELATIONS = """
select c.oid::int8, pg_catalog.format('%I.%I', n.nspname, c.relname), c.relkind::text, c.relpersistence::text,
       pg_catalog.pg_relation_filepath(c.oid), a.amname, c.relisshared, c.relpages,
       case when o.oid is not null then pg_catalog.format('%I.%I', om.nspname, o.relname) end,
       coalesce(i.indisready, true)
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_am a on a.oid = c.relam
left join pg_catalog.pg_index i on i.indexrelid = c.oid
left join pg_catalog.pg_class t on t.reltoastrelid = c.oid and c.relkind = 't'
left join pg_catalog.pg_class o on o.oid = coalesce(i.indrelid, t.oid)
left join pg_catalog.pg_namespace om on om.oid = o.relnamespace
where c.relkind in ('r', 'i', 't', 'm', 'S')
order by c.oid
"""
# Joins, where a subquery for each row would read pg_class once more for each TOAST table: it has no index on
# reltoastrelid, and there may be ten thousands of them.


def relations(connection: Connection, database: str) -> list[Relation]:
    """Every relation with storage in the connection's database, shared catalogs included."""
    with translated():
        rows = connection.execute(_RELATIONS).fetchall()
    # One that is dropped at this moment has no path any more.
    return [Relation(database, *row) for row in rows if row[4] is not None]


def relations_of(subject: Subject) -> dict[str, Relation]:
    """Relations by their path, over all databases that take connections."""
    found: dict[str, Relation] = {}
    for database in subject.databases():
        with subject.connect(database) as connection:
            for relation in relations(connection, database):
                found.setdefault(relation.path, relation)
    return found


class Names:
    """Names for files, looked up when the first finding needs one; a database that cannot be asked, because
    it is damaged itself, leaves its files without names."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._known: dict[str, Relation] | None = None

    def of(self, file: RelationFile) -> Relation | None:
        """The relation that owns the file, if the server can still tell."""
        if self._known is None:
            self._known = self._load()
        return self._known.get(file.relation_path)

    def location(self, file: RelationFile, block: int | None = None) -> Location:
        """Where in the cluster a block of the fork is; `block` counts from the start of the fork."""
        relation = self.of(file)
        if relation is None:
            return Location(file=file.path, block=block)
        return relation.location(file.path, block)

    def _load(self) -> dict[str, Relation]:
        found: dict[str, Relation] = {}
        try:
            databases = self._subject.databases()
        except (KnockwoodError, psycopg.Error):
            return found
        for database in databases:
            try:
                with self._subject.connect(database) as connection:
                    for relation in relations(connection, database):
                        found.setdefault(relation.path, relation)
            except (KnockwoodError, psycopg.Error):
                continue
        return found


@dataclass(frozen=True, slots=True)
class Stake:
    """What damage in a relation's file means, and what mends it."""

    severity: Severity
    meaning: str
    remedy: str


def stake(relation: Relation | None, fork: str) -> Stake:
    """How bad a damaged page of this relation's fork is for the data."""
    if fork in ("fsm", "vm"):
        return Stake(
            Severity.MEDIUM,
            "the fork holds no rows, but a wrong visibility map makes index-only scans return wrong rows",
            "rebuild it: VACUUM (DISABLE_PAGE_SKIPPING) after pg_truncate_visibility_map",
        )
    if relation is not None and relation.is_index:
        name = relation.name
        return Stake(
            Severity.HIGH,
            "no row is lost, but queries through the index fail or return wrong rows",
            f"rebuild it: REINDEX INDEX CONCURRENTLY {name}"
            if not name.startswith("pg_catalog.")
            else f"rebuild it: REINDEX INDEX {name}",
        )
    if relation is not None and relation.kind == "S":
        return Stake(
            Severity.HIGH,
            "the sequence cannot give numbers, or gives some twice",
            "set it again with setval() from max(id) of its table",
        )
    return Stake(
        Severity.CRITICAL,
        "the rows of this page are lost to the server, and every scan that meets it fails or misses them",
        "bring the page back from the newest clean backup and the WAL: knockwood recover",
    )
