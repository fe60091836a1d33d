"""From damaged pages to a plan that mends them: each page judged by disk, buffers and WAL as they are now."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

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
from knockwood.postgres.pages import decode_header, has_items
from knockwood.recover import pages_facts as facts
from knockwood.recover.indexes import index_named
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_session import Session, session
from knockwood.recover.pages_write import Looked, look
from knockwood.recover.plan.page_wal import Poison, find_begun_anew
from knockwood.recover.plan.pages import Procedure
from knockwood.recover.rows import shape_of
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.backups.model import Backup, chain
from knockwood.repository.backups.partial import read_blocks
from knockwood.repository.backups.proofs import read_proofs, trusted
from knockwood.repository.repository import Repository

_READ: Final = re.compile(r"[0-9A-F]+/[0-9A-F]+\.\.([0-9A-F]+/[0-9A-F]+) ")

_OLDER: Final = 2
"""How many older backups are tried where the first one's page is not proven good."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a check knows of a page's last change: the record's start, and up to where it read the WAL.

    None: it knows of no record. Where the page was used again without that change, `read_to` is where (`used`):
    what came later was built on the old page.
    """

    lsn: Lsn | None = None
    read_to: Lsn | None = None
    used: bool = False


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
    reason; pages that turn out to be sound, or whose file is gone, need no step. `backup` names the base backup
    to take good pages from; by default the newest that is older than the damage is known to be, or else the
    newest whose image holds the change that was lost.
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
        work.put_off()
    steps = _ordered(work.steps)
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
    unmended: set[tuple[str, int]] = field(default_factory=set)
    """Tables (database, oid) with pages that no step mends."""

    def plan(self, items: list[Finding | PageRef]) -> None:
        databases = self._databases()
        for finding in (item for item in items if isinstance(item, Finding)):
            if finding.location.index is not None:
                self._index(finding.location.database, finding.location.index)
            elif finding.check == "visibility_map" and finding.location.file is not None:
                self._map(databases, PageRef(finding.location.file, 0), "vm", [], finding)
            elif not pages_of(finding):
                self.refused.append(f"{finding.check}: {finding.summary}: it names no page")
        pages = _pages(item for item in items if not _about_map(item))
        by_file: dict[str, list[PageRef]] = defaultdict(list)
        for ref in sorted(pages):
            parsed = parse_path(ref.file)
            if parsed is None:
                self.refused.append(f"{ref.file}: not a relation's file (SLRUs and others are not mended)")
            else:
                by_file[f"{parsed.relation_path} {parsed.fork}"].append(ref)
        for refs in by_file.values():
            try:
                self._file(databases, {ref: pages[ref] for ref in refs})
            except KnockwoodError as error:
                self.refused.append(f"{refs[0].file}: {error}")

    def put_off(self) -> None:
        """Leave to a later plan what makes indexes anew of a table that will hold damage still: an old page may show
        two versions of one row, and what is built on it is worth nothing."""
        for step in list(self.steps):
            words = step.arguments
            builds = step.kind == ROWS or (step.kind == REINDEX and words["index"] is None)
            if not builds or (words["database"], words["oid"]) not in self.unmended:
                continue
            self.steps.remove(step)
            self.refused.append(
                f"{words['table'] if step.kind == REINDEX else words['relation']}: {step.title}: only once its other"
                " damaged pages are mended"
            )
            if step.kind == ROWS:
                self.covered -= {ref for ref in self.covered if _is_of(ref, words)}

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

    def _file(self, databases: Mapping[int, str], known: Mapping[PageRef, Seen]) -> None:
        refs = list(known)
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
        groups: dict[str, list[PageRef]] = defaultdict(list)
        choices: dict[str, list[Backup]] = {}
        for ref, seen in known.items():
            try:
                chosen = self._backups(seen)
            except KnockwoodError as error:
                self.refused.append(f"{ref.file} block {ref.block}: {error}")
                continue
            choices[chosen[0].id] = chosen
            groups[chosen[0].id].append(ref)
        node = (parsed.tablespace, parsed.database, parsed.filenode)
        with session(self.subject, database) as tools:
            try:
                target = facts.target_at(tools.connection, database, node)
            except ObjectMissingError:
                if not facts.file_is_gone(self.subject, parsed.relation_path):
                    raise
                # Dropped, or made anew in another file: the damage went with the old one.
                self.covered.update(refs)
                return
            if sum(map(len, groups.values())) < len(known):
                self.unmended.add((database, target.oid))
            for name, some in groups.items():
                told = {ref.block: known[ref].lsn for ref in some}
                beyond = {block: lsn for block, lsn in told.items() if lsn is not None}
                looked = look(tools, target, sorted(told), choices[name][0].start_lsn, beyond=beyond)
                looked = self._begun_anew(tools, target, looked, choices[name][0])
                self._judged(tools, target, looked, choices[name], some, beyond)

    def _backups(self, seen: Seen) -> list[Backup]:
        """The newest backup from before the last good record known of the page, and some older ones.

        If there is none, the newest from before the end of the WAL in which that record was the last: its page
        has to hold the record, else it was taken after the damage. Between what the check has read and a later
        backup nobody looked for changes.
        """
        if self.backup is not None:
            known = [each for each in list_backups(self.repository) if each.id == self.backup]
        else:
            known = self._trusted()
        if seen.lsn is not None:
            limit = (
                seen.lsn if any(each.start_lsn <= seen.lsn for each in known) else seen.read_to or seen.lsn
            )
            known = [each for each in known if each.start_lsn <= limit]
        if not known and seen.used:
            raise ObjectMissingError(
                f"every base backup is younger than the image of the old page, at {seen.read_to}: none has what"
                " the page held before",
                hint="what is missing has to be found elsewhere: the rows changed at the record that was lost",
            )
        if not known:
            raise ObjectMissingError(
                "there is no base backup from before the damage was found",
                hint="take one with `knockwood backup`",
            )
        return [each for each in reversed(known) if each.timeline == known[-1].timeline][: 1 + _OLDER]

    def _begun_anew(self, tools: Session, target: Target, seen: Looked, backup: Backup) -> Looked:
        """Judge again, with what the backup holds, pages that the WAL alone calls sound but that it began anew:
        were there rows before, then the page had been zeroed."""
        begun = {
            block: poison.first_after
            for block in seen.blocks(Procedure.NOTHING)
            if (poison := find_begun_anew(seen.wal[block].records, held=True)) is not None
        }
        if not begun:
            return seen
        try:
            older = chain(list_backups(self.repository), backup.id)[:-1]
            images = read_blocks(self.repository, backup, target.path, begun, older)
            cuts = facts.cuts_of(self.subject, target, backup.start_lsn, max(begun.values()))
        except KnockwoodError:
            return seen  # nobody can tell
        held = [
            block
            for block, lsn in begun.items()
            if block in images
            and has_items(images[block])
            and decode_header(images[block]).lsn <= lsn
            and not facts.last_cut(cuts, block)
        ]
        known = {block: replace(seen.wal[block], held=True) for block in held}
        again = look(tools, target, held, backup.start_lsn, known) if held else seen
        return replace(
            seen, judgements={**seen.judgements, **again.judgements}, wal={**seen.wal, **again.wal}
        )

    def _judged(
        self,
        tools: Session,
        target: Target,
        seen: Looked,
        backups: Sequence[Backup],
        refs: list[PageRef],
        beyond: Mapping[int, Lsn],
    ) -> None:
        groups: dict[Procedure, list[int]] = defaultdict(list)
        for block, judgement in sorted(seen.judgements.items()):
            groups[judgement.procedure].append(block)
        for procedure, blocks in groups.items():
            reasons = {seen.judgements[block].reason for block in blocks}
            if procedure is Procedure.REFUSE:
                self.unmended.add((target.database, target.oid))
                listed = ", ".join(str(block) for block in blocks)
                self.refused += [f"{target.name} block {listed}: {reason}" for reason in sorted(reasons)]
                continue
            if procedure is Procedure.ROWS:
                blocks = self._rows(tools, target, blocks, seen)
            self.covered.update(ref for ref in refs if ref.block in blocks)
            if procedure is Procedure.REINDEX:
                self._index(target.database, target.name)
            elif procedure not in (Procedure.NOTHING, Procedure.ROWS):
                judgements = {block: seen.judgements[block] for block in blocks}
                self.steps.append(page_step(target, procedure, judgements, backups, beyond))
                compare = indexes_step(target)
                if procedure is Procedure.REPLACE and compare not in self.steps:
                    self.steps.append(compare)

    def _rows(self, tools: Session, target: Target, blocks: list[int], seen: Looked) -> list[int]:
        """Rows in place of pages; then all indexes of the table are suspect. The blocks that have a step."""
        known = self._trusted()
        poisons: dict[int, Poison] = {}
        for block in blocks:
            poison = seen.wal[block].poison
            assert poison is not None
            try:
                shape_of(tools.connection, target)
                if not any(each.stop_lsn <= _last_good(poison) for each in known):
                    raise ObjectMissingError(f"there is no base backup from before {_last_good(poison)}")
            except KnockwoodError as error:
                self.unmended.add((target.database, target.oid))
                self.refused.append(f"{target.name} block {block}: {error}")
                continue
            poisons[block] = poison
        if poisons:
            first = min(_last_good(poison) for poison in poisons.values())
            usable = [each for each in known if each.stop_lsn <= first]
            self.steps.append(rows_step(target, poisons, usable[-1]))
            if any(poison.emptied for poison in poisons.values()):
                # The map may call the page all visible still: who filled it saw no such page.
                self.steps.append(map_step(target, "vm", []))
        return list(poisons)

    def _trusted(self) -> list[Backup]:
        return trusted(list_backups(self.repository), read_proofs(self.repository))

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


def _last_good(poison: Poison) -> Lsn:
    """Where the page still had all that has to be brought over as it was then."""
    return poison.lost[0] if poison.lost else poison.first_after


def _is_of(ref: PageRef | tuple[str | None, str], words: Mapping[str, Any]) -> bool:
    """Whether a page is one of a step's."""
    parsed = parse_path(ref.file) if isinstance(ref, PageRef) else None
    return (
        isinstance(ref, PageRef)
        and parsed is not None
        and parsed.relation_path == words["path"]
        and parsed.fork == "main"
        and ref.block in words["blocks"]
    )


