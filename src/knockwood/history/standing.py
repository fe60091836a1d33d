"""Clones that stand just before and just after exact commits: one is made, and replays on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from knockwood.errors import RefusedError
from knockwood.history.staging import timeline_holding
from knockwood.history.transaction import Transaction
from knockwood.model.proof import Commit
from knockwood.model.wal import Lsn, Timeline
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan, ToLsn, resolve

ProgramsFor = Callable[[int], Programs]


class Standing(Protocol):
    """What is asked of a clone."""

    promoted: bool

    @property
    def entrance(self) -> str: ...

    def dsn(self, database: str = ...) -> str: ...
    def held(self, relation: tuple[int, int, int]) -> frozenset[int] | None: ...
    def advance(self, plan: RestorePlan) -> Lsn: ...
    def destroy(self) -> None: ...


Spawner = Callable[[RestorePlan], Standing]


def commit_plan(
    repository: Repository,
    timeline: Timeline,
    commit: Lsn,
    *,
    since: Lsn | None = None,
    programs_for: ProgramsFor = find_programs,
) -> RestorePlan:
    """The plan to just after the commit record that starts at `commit`.

    With `since` its backup is from before that position, so that a clone can stop anywhere from there on. Its WAL is
    unread: clones are made of it, which read it.
    Raises TargetUnreachableError like `resolve`, RefusedError where no commit record starts there or no
    backup is old enough.
    """
    along = timeline_holding(WalArchive(repository).inventory(), timeline, commit)
    plan = resolve(repository, ToLsn(commit), timeline=along, unread=True, programs_for=programs_for)
    if since is not None and plan.backup.stop_lsn > since:
        older = resolve(repository, ToLsn(since), timeline=along, unread=True, programs_for=programs_for)
        plan = resolve(
            repository,
            ToLsn(commit),
            timeline=along,
            backup=older.backup.id,
            unread=True,
            programs_for=programs_for,
        )
    if plan.target_lsn != commit:
        raise RefusedError(
            f"no commit at {commit} can be reached: the nearest point is {plan.target_lsn or plan.backup.id}",
            hint="did it happen before the oldest backup was complete? `knockwood backups` lists them",
        )
    return plan


def just_after(plan: RestorePlan, transaction: Transaction) -> RestorePlan:
    """The plan to just after a commit on the way of another, not before its backup is consistent."""
    commit = Commit(transaction.xid, transaction.commit_lsn, transaction.commit_time)
    return replace(plan, target_lsn=commit.lsn, inclusive=True, last_commit=commit)


def just_before(plan: RestorePlan, lsn: Lsn) -> RestorePlan:
    """The plan to a point on the way of another: before the record that starts at `lsn`."""
    return replace(plan, target_lsn=lsn, inclusive=False, last_commit=None)


class Position:
    """One clone that goes from plan to plan, forwards; a new one is made where the old cannot go on.

    As a context manager it destroys the clone at the end, unless it was `lent` one to begin with.
    """

    def __init__(self, spawner: Spawner, lent: Standing | None = None) -> None:
        self._spawner = spawner
        self._clone = lent
        self._lent = lent

    @property
    def clone(self) -> Standing:
        if self._clone is None:
            raise RefusedError("there is no clone yet")
        return self._clone

    def go(self, plan: RestorePlan) -> Standing:
        """The clone, standing where the plan ends."""
        # Where a clone can only be read promoted (too many subtransactions) it cannot replay on.
        if self._clone is not None and self._clone.promoted:
            self.close()
        if self._clone is None:
            self._clone = self._spawner(plan)
        else:
            self._clone.advance(plan)
        return self._clone

    def close(self) -> None:
        if self._clone is not None and self._clone is not self._lent:
            self._clone.destroy()
        self._clone = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
