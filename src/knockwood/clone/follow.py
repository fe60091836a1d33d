"""Clones that go on from where their own recovery restarts, not from where a plan's backup begins."""

from __future__ import annotations

from dataclasses import dataclass, replace

from knockwood.clone.feed import FedRecovery
from knockwood.clone.spawn import Clone, Report, control_data
from knockwood.errors import HostError, RefusedError
from knockwood.model import Lsn
from knockwood.repository.onward import wal_to
from knockwood.repository.targets import RestorePlan


@dataclass(slots=True)
class Follower(Clone):
    """A clone that reads WAL from where its own recovery restarts, whatever backup a plan begins with."""

    def advance(self, plan: RestorePlan, progress: Report | None = None) -> Lsn:
        self._settle()
        return Clone.advance(self, needed(self, plan), progress)

    def _settle(self) -> None:
        if self.promoted:
            raise RefusedError("a promoted clone cannot replay on", hint="make a new clone instead")
        if self.server.running:
            self.recovery.settle()


def redo_position(clone: Clone) -> Lsn:
    """Where recovery of a stopped clone will begin to read."""
    text = control_data(clone.programs, clone.data_directory).get("Latest checkpoint's REDO location", "")
    try:
        return Lsn.parse(text)
    except ValueError:
        raise HostError("pg_control tells no redo position", where=str(clone.data_directory)) from None


def needed(clone: Clone, plan: RestorePlan) -> RestorePlan:
    """The plan with the WAL that the clone lacks up to the target: found whole, and read from where it stands on.

    Before that it was replayed. A clone that is fed and runs needs no more of it; another restarts from its own
    redo position. Raises TargetUnreachableError where it is not whole.
    """
    if plan.target_lsn is None:
        raise RefusedError("a clone goes on to a record only", hint="name an LSN of a commit, or a time")
    fed = clone.server.running and isinstance(clone.recovery, FedRecovery)
    redo = clone.reached_lsn if fed else redo_position(clone)
    found = wal_to(
        clone.repository,
        max(clone.reached_lsn, redo),
        plan.target_lsn,
        clone.programs,
        timeline=plan.timeline,
        needed_from=redo,
    )
    return replace(plan, chain=clone.plan.chain, wal=found.pieces, histories=found.histories, unread=False)
