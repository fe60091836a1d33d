"""Page repair: the plan for damaged pages, the handlers that execute it, and the checks afterwards.

`plan_pages` makes the plan. `PageRepairs` holds the clones that its steps share, and gives the handlers to
`recover.execute.execute`; `verify_pages` asks amcheck and the pages again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from knockwood.clone.partial import RelationKey, spawn_for
from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone, spawn
from knockwood.errors import KnockwoodError, RefusedError
from knockwood.integrity.check import Budget, Subject
from knockwood.integrity.relation_files import require_own_folder
from knockwood.model import Lsn
from knockwood.model.recovery import Outcome, Step, StepResult
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
from knockwood.operations.page_repair_verify import verify_pages
from knockwood.operations.shadow import warm_clone
from knockwood.postgres.connection import connect, translated, with_words
from knockwood.recover import pages_facts as facts
from knockwood.recover import rows
from knockwood.recover.execute import Handler
from knockwood.recover.indexes import mend_indexes, reindex
from knockwood.recover.journal import StepJournal
from knockwood.recover.pages_cold import cold_images
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_images import Good, good_images
from knockwood.recover.pages_maps import rebuild_map
from knockwood.recover.pages_session import Patience
from knockwood.recover.pages_write import Images, OutdatedError, Repaired, repair, standbys
from knockwood.recover.plan.lost_rows import Key, Row
from knockwood.recover.plan.pages import Procedure
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.backups.model import Progress, chain
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

_NEW_CLONES = 3


@dataclass(slots=True)
class PageRepairs:
    """What the steps of one plan share: the server as subject, and a clone per table, made when first asked.

    As a context manager it destroys the clones at the end.
    """

    cluster: Cluster
    repository: Repository
    patience: Patience = field(default_factory=Patience)
    progress: Callable[[Progress], None] | None = None
    _clones: dict[tuple[str, int], Clone] = field(default_factory=dict)
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

    def images(self, backups: Sequence[str]) -> Images:
        """Asks a clone of the first backup, made or made anew as needed, for images; of those that are not
        proven there (it may have been taken after the damage) the next."""

        def ask(
            target: Target,
            blocks: Collection[int],
            before: Lsn | None = None,
            beyond: Mapping[int, Lsn] = facts.NOTHING_KNOWN,
        ) -> Sequence[Good]:
            found: list[Good] = []
            doubts: dict[int, str] = {}
            left = set(blocks)
            for backup in backups:
                try:
                    if before is None:
                        cold = self._cold(backup, target, left, beyond)
                        if cold is not None:
                            found.append(cold)
                            left -= cold.images.keys()
                            if not left:
                                break
                    if before is not None:
                        good = self._from_before(before, backup, target, left, beyond)
                    else:
                        good = self._newest_images(backup, target, left, beyond)
                except KnockwoodError as error:
                    if not found:
                        raise
                    # What is proven is mended all the same.
                    doubts = {block: doubts.get(block, str(error)) for block in left}
                    break
                found.append(good)
                left -= good.images.keys()
                doubts = {block: doubts.get(block, good.doubts[block]) for block in left}
                if not left:
                    break
            found[-1] = replace(found[-1], doubts={block: doubts[block] for block in left})
            return found

        return ask

    def _cold(
        self, backup: str, target: Target, blocks: Collection[int], beyond: Mapping[int, Lsn]
    ) -> Good | None:
        """What needs no clone, because the backup has it as it is to be."""
        known = list_backups(self.repository)
        if all(each.id != backup for each in known):
            return None
        return cold_images(self.subject, self.repository, chain(known, backup), target, blocks, beyond)

    def _newest_images(
        self, backup: str, target: Target, blocks: Collection[int], beyond: Mapping[int, Lsn]
    ) -> Good:
        key = (backup, target.oid)
        clone = self._clones.get(key)
        held = clone.held(target.node) if clone is not None else None
        if held is not None and not held.issuperset(blocks):
            self.forget(backup, target)
            clone = None
        if clone is None:
            clone = self._clones[key] = self.clone_at(backup, target, blocks=frozenset(blocks))
        whole = type(clone) is Clone  # others are shared or not complete: never opened for writes
        try:
            good = good_images(self.subject, clone, target, blocks, beyond=beyond, may_promote=whole)
            if not good.doubts or whole:
                return good
            self._move_on(clone, backup, target)
            return good_images(self.subject, clone, target, blocks, beyond=beyond, may_promote=False)
        except KnockwoodError:
            self.forget(backup, target)
            raise

    def _from_before(
        self, lsn: Lsn, backup: str, target: Target, blocks: Collection[int], beyond: Mapping[int, Lsn]
    ) -> Good:
        """Images from before a record, of a whole clone: it has to be promoted to write them all down."""
        plan = _before(self._newest(backup, target), lsn)
        with spawn(
            self.repository,
            plan,
            programs=self.cluster.programs(plan.backup.major),
            purpose="page repair",
            progress=self.progress,
            registry=Registry(self.cluster.settings.proof.clones or self.cluster.state),
        ) as clone:
            return good_images(self.subject, clone, target, blocks, beyond=beyond)

    def forget(self, backup: str, target: Target) -> None:
        """Destroy the clone of a backup that holds the target: the next one stands at a later point."""
        clone = self._clones.pop((backup, target.oid), None)
        if clone is not None:
            clone.destroy()

    def clone_at(
        self,
        backup: str,
        target: Target,
        at: Callable[[RestorePlan], RestorePlan] = lambda plan: plan,
        *,
        blocks: frozenset[int] | None = None,
    ) -> Clone:
        """A clone with the target's table, at the point that `at` makes of the plan to the newest commit.

        From the shadow where that can give one, else of the table alone (with `blocks`, of these of the
        target), else of the whole backup.
        """
        plan = at(self._newest(backup, target))
        registry = Registry(self.cluster.settings.proof.clones or self.cluster.state)
        warm = warm_clone(self.cluster, self.repository, plan, registry=registry, wait=2)
        if warm is not None:
            return warm
        return spawn_for(
            self.repository,
            plan,
            [
                RelationKey(
                    target.database, oid=target.owner_oid if blocks is None else target.oid, blocks=blocks
                )
            ],
            programs=self.cluster.programs(plan.backup.major),
            purpose="page repair",
            progress=self.progress,
            registry=registry,
        )

    def _newest(self, backup: str, target: Target) -> RestorePlan:
        # A commit now makes everything before it part of the newest state of the archive.
        facts.flush_wal(self.subject, target.database)
        fresh = bring_up_to_date(self.cluster, self.repository)
        if not fresh.complete:
            raise RefusedError(fresh.detail, hint="keep `knockwood wal receive` running, and try again")
        return resolve(self.repository, Latest(), backup=backup, programs_for=self.cluster.programs)

    def _move_on(self, clone: Clone, backup: str, target: Target) -> None:
        """Have a clone that cannot be promoted write what is in its buffers: it may once it has replayed a
        checkpoint of the server."""
        with connect(self.subject.dsn, application_name="knockwood repair") as connection, translated():
            connection.execute("checkpoint")
        clone.advance(self._newest(backup, target))

    def close(self) -> None:
        while self._clones:
            self._clones.popitem()[1].destroy()

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


class _OnItsOwn:
    """What is refused of one table hinders no other; what is left to do on the same table waits for its pages."""

    __slots__ = ()

    def independent(self, step: Step, refused: Step) -> bool:
        if refused.kind not in (REPAIR, MAPS, ROWS, REINDEX):
            return False
        here, there = step.arguments, refused.arguments
        return step.kind == REPAIR or (here["database"], here["oid"]) != (there["database"], there["oid"])


@dataclass(frozen=True, slots=True)
class _Pages(_OnItsOwn):
    """repair-pages: a page is either as it was or good at any time, so running it again is always right."""

    context: PageRepairs
    kind: str = REPAIR

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        words = step.arguments
        done = self._repaired(words, journal)
        others = standbys(self.context.subject)
        verdict = f"mended {len(done.mended)} pages" if done.mended else "the pages were sound already"
        if done.unproven:
            left = "; ".join(f"block {block}: {why}" for block, why in sorted(done.unproven.items())[:5])
            verdict += f", but not {len(done.unproven)} that no backup has a proven image of ({left})"
        told = f"; standbys not checked: {', '.join(others)}" if others else ""
        outcome = Outcome.DONE if done.mended else Outcome.ALREADY_DONE
        return StepResult(
            step.kind,
            step.title,
            Outcome.REFUSED if done.unproven else outcome,
            f"{verdict}: {done.verified}{told}; take a new full backup: a repaired page writes no WAL",
            blocked_seconds=0.0 if done.lock == "SHARE UPDATE EXCLUSIVE" else round(done.locked_seconds, 3),
            evidence=journal.evidence_paths,
            values={
                "mended": done.mended,
                "healthy": done.healthy,
                "not_mended": {str(block): why for block, why in done.unproven.items()},
                "damage": {str(block): text for block, text in done.described.items()},
                "lock": done.lock,
                "locked_seconds": round(done.locked_seconds, 3),
                "standbys_not_checked": list(others),
                "new_full_backup_needed": True,
            },
        )

    def _repaired(self, words: Any, journal: StepJournal) -> Repaired:
        context = self.context
        images = context.images([words["backup"], *words.get("older", ())])
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
                    beyond={int(block): Lsn.parse(lsn) for block, lsn in words.get("beyond", {}).items()},
                    patience=context.patience,
                )
            except OutdatedError:
                context.close()
                if attempt == _NEW_CLONES - 1:
                    raise
        raise AssertionError

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        return _nothing_to_undo(
            step, journal, "each page is as it was or good; the damaged images are kept as evidence"
        )


@dataclass(frozen=True, slots=True)
class _Maps(_OnItsOwn):
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
class _Rows(_OnItsOwn):
    """replace-rows: all in one transaction; run again it finds nothing left to do."""

    context: PageRepairs
    kind: str = ROWS

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        words, context = step.arguments, self.context
        with connect(with_words(context.subject.dsn, dbname=words["database"])) as connection:
            target = facts.target_of(connection, words["database"], words["oid"])
            shape = rows.shape_of(connection, target)
        stale, true = self._read(words, target, shape)
        done = rows.replace_rows(
            context.subject, target, stale, true, words["blocks"], keep=_keeper(journal), note=journal.note
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

    def _read(
        self, words: Mapping[str, Any], target: Target, shape: rows.Shape
    ) -> tuple[dict[Key, Row], dict[Key, Row]]:
        """The rows of the blocks before their changes were lost, and as these left them: of one clone that goes
        from point to point."""
        stale: dict[Key, Row] = {}
        true: dict[Key, Row] = {}
        stops: list[tuple[Lsn, bool, Mapping[str, Any]]] = []
        for damage in words["damages"]:
            stops += [
                (Lsn.parse(damage["lost"][0]), False, damage),
                (Lsn.parse(damage["first_after"]), True, damage),
            ]
        stops.sort(key=lambda stop: stop[:2])
        before: dict[int, dict[Key, Row]] = {}
        with self.context.clone_at(words["backup"], target, lambda plan: _before(plan, stops[0][0])) as clone:
            for lsn, later, damage in stops:
                if lsn != clone.plan.target_lsn:
                    clone.advance(_before(clone.plan, lsn))
                block, dsn = int(damage["block"]), clone.dsn(target.database)
                if later:
                    rows.require_ended(clone.dsn("template1"), target, damage["xids"])
                    rows.join(true, rows.read_clone(dsn, shape, block, before[block]), target)
                else:
                    before[block] = rows.read_clone(dsn, shape, block)
                    rows.join(stale, before[block], target)
        return stale, true

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        xid = journal.notes.get("xid")
        if xid is None:
            return _nothing_to_undo(step, journal, "no row was changed")
        raise RefusedError(
            f"transaction {xid} may have been committed, and others may have built on it",
            hint=f"knockwood recover --resume, then knockwood revert {xid}",
        )


def _before(plan: RestorePlan, lsn: Lsn) -> RestorePlan:
    """The same way, up to but not including the record that starts at `lsn`."""
    return replace(plan, target_lsn=lsn, inclusive=False)


@dataclass(frozen=True, slots=True)
class _Reindex(_OnItsOwn):
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
