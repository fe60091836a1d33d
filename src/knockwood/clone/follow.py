"""Clones that go on from where their own recovery restarts, not from where a plan's backup begins."""

from __future__ import annotations

from dataclasses import dataclass, replace

from knockwood.clone.spawn import Clone, Report, control_data
from knockwood.errors import HostError, RefusedError, TargetUnreachableError
from knockwood.model import Lsn
from knockwood.repository.onward import Bounds, onward
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
    """The plan for a settled clone: WAL from its own redo position on, read and found whole up to the target.

    Raises TargetUnreachableError where it is not whole, or the target is no commit of the plan's timeline.
    """
    if plan.target_lsn is None:
        raise RefusedError("a clone goes on to a commit only", hint="name an LSN of a commit, or a time")
    bounds = Bounds(plan.target_lsn, plan.target_lsn + 1)
    redo = redo_position(clone)
    found = onward(clone.repository, redo, bounds, clone.programs, timeline=plan.timeline)
    if found.commit is None:
        raise TargetUnreachableError(
            f"the WAL from {redo} does not lead to {plan.target_lsn}: {found.reach.reason}",
            hint="`knockwood verify` shows what the archive holds",
        )
    return replace(plan, chain=clone.plan.chain, wal=found.pieces, histories=found.histories)
