"""Where a page repair's good images come from: backups, and clones made of them as needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Self

from knockwood.clone.partial import RelationKey, spawn_for, spawn_partial
from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone, spawn
from knockwood.errors import KnockwoodError, RefusedError
from knockwood.history.standing import just_before
from knockwood.integrity.check import Budget, Subject
from knockwood.integrity.relation_files import require_own_folder
from knockwood.model import Lsn
from knockwood.model.recovery import Plan
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.operations.page_repair_shadow import ShadowImages
from knockwood.operations.page_repair_steps import REPAIR
from knockwood.operations.shadow import warm_clone
from knockwood.postgres.connection import connect, translated
from knockwood.recover import pages_facts as facts
from knockwood.recover.pages_cold import cold_images
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_images import Good, good_images
from knockwood.recover.pages_write import Images
from knockwood.recover.plan.page_wal import WalFacts
from knockwood.recover.plan.pages import Procedure
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.backups.model import Progress, chain
from knockwood.repository.plans import RestorePlan
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Latest, resolve

__all__ = ["GoodImages"]

_Key = tuple[str, str, int]
"""A backup, a database, and a relation's oid."""

_Blocks = Mapping[tuple[str, int], frozenset[int] | None]
"""By database and oid of a relation the blocks that are wanted of it, None for all of it."""


