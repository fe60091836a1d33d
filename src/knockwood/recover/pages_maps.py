"""Free space and visibility maps made anew: they hold no rows, so they are never copied.

A visibility map is cut to nothing and built again by VACUUM; without it everything works, only slower. Pages of
a free space map become zeros, which mean that no free space is known there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psycopg import sql

from knockwood.errors import HostError, RefusedError
from knockwood.host.direct import write_block
from knockwood.integrity.check import Subject
from knockwood.postgres.connection import connect, translated, with_words
from knockwood.postgres.pages import PAGE_BYTES
from knockwood.recover import pages_facts as facts
from knockwood.recover.evidence import Keep
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_session import Patience, session
from knockwood.recover.plan.pages import RelationFacts, segment_of, segment_path

# Indexes are left alone: one of them may be damaged too.
_VACUUM = {
    "vm": "disable_page_skipping, truncate off, index_cleanup off",
    "fsm": "truncate off, index_cleanup off",
}


def rebuild_map(
    subject: Subject,
    database: str,
    oid: int,
    fork: str,
    blocks: Sequence[int],
    *,
    keep: Keep,
    note: Callable[[str, Any], None],
    notes: dict[str, Any],
    patience: Patience | None = None,
) -> bool:
    """Make the map `fork` (vm, fsm) of a table anew; False if all of it had been done already.

    Raises RefusedError for catalogs and unlogged tables, and for a visibility map where pg_visibility cannot
    be had.
    """
    if notes.get("vacuumed"):
        return False
    with session(subject, database, ("pg_visibility",)) as tools:
        target = facts.target_of(tools.connection, database, oid)
        _require_rebuildable(subject, target, fork)
        if not notes.get("cleared"):
            pages = {block: facts.read_page(subject, f"{target.path}_{fork}", block) for block in blocks}
            keep({f"{target.node[2]}_{fork}-{b}.damaged": page for b, page in pages.items() if page})
            if fork == "vm":
                schema = tools.schemas.get("pg_visibility")
                if schema is None:
                    raise RefusedError("pg_visibility cannot be had in this database", where=target.name)
                tools.lock(target, "ACCESS EXCLUSIVE", patience or Patience())
                cut = sql.SQL("select {}.pg_truncate_visibility_map(%s::oid::regclass)")
                with translated():
                    tools.connection.execute(cut.format(sql.Identifier(schema)), [oid])
            else:
                tools.lock(target, "SHARE UPDATE EXCLUSIVE", patience or Patience())
                _clear(subject, target, blocks)
    note("cleared", True)
    dsn = with_words(subject.dsn, dbname=database)
    with connect(dsn, application_name="knockwood repair") as connection, translated():
        connection.execute("set statement_timeout = 0")
        connection.execute(f"vacuum ({_VACUUM[fork]}) {target.name}".encode())
    note("vacuumed", True)
    return True


def _require_rebuildable(subject: Subject, target: Target, fork: str) -> None:
    relation: RelationFacts = target.facts(fork)
    if fork not in _VACUUM:
        raise RefusedError(f"there is no map {fork!r}", where=target.name)
    if relation.shared or relation.oid < 16384 or relation.persistence != "p":
        raise RefusedError("maps of catalogs and unlogged tables are left alone", where=target.name)
    if target.kind not in ("r", "t") or not subject.facts.is_superuser:
        raise RefusedError("only a superuser can, and only for tables", where=target.name)


def _clear(subject: Subject, target: Target, blocks: Sequence[int]) -> None:
    assert subject.data_directory is not None
    path = f"{target.path}_fsm"
    for block in blocks:
        page = facts.read_page(subject, path, block)
        if page is not None and len(page) < PAGE_BYTES:
            continue  # it is gone by itself
        _, offset = segment_of(block)
        write_block(subject.data_directory / segment_path(path, block), offset, bytes(PAGE_BYTES))
        if facts.read_page(subject, path, block) not in (bytes(PAGE_BYTES), b""):
            raise HostError(f"block {block} does not read back as written", where=path)
