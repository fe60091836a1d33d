"""Page repair: the plan for damaged pages, the handlers that execute it, and the checks afterwards.

`plan_pages` makes the plan. `PageRepairs` holds the clones that its steps share, and gives the handlers to
`recover.execute.execute`; `verify_pages` asks amcheck and the pages again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone, spawn
from knockwood.errors import RefusedError
from knockwood.host import clock
from knockwood.integrity.check import Budget, Subject
from knockwood.integrity.relation_files import require_own_folder
from knockwood.model import Claim, Lsn, Verdict, worst
from knockwood.model.recovery import Outcome, Plan, Step, StepResult
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.operations.page_repair_plan import (
    MAPS,
    REINDEX,
    REPAIR,
    ROWS,
    PageRef,
    pages_of,
    plan_pages,
)
from knockwood.postgres.connection import connect, with_words
from knockwood.recover import pages_facts as facts
from knockwood.recover import rows
from knockwood.recover.execute import Handler
from knockwood.recover.indexes import mend_indexes, reindex, verify_indexes
from knockwood.recover.journal import StepJournal
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_images import Good, UnprovenError, good_images
from knockwood.recover.pages_maps import rebuild_map
from knockwood.recover.pages_session import Patience, session
from knockwood.recover.pages_write import OutdatedError, Repaired, repair, standbys
from knockwood.recover.plan.pages import Procedure
from knockwood.repository.backups.model import Progress
from knockwood.repository.plans import RestorePlan
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Latest, resolve

__all__ = [
    "MAPS",
    "REINDEX",
    "REPAIR",
    "ROWS",
    "PageRef",
    "PageRepairs",
    "pages_of",
    "plan_pages",
    "verify_pages",
]

Spawner = Callable[[RestorePlan, Target], Clone]
_NEW_CLONES = 3


@dataclass(slots=True)
class PageRepairs:
    """What the steps of one plan share: the server as subject, and a clone per backup, made when first asked.

    As a context manager it destroys the clones at the end. `spawner` makes a clone on which the target's
    files are whole; the default restores all of the backup.
    """

    cluster: Cluster
    repository: Repository
    spawner: Spawner | None = None
    patience: Patience = field(default_factory=Patience)
    progress: Callable[[Progress], None] | None = None
    _clones: dict[str, Clone] = field(default_factory=dict)
    _subject: Subject | None = None

    @property
    def handlers(self) -> tuple[Handler, ...]:
        return (_Pages(self), _Maps(self), _Rows(self), _Reindex(self))

    @property
    def subject(self) -> Subject:
        if self._subject is None:
            subject = self.cluster.subject(Budget(), repository=self.repository)
            if subject.data_directory is None:
                raise RefusedError(
                    "page repair writes the server's files",
                    hint="set data_directory, and run it on that host",
                )
            require_own_folder(subject, subject.data_directory)
            self._subject = subject
        return self._subject

    def images(self, backup: str) -> Callable[[Target, Collection[int]], Good]:
        """Asks a clone of this backup, made or made anew as needed, for images."""

        def ask(target: Target, blocks: Collection[int]) -> Good:
            clone = self._clones.get(backup)
            if clone is None:
                clone = self._clones[backup] = self._spawn(backup, target)
            try:
                return good_images(self.subject, clone, target, blocks)
            except UnprovenError:
                self.forget(backup)
                raise

        return ask

    def forget(self, backup: str) -> None:
        """Destroy the clone of a backup: the next one stands at a later point."""
        clone = self._clones.pop(backup, None)
        if clone is not None:
            clone.destroy()

    def _spawn(self, backup: str, target: Target) -> Clone:
        return self.clone_at(backup, target, lambda plan: plan)

    def clone_at(self, backup: str, target: Target, at: Callable[[RestorePlan], RestorePlan]) -> Clone:
        """A clone of the backup, at the point that `at` makes of the plan to the newest commit."""
        # A commit now makes everything before it part of the newest state of the archive.
        facts.flush_wal(self.subject, target.database)
        fresh = bring_up_to_date(self.cluster, self.repository)
        if not fresh.complete:
            raise RefusedError(fresh.detail, hint="keep `knockwood wal receive` running, and try again")
        plan = at(resolve(self.repository, Latest(), backup=backup, programs_for=self.cluster.programs))
        if self.spawner is not None:
            return self.spawner(plan, target)
        return spawn(
            self.repository,
            plan,
            programs=self.cluster.programs(plan.backup.major),
            purpose="page repair",
            progress=self.progress,
            unreadable="fail",
            registry=Registry(self.cluster.settings.proof.clones),
        )

    def close(self) -> None:
        for backup in list(self._clones):
            self.forget(backup)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _keeper(journal: StepJournal) -> Callable[[str, bytes], None]:
    """Keeps evidence; a page that has changed since the first time is kept as well, under another name."""

    def keep(name: str, data: bytes) -> None:
        number = 0
        while True:
            label = f"{name}.{number}" if number else name
            if journal.kept(label) is None:
                journal.evidence(label, data)
                return
            if journal.read_evidence(label) == data:
                return
            number += 1

    return keep


def _nothing_to_undo(step: Step, journal: StepJournal, why: str) -> StepResult:
    return StepResult(
        step.kind, step.title, Outcome.ROLLED_BACK, why, evidence=tuple(map(str, journal.evidence_paths))
    )


@dataclass(frozen=True, slots=True)
class _Pages:
    """repair-pages: a page is either as it was or good at any time, so running it again is always right."""

    context: PageRepairs
    kind: str = REPAIR

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        words = step.arguments
        done = self._repaired(words, journal)
        others = standbys(self.context.subject)
        verdict = f"mended {len(done.mended)} pages" if done.mended else "the pages were sound already"
        told = f"; standbys not checked: {', '.join(others)}" if others else ""
        return StepResult(
            step.kind,
            step.title,
            Outcome.DONE if done.mended else Outcome.ALREADY_DONE,
            f"{verdict}: {done.verified}{told}; take a new full backup: a repaired page writes no WAL",
            blocked_seconds=0.0 if done.lock == "SHARE UPDATE EXCLUSIVE" else round(done.locked_seconds, 3),
            evidence=journal.evidence_paths,
            values={
                "mended": done.mended,
                "healthy": done.healthy,
                "damage": {str(block): text for block, text in done.described.items()},
                "lock": done.lock,
                "locked_seconds": round(done.locked_seconds, 3),
                "standbys_not_checked": list(others),
                "new_full_backup_needed": True,
            },
        )

    def _repaired(self, words: Any, journal: StepJournal) -> Repaired:
        context = self.context
        images = context.images(words["backup"])
        for attempt in range(_NEW_CLONES):
            try:
                return repair(
                    context.subject,
                    words["database"],
                    words["oid"],
                    words["blocks"],
                    Procedure(words["procedure"]),
                    Lsn.parse(words["since"]),
                    images=images,
                    keep=_keeper(journal),
                    patience=context.patience,
                )
            except OutdatedError:
                context.forget(words["backup"])
                if attempt == _NEW_CLONES - 1:
                    raise
        raise AssertionError

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        return _nothing_to_undo(
            step, journal, "each page is as it was or good; the damaged images are kept as evidence"
        )


@dataclass(frozen=True, slots=True)
class _Maps:
    context: PageRepairs
    kind: str = MAPS

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        words = step.arguments
        did = rebuild_map(
            self.context.subject,
            words["database"],
            words["oid"],
            words["fork"],
            words["blocks"],
            keep=_keeper(journal),
            note=journal.note,
            notes=journal.notes,
            patience=self.context.patience,
        )
        return StepResult(
            step.kind,
            step.title,
            Outcome.DONE if did else Outcome.ALREADY_DONE,
            "the map was made anew" if did else "it had been made anew already",
            evidence=journal.evidence_paths,
        )

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        return _nothing_to_undo(step, journal, "a map holds no rows: VACUUM makes it at any time")


@dataclass(frozen=True, slots=True)
class _Rows:
    """replace-rows: all in one transaction; run again it finds nothing left to do."""

    context: PageRepairs
    kind: str = ROWS

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        words, context = step.arguments, self.context
        lost, after = Lsn.parse(words["lost"][0]), Lsn.parse(words["first_after"])
        with connect(with_words(context.subject.dsn, dbname=words["database"])) as connection:
            target = facts.target_of(connection, words["database"], words["oid"])
            shape = rows.shape_of(connection, target)
        block = int(words["block"])
        clone = context.clone_at(words["backup"], target, lambda plan: _before(plan, lost))
        with clone:
            stale = rows.read_clone(clone.dsn(target.database), shape, block)
            clone.advance(_before(clone.plan, after))
            rows.require_ended(clone.dsn("template1"), target, words["xids"])
            true = rows.read_clone(clone.dsn(target.database), shape, block, stale)
        done = rows.replace_rows(
            context.subject, target, stale, true, block, keep=_keeper(journal), note=journal.note
        )
        counts = Counter(str(mend.change) for mend in done.mends)
        return StepResult(
            step.kind,
            step.title,
            Outcome.DONE if done.mends else Outcome.ALREADY_DONE,
            ", ".join(f"{number} rows to {change}" for change, number in sorted(counts.items()))
            or "no row lacks a lost change any more",
            blocked_seconds=round(done.locked_seconds, 3),
            evidence=journal.evidence_paths,
            values={"xid": done.xid, **counts, "new_full_backup_needed": True},
        )

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        xid = journal.notes.get("xid")
        if xid is None:
            return _nothing_to_undo(step, journal, "no row was changed")
        return StepResult(
            step.kind,
            step.title,
            Outcome.FAILED,
            f"if transaction {xid} was committed, `knockwood revert {xid}` takes it back",
            evidence=journal.evidence_paths,
        )


def _before(plan: RestorePlan, lsn: Lsn) -> RestorePlan:
    """The same way, up to but not including the record that starts at `lsn`."""
    return replace(plan, target_lsn=lsn, inclusive=False)


@dataclass(frozen=True, slots=True)
class _Reindex:
    context: PageRepairs
    kind: str = REINDEX

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        words = step.arguments
        if words["index"] is None:
            names = mend_indexes(self.context.subject, words["database"], words["oid"], journal.note)
            return StepResult(
                step.kind,
                step.title,
                Outcome.DONE if names else Outcome.ALREADY_DONE,
                f"made anew: {', '.join(names)}" if names else "every index has every row",
                values={"indexes": names},
            )
        did = reindex(
            self.context.subject,
            words["database"],
            words["index"],
            words["filenode"],
            journal.note,
            concurrently=words["concurrently"],
        )
        return StepResult(
            step.kind,
            step.title,
            Outcome.DONE if did else Outcome.ALREADY_DONE,
            "the index was made anew" if did else "it had been made anew already",
        )

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        return _nothing_to_undo(step, journal, "the old index was damaged; the new one is right")


# --- afterwards -----------------------------------------------------------------------------------


def verify_pages(cluster: Cluster, repository: Repository, plan: Plan) -> tuple[Claim, ...]:
    """Ask again: the pages on disk, the rows of the repaired relations, and their indexes against them.

    Reads the repaired relations whole, nothing else.
    """
    subject = cluster.subject(Budget(), repository=repository)
    claims: list[Claim] = []
    tables: set[tuple[str, int]] = set()
    for step in plan.steps:
        words = step.arguments
        if step.kind in (REPAIR, ROWS, MAPS, REINDEX):
            tables.add((words["database"], words["oid"]))
    for database, oid in sorted(tables):
        claims += _verified(subject, database, oid)
    return tuple(claims)


def _verified(subject: Subject, database: str, oid: int) -> list[Claim]:
    with session(subject, database, ("amcheck",)) as tools:
        target = facts.target_of(tools.connection, database, oid)
        count = facts.length(tools.connection, target)
        problems = _bad_on_disk(subject, target, count)
        found = tools.verify_heap(target, 0, count - 1) if count and target.kind in ("r", "t", "m") else []
    claims = [
        Claim(
            f"pages of {target.name}",
            Verdict.BROKEN if problems else Verdict.HELD,
            "; ".join(problems[:5]) or f"{count} pages on disk hold",
        ),
        Claim(
            f"rows of {target.name}",
            Verdict.NOT_CHECKED if found is None else Verdict.BROKEN if found else Verdict.HELD,
            "amcheck is not installed" if found is None else "; ".join(found[:5]),
        ),
    ]
    indexes = verify_indexes(subject, database, oid)
    told = [f"{each.index.name}: {each.detail}" for each in indexes if each.verdict is not Verdict.HELD]
    verdict = worst(each.verdict for each in indexes) if indexes else Verdict.HELD
    claims.append(Claim(f"indexes of {target.name} against its rows", verdict, "; ".join(told[:5])))
    return claims


def _bad_on_disk(subject: Subject, target: Target, count: int) -> list[str]:
    problems = []
    for block in range(count):
        seen = facts.on_disk(facts.read_page(subject, target.path, block), block, count)
        if seen.state not in ("good", "zero"):
            # Half-written pages settle within a moment; a page not written yet is no fault.
            clock.sleep(0.05)
            seen = facts.on_disk(facts.read_page(subject, target.path, block), block, count)
        if seen.state in ("bad", "unreadable"):
            problems.append(f"block {block}: {seen.reason}")
    return problems
