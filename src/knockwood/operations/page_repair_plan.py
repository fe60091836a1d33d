"""From damaged pages to a plan that mends them: each page judged by disk, buffers and WAL as they are now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from knockwood.errors import KnockwoodError, ObjectMissingError
from knockwood.integrity.check import Budget, Subject
from knockwood.integrity.relation_files import parse_path, require_own_folder
from knockwood.model import Finding, Lsn
from knockwood.model.recovery import Alternative, ExpectedLoss, Plan, Step
from knockwood.operations.cluster import Cluster
from knockwood.operations.page_repair_steps import (
    MAPS,
    REINDEX,
    REPAIR,
    ROWS,
    indexes_step,
    map_step,
    page_step,
    reindex_step,
    rows_step,
)
from knockwood.postgres.connection import connect, translated
from knockwood.recover import pages_facts as facts
from knockwood.recover.indexes import index_named
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_session import Session, session
from knockwood.recover.pages_write import Looked, look
from knockwood.recover.plan.pages import Procedure, find_poison
from knockwood.recover.rows import shape_of
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.backups.model import Backup
from knockwood.repository.repository import Repository

_ORDER: Final = (REPAIR, MAPS, ROWS, REINDEX)


@dataclass(frozen=True, slots=True, order=True)
class PageRef:
    """A damaged page: a file relative to the data directory, and the block within the fork (not the file)."""

    file: str
    block: int

    @property
    def fork(self) -> str:
        parsed = parse_path(self.file)
        return parsed.fork if parsed else "main"


def pages_of(finding: Finding) -> tuple[PageRef, ...]:
    """The pages that a finding names; none for one that names no page."""
    place = finding.location
    if place.file is None:
        return ()
    blocks = [place.block] if place.block is not None else finding.evidence.get("blocks", ())
    return tuple(PageRef(place.file, int(block)) for block in blocks)


def plan_pages(
    cluster: Cluster,
    repository: Repository,
    damaged: Iterable[Finding | PageRef],
    *,
    backup: str | None = None,
) -> Plan:
    """A plan that mends the pages, indexes and maps that the findings (or references) name.

    The server is only read, but for a message of a few bytes that makes it flush its WAL, and extensions that
    a database lacks, made in a transaction that is rolled back. What is not safe is in `refused`, with the
    reason; pages that turn out to be sound need no step. `backup` names the base backup to take good pages
    from; by default the newest that is older than the damage is known to be.
    Raises PostgresError where the server does not answer.
    """
    items = list(damaged)
    subject = cluster.subject(Budget(), repository=repository)
    work = _Planning(subject, repository, backup)
    if subject.data_directory is None:
        work.refused.append("page repair writes the server's files: set data_directory, and run it there")
    else:
        require_own_folder(subject, subject.data_directory)
        work.plan(items)
    steps = sorted(work.steps, key=lambda step: _ORDER.index(step.kind))
    healed = tuple(item for item in items if isinstance(item, Finding) and work.heals(item))
    return Plan(
        cluster.name,
        "mend damaged pages",
        tuple(steps),
        ExpectedLoss(0, 0, "nothing: every page is proven to be the newest before it is written"),
        healed,
        _alternatives(steps),
        tuple(dict.fromkeys(work.refused)),
    )


@dataclass(slots=True)
class _Planning:
    subject: Subject
    repository: Repository
    backup: str | None
    steps: list[Step] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    covered: set[PageRef | tuple[str | None, str]] = field(default_factory=set)

    def plan(self, items: list[Finding | PageRef]) -> None:
        databases = self._databases()
        for finding in (item for item in items if isinstance(item, Finding)):
            if finding.location.index is not None:
                self._index(finding.location.database, finding.location.index)
            elif finding.check == "visibility_map" and finding.location.file is not None:
                self._map(databases, PageRef(finding.location.file, 0), "vm", [], finding)
            elif not pages_of(finding):
                self.refused.append(f"{finding.check}: {finding.summary}: it names no page")
        pages = {ref: lsn for item in items if not _about_map(item) for ref, lsn in _with_lsn(item).items()}
        by_file: dict[str, list[PageRef]] = defaultdict(list)
        for ref in sorted(pages):
            parsed = parse_path(ref.file)
            if parsed is None:
                self.refused.append(f"{ref.file}: not a relation's file (SLRUs and others are not mended)")
            else:
                by_file[f"{parsed.relation_path} {parsed.fork}"].append(ref)
        for refs in by_file.values():
            try:
                self._file(databases, refs, [pages[ref] for ref in refs])
            except KnockwoodError as error:
                self.refused.append(f"{refs[0].file}: {error}")

    def heals(self, finding: Finding) -> bool:
        """Whether steps cover all that the finding names."""
        place = finding.location
        if place.index is not None:
            return (place.database, place.index) in self.covered
        wanted = pages_of(finding)
        if _about_map(finding) and place.file is not None:
            wanted = (PageRef(place.file, 0),)
        return bool(wanted) and all(ref in self.covered for ref in wanted)

    def _databases(self) -> Mapping[int, str]:
        with connect(self.subject.dsn) as connection, translated():
            rows = connection.execute("select oid::int8, datname from pg_catalog.pg_database").fetchall()
        return dict(rows)

    # --- one file ---------------------------------------------------------------------------------

    def _file(self, databases: Mapping[int, str], refs: list[PageRef], records: list[Lsn | None]) -> None:
        parsed = parse_path(refs[0].file)
        assert parsed is not None
        if parsed.database == 0:
            self.refused.append(f"{refs[0].file}: a shared catalog: restore the cluster")
            return
        database = databases.get(parsed.database)
        if database is None:
            raise ObjectMissingError(f"there is no database {parsed.database}")
        blocks = sorted({ref.block for ref in refs})
        if parsed.fork in ("fsm", "vm"):
            self._map(databases, refs[0], parsed.fork, blocks, None)
            self.covered.update(refs)
            return
        chosen = self._backup([lsn for lsn in records if lsn is not None])
        node = (parsed.tablespace, parsed.database, parsed.filenode)
        with session(self.subject, database) as tools:
            target = facts.target_at(tools.connection, database, node)
            seen = look(tools, target, blocks, chosen.start_lsn)
            self._judged(tools, target, seen, chosen, refs)

    def _backup(self, records: list[Lsn]) -> Backup:
        """The newest backup from before the last good record known of any of the pages."""
        known = list_backups(self.repository)
        if self.backup is not None:
            known = [each for each in known if each.id == self.backup]
        before = [each for each in known if not records or each.start_lsn <= min(records)]
        if not before:
            raise ObjectMissingError(
                "there is no base backup from before the damage", hint="take one with `knockwood backup`"
            )
        return before[-1]

    def _judged(
        self, tools: Session, target: Target, seen: Looked, backup: Backup, refs: list[PageRef]
    ) -> None:
        groups: dict[Procedure, list[int]] = defaultdict(list)
        for block, judgement in sorted(seen.judgements.items()):
            groups[judgement.procedure].append(block)
        for procedure, blocks in groups.items():
            reasons = {seen.judgements[block].reason for block in blocks}
            if procedure is Procedure.REFUSE:
                listed = ", ".join(str(block) for block in blocks)
                self.refused += [f"{target.name} block {listed}: {reason}" for reason in sorted(reasons)]
                continue
            self.covered.update(ref for ref in refs if ref.block in blocks)
            if procedure is Procedure.REINDEX:
                self._index(target.database, target.name)
            elif procedure is Procedure.ROWS:
                self._rows(tools, target, blocks, seen)
            elif procedure is not Procedure.NOTHING:
                judgements = {block: seen.judgements[block] for block in blocks}
                self.steps.append(page_step(target, procedure, judgements, backup))
                if procedure is Procedure.REPLACE:
                    self.steps.append(indexes_step(target))

    def _rows(self, tools: Session, target: Target, blocks: list[int], seen: Looked) -> None:
        """Rows in place of pages; then all indexes of the table are suspect."""
        shape_of(tools.connection, target)
        for block in blocks:
            poison = find_poison(seen.wal[block].records)
            assert poison is not None
            known = [each for each in list_backups(self.repository) if each.stop_lsn <= poison.lost[0]]
            if not known:
                raise ObjectMissingError(f"there is no base backup from before {poison.lost[0]}")
            self.steps.append(rows_step(target, block, poison, known[-1]))

    # --- indexes and maps -------------------------------------------------------------------------

    def _index(self, database: str | None, name: str) -> None:
        key = (database, name)
        if key in self.covered:
            return
        try:
            if database is None:
                raise ObjectMissingError("an index of a shared catalog is not mended: restore the cluster")
            with self.subject.connect(database) as connection:
                index = index_named(connection, database, name)
            if index.oid < 16384:
                raise ObjectMissingError("an index of a system catalog: REINDEX it by hand, in a quiet hour")
            self.steps.append(reindex_step(index))
            self.covered.add(key)
        except KnockwoodError as error:
            self.refused.append(f"index {name}: {error.what}")

    def _map(
        self,
        databases: Mapping[int, str],
        ref: PageRef,
        fork: str,
        blocks: list[int],
        finding: Finding | None,
    ) -> None:
        parsed = parse_path(ref.file)
        try:
            if parsed is None or parsed.database not in databases:
                raise ObjectMissingError("a map of a shared catalog, or of no relation")
            database = databases[parsed.database]
            with self.subject.connect(database) as connection:
                node = (parsed.tablespace, parsed.database, parsed.filenode)
                target = facts.target_at(connection, database, node)
            if target.oid < 16384 or target.persistence != "p" or target.kind not in ("r", "t"):
                raise ObjectMissingError("maps of catalogs and unlogged relations are left alone")
        except KnockwoodError as error:
            self.refused.append(f"{ref.file}: {error.what}")
            return
        step = map_step(target, fork, blocks)
        if step.as_json() not in [each.as_json() for each in self.steps]:
            self.steps.append(step)
        if finding is not None:
            self.covered.add(PageRef(ref.file, 0))


def _about_map(item: Finding | PageRef) -> bool:
    return isinstance(item, Finding) and item.check == "visibility_map"


def _with_lsn(item: Finding | PageRef) -> dict[PageRef, Lsn | None]:
    """Pages with the last record that the check knew of, which a good backup must be older than."""
    if isinstance(item, PageRef):
        return {item: None}
    if item.location.index is not None:
        return {}
    told = item.evidence.get("last_record")
    lsn = Lsn.parse(told) if isinstance(told, str) else None
    return dict.fromkeys(pages_of(item), lsn)


def _alternatives(steps: Iterable[Step]) -> tuple[Alternative, ...]:
    tables = sorted({step.arguments["relation"] for step in steps if step.kind in (REPAIR, ROWS)})
    return tuple(_restores(tables))


def _restores(tables: list[str]) -> Iterator[Alternative]:
    for table in tables:
        yield Alternative(
            f"restore {table} beside the live one and bring its rows over",
            "a page is smaller, and the table stays in use",
            ExpectedLoss(None, None, "what was written since the restore began, unless merged"),
            "the table while the copies change places",
        )


__all__ = ["MAPS", "REINDEX", "REPAIR", "ROWS", "PageRef", "pages_of", "plan_pages"]