@dataclass(slots=True)
class GoodImages:
    """What the steps of one plan share: the server as subject, and clones, made when first asked.

    Of each backup there is one for all steps of the `plan`; where that one does not do, one more for the table.

    As a context manager it destroys the clones at the end.
    """

    cluster: Cluster
    repository: Repository
    progress: Callable[[Progress], None] | None = None
    plan: Plan | None = None
    _clones: dict[_Key, Clone] = field(default_factory=dict)
    _made: set[str] = field(default_factory=set)
    """The backups of which the clone for all steps was made."""
    _subject: Subject | None = None
    _shadow: ShadowImages | None = None

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
        """Asks the shadow, then a clone of the first backup, made or made anew as needed, for images; of those that
        are not proven there (it may have been taken after the damage) the next."""
        return partial(self._images, backups)

    def _images(
        self,
        backups: Sequence[str],
        target: Target,
        blocks: Collection[int],
        before: Lsn | None = None,
        beyond: Mapping[int, Lsn] = facts.NOTHING_KNOWN,
        *,
        unread: bool = False,
    ) -> Sequence[Good]:
        found: list[Good] = []
        doubts: dict[int, str] = {}
        left = set(blocks)
        warm = self._warm(backups[0], target, left, beyond) if unread and before is None else None
        if warm is not None:
            found.append(warm)
            left.difference_update(warm.images)
        for backup in backups if left else ():
            try:
                for good in self._of_backup(backup, target, left, before, beyond):
                    found.append(good)
                    left.difference_update(good.images)
                    doubts = {block: doubts.get(block) or good.doubts.get(block, "") for block in left}
            except KnockwoodError as error:
                if not found:
                    raise
                # What is proven is mended all the same.
                doubts = {block: doubts.get(block) or str(error) for block in left}
                break
            if not left:
                break
        found[-1] = replace(found[-1], doubts={block: doubts[block] for block in left})
        return found

    def _of_backup(
        self,
        backup: str,
        target: Target,
        left: set[int],
        before: Lsn | None,
        beyond: Mapping[int, Lsn],
    ) -> Iterator[Good]:
        """What needs no clone, and then what a clone has of those that are `left` by then."""
        if before is not None:
            yield self._from_before(before, backup, target, left, beyond)
            return
        cold, known = self._cold(backup, target, left, beyond)
        if cold is not None:
            yield cold
        if left:
            yield self._newest_images(backup, target, left, beyond, known)

    def _warm(
        self, backup: str, target: Target, blocks: Collection[int], beyond: Mapping[int, Lsn]
    ) -> Good | None:
        """What the shadow has, if it can be had; its troubles are none of a repair's."""
        if not self.cluster.settings.shadow.enabled:
            return None
        if self._shadow is None:
            self._shadow = ShadowImages(self.cluster, self.repository)
        try:
            plan = self._newest(backup, target)
            later = partial(self._checkpointed, backup, target)
            return self._shadow.images(self.subject, plan, later, target, blocks, beyond)
        except KnockwoodError:
            self._shadow.give_back()
            return None

    def _cold(
        self, backup: str, target: Target, blocks: Collection[int], beyond: Mapping[int, Lsn]
    ) -> tuple[Good | None, Mapping[int, WalFacts]]:
        """What needs no clone, because the backup has it as it is to be; and what the WAL since says."""
        known = list_backups(self.repository)
        if all(each.id != backup for each in known):
            return None, {}
        return cold_images(self.subject, self.repository, chain(known, backup), target, blocks, beyond)

    def _newest_images(
        self,
        backup: str,
        target: Target,
        blocks: Collection[int],
        beyond: Mapping[int, Lsn],
        known: Mapping[int, WalFacts],
    ) -> Good:
        clone = self._clones.get((backup, target.database, target.oid))
        held = clone.held(target.node) if clone is not None else None
        if held is not None and not held.issuperset(blocks):
            self.forget(backup, target.database, target.oid)
            clone = None
        if clone is None:
            clone = self._clone_for_steps(backup, target, blocks)
        whole = type(clone) is Clone  # others are shared or not complete: never opened for writes
        try:
            good = good_images(
                self.subject, clone, target, blocks, beyond=beyond, known=known, may_promote=whole
            )
            if not good.doubts or whole:
                return good
            clone.advance(self._checkpointed(backup, target))
            return good_images(
                self.subject, clone, target, blocks, beyond=beyond, known=good.wal, may_promote=False
            )
        except KnockwoodError:
            self.forget(backup, target.database, target.oid)
            raise

    def _clone_for_steps(self, backup: str, target: Target, blocks: Collection[int]) -> Clone:
        """A clone with the blocks, and the first time with those of all other steps: a disk that fails damages many
        tables, and what a clone costs are its start and its WAL.

        One of them may need more than its blocks (the WAL cuts it, say): then each table has its own.
        """
        plan = self._newest(backup, target)
        wanted = {(target.database, target.oid): frozenset(blocks)}
        if backup not in self._made:
            self._made.add(backup)
            every = self._of_steps(backup, wanted)
            with suppress(KnockwoodError):
                if len(every) > 1:
                    return self._hold(backup, every, self._spawn(plan, every, spawn_partial))
        return self._hold(backup, wanted, self._spawn(plan, wanted, spawn_for))

    def _of_steps(self, backup: str, wanted: _Blocks) -> _Blocks:
        """What is wanted, with what the plan's steps will want of the backup."""
        found = dict(wanted)
        for step in self.plan.steps if self.plan is not None else ():
            words = step.arguments
            if (
                step.kind == REPAIR
                and words["backup"] == backup
                and words["procedure"] != Procedure.SAVE_BUFFER
            ):
                place = (words["database"], words["oid"])
                found[place] = frozenset((found.get(place) or frozenset()) | frozenset(words["blocks"]))
        return found

    def _hold(self, backup: str, wanted: _Blocks, clone: Clone) -> Clone:
        self._clones |= {(backup, *place): clone for place in wanted}
        return clone

    def _from_before(
        self, lsn: Lsn, backup: str, target: Target, blocks: Collection[int], beyond: Mapping[int, Lsn]
    ) -> Good:
        """Images from before a record, of a whole clone: it has to be promoted to write them all down."""
        plan = just_before(self._newest(backup, target), lsn)
        with spawn(
            self.repository,
            plan,
            programs=self.cluster.programs(plan.backup.major),
            purpose="page repair",
            progress=self.progress,
            registry=self._registry,
        ) as clone:
            return good_images(self.subject, clone, target, blocks, beyond=beyond)

    def forget(self, backup: str, database: str, oid: int) -> None:
        """Destroy the clone of a backup that holds the relation: the next one stands at a later point."""
        clone = self._clones.get((backup, database, oid))
        if clone is not None:
            self._clones = {key: each for key, each in self._clones.items() if each is not clone}
            clone.destroy()

    def clone_at(
        self,
        backup: str,
        target: Target,
        at: Callable[[RestorePlan], RestorePlan],
    ) -> Clone:
        """A clone with the target's table, at the point that `at` makes of the plan to the newest commit.

        From the shadow where that can give one, else of the table alone, else of the whole backup.
        """
        plan = at(self._newest(backup, target))
        self._give_back()
        warm = warm_clone(self.cluster, self.repository, plan, registry=self._registry, wait=2)
        return warm or self._spawn(plan, {(target.database, target.owner_oid): None}, spawn_for)

    @property
    def _registry(self) -> Registry:
        return Registry(self.cluster.settings.proof.clones or self.cluster.state)

    def _spawn(self, plan: RestorePlan, wanted: _Blocks, spawner: Callable[..., Clone]) -> Clone:
        keys = [RelationKey(database, oid=oid, blocks=blocks) for (database, oid), blocks in wanted.items()]
        return spawner(
            self.repository,
            plan,
            keys,
            programs=self.cluster.programs(plan.backup.major),
            purpose="page repair",
            progress=self.progress,
            registry=self._registry,
        )

    def _newest(self, backup: str, target: Target) -> RestorePlan:
        # A commit now makes everything before it part of the newest state of the archive.
        facts.flush_wal(self.subject, target.database)
        fresh = bring_up_to_date(self.cluster, self.repository)
        if not fresh.complete:
            raise RefusedError(fresh.detail, hint="keep `knockwood wal receive` running, and try again")
        return resolve(
            self.repository, Latest(), backup=backup, unread=True, programs_for=self.cluster.programs
        )

    def _checkpointed(self, backup: str, target: Target) -> RestorePlan:
        """The newest plan, with a checkpoint of the server: a clone that has replayed it may write what is in its
        buffers, also if it cannot be promoted."""
        with connect(self.subject.dsn, application_name="knockwood repair") as connection, translated():
            connection.execute("checkpoint")
        return self._newest(backup, target)

    def _give_back(self) -> None:
        if self._shadow is not None:
            self._shadow.give_back()

    def close(self) -> None:
        self._give_back()
        while self._clones:
            self.forget(*next(iter(self._clones)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
