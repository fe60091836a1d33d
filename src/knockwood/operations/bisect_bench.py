"""The clones of a bisection: brought to one state after the other, with a good image kept where that pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from knockwood.clone.copies import copy_of
from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone, spawn
from knockwood.errors import NoSpaceError, ObjectMissingError
from knockwood.history.bisect import Costs, Restorable
from knockwood.host import clock, reflink
from knockwood.model import Verdict
from knockwood.postgres.binaries import Programs
from knockwood.repository.onward import renewed
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan

PlanOf = Callable[[int, Restorable | None], RestorePlan]
"""The plan to a state from a backup, or (None) on from an earlier state."""

Tell = Callable[[str], None]

_ATTEMPTS = 5


@dataclass(slots=True)
class Tally:
    """What a bisection cost: backups fetched, copies made, bytes read and written for them or shared."""

    fetched: int = 0
    fetched_bytes: int = 0
    copies: int = 0
    copied_bytes: int = 0
    shared_bytes: int = 0
    copy_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class Bench:
    """At most two clones: the image (the latest good state) and the one at work, a copy of it replayed on."""

    def __init__(
        self,
        repository: Repository,
        plan_of: PlanOf,
        costs: Costs,
        programs: Programs,
        registry: Registry,
        tell: Tell,
    ) -> None:
        self.repository = repository
        self.plan_of = plan_of
        self.costs = costs
        self.tally = Tally()
        self._programs = programs
        self._registry = registry
        self._tell = tell
        self._image: Clone | None = None
        self._image_at = 0
        self._working: Clone | None = None
        self._working_at = 0

    @property
    def held(self) -> int | None:
        """The state of the image at hand."""
        return self._image_at if self._image is not None else None

    def bring(self, index: int, *, last_probe: bool) -> tuple[Clone, str]:
        """A clone at a state, and where it came from. After the `last_probe` no image is needed."""
        _, backup = self.costs.reach(index, self.held)
        if backup is None and self._image is not None:
            clone, source = self._from_image(self._image, last_probe)
            self._working, self._working_at = clone, index
            self._forward(clone, index)
            return clone, source
        assert backup is not None
        self._working, self._working_at = self._cold(index, backup), index
        return self._working, f"backup {self._working.plan.backup.id}"

    def done(self, verdict: Verdict) -> None:
        """Keep or remove the clone at work, by what its state was found to be."""
        clone, self._working = self._working, None
        assert clone is not None
        good = verdict is Verdict.HELD or (verdict is Verdict.NOT_CHECKED and self._image is None)
        if clone.promoted or not good:
            clone.destroy()
            return
        if self._image is not None:
            self._image.destroy()
        self._image, self._image_at = clone, self._working_at

    def close(self) -> None:
        """Remove what is left."""
        for clone in (self._working, self._image):
            if clone is not None:
                clone.destroy()
        self._working = self._image = None

    # --- ways to a state ----------------------------------------------------------------------------------

    def _cold(self, index: int, backup: Restorable) -> Clone:
        plan = self.plan_of(index, backup)
        size = sum(link.raw_bytes for link in plan.chain)
        self._tell(f"fetching backup {plan.backup.id}")
        clone = self._persistently(plan, self._spawn)
        self.tally.fetched += 1
        self.tally.fetched_bytes += size
        rates = self.costs.rates.fetched(size, clone.timings.fetch)
        replayed = max(0, clone.reached_lsn.value - plan.backup.start_lsn.value)
        self.costs.rates = rates.replayed(replayed, clone.timings.wal + clone.timings.replay)
        self.costs.image = self._image_bytes(clone)
        return clone

    def _spawn(self, plan: RestorePlan) -> Clone:
        return spawn(
            self.repository, plan, programs=self._programs, purpose="bisect", registry=self._registry
        )

    def _image_bytes(self, clone: Clone) -> int:
        root = clone.workspace.root
        return 0 if reflink.can_share(root) else reflink.tree_bytes(clone.data_directory)

    def _from_image(self, image: Clone, last_probe: bool) -> tuple[Clone, str]:
        source = f"state {self._image_at}, replayed on"
        if not last_probe and self.costs.worth_keeping(self._image_at):
            self._tell("copying the good state")
            try:
                copy, cost = copy_of(image, "bisect", registry=self._registry)
            except NoSpaceError:
                self.tally.notes.append("there was no room for a copy of the good state: it was replayed on")
            else:
                self.tally.copies += 1
                self.tally.copied_bytes += cost.copied
                self.tally.shared_bytes += cost.shared
                self.tally.copy_seconds += cost.seconds
                if cost.copied:
                    self.costs.rates = self.costs.rates.copied(cost.copied, cost.seconds)
                return copy, f"a copy of {source}"
        self._image = None
        return image, source

    def _forward(self, clone: Clone, index: int) -> None:
        before, began = clone.reached_lsn, clock.monotonic()
        plan = self.plan_of(index, None)
        begin = clone.plan.backup.start_lsn
        # Of the WAL before the clone's own backup nothing is needed.
        wal = tuple(piece for piece in plan.wal if piece.segment.end > begin)
        plan = replace(plan, chain=clone.plan.chain, wal=wal)

        def advance(to: RestorePlan) -> Clone:
            clone.advance(to)
            return clone

        self._persistently(replace(plan, wal=renewed(self.repository, plan.wal)), advance)
        replayed = max(0, clone.reached_lsn.value - before.value)
        self.costs.rates = self.costs.rates.replayed(replayed, clock.monotonic() - began)

    def _persistently(self, plan: RestorePlan, work: Callable[[RestorePlan], Clone]) -> Clone:
        """Do it again from where the WAL is now: a partial segment is replaced by each longer one."""
        for _ in range(_ATTEMPTS):
            try:
                return work(plan)
            except ObjectMissingError:
                plan = replace(plan, wal=renewed(self.repository, plan.wal))
        return work(plan)