def _about_map(item: Finding | PageRef) -> bool:
    return isinstance(item, Finding) and item.check == "visibility_map"


def _with_lsn(item: Finding | PageRef) -> dict[PageRef, Seen]:
    """Pages with the last record that the check knew of, which a good page must hold."""
    if isinstance(item, PageRef):
        return {item: Seen()}
    if item.location.index is not None:
        return {}
    told = item.evidence.get("last_record")
    if not isinstance(told, str):
        return dict.fromkeys(pages_of(item), Seen())
    image = item.evidence.get("image")
    if isinstance(image, str):
        return dict.fromkeys(pages_of(item), Seen(Lsn.parse(told), Lsn.parse(image), used=True))
    read = _READ.match(str(item.evidence.get("wal", "")))
    return dict.fromkeys(pages_of(item), Seen(Lsn.parse(told), Lsn.parse(read[1]) if read else None))


def _pages(items: Iterable[Finding | PageRef]) -> dict[PageRef, Seen]:
    """The pages that any of the items names, with the best that is known of each."""
    pages: dict[PageRef, Seen] = {}
    for item in items:
        for ref, seen in _with_lsn(item).items():
            pages[ref] = _newer(pages.get(ref, Seen()), seen)
    return pages


def _newer(one: Seen, other: Seen) -> Seen:
    """Of two findings about a page the one that knows the later record."""
    if one.lsn is None or other.lsn is None:
        return other if one.lsn is None else one
    return max(one, other, key=lambda seen: (seen.lsn, seen.read_to or Lsn(0)))


def _ordered(steps: Iterable[Step]) -> list[Step]:
    """Pages first. Rows that are brought over are compared with other tables, by their indexes: so these come
    before, and only the indexes of the table itself afterwards."""
    steps = list(steps)
    tables = {(step.arguments["database"], step.arguments["oid"]) for step in steps if step.kind == ROWS}

    def turn(step: Step) -> int:
        late = (step.arguments["database"], step.arguments["oid"]) in tables
        return {REPAIR: 0, MAPS: 1, REINDEX: 4 if late else 2, ROWS: 3}[step.kind]

    return sorted(steps, key=turn)


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
