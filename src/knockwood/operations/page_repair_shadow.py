"""Good images of pages out of the running shadow: what it has replayed need not be replayed again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from knockwood.clone.follow import redo_position
from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone
from knockwood.integrity.audited import Memory
from knockwood.integrity.check import Subject
from knockwood.model import Lsn
from knockwood.operations.cluster import Cluster
from knockwood.operations.shadow import beats_some_blocks, warm_clone
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_images import Good, good_images
from knockwood.repository.plans import RestorePlan
from knockwood.repository.repository import Repository

_WAIT_SECONDS = 2


@dataclass(slots=True)
class ShadowImages:
    """The shadow, borrowed when it is asked first, until `give_back`."""

    cluster: Cluster
    repository: Repository
    _clone: Clone | None = None

    def images(
        self,
        subject: Subject,
        plan: RestorePlan,
        checkpointed: Callable[[], RestorePlan],
        target: Target,
        blocks: Collection[int],
        beyond: Mapping[int, Lsn],
    ) -> Good | None:
        """Images as of the plan's target, or of the one after a checkpoint of the server where some are only in the
        shadow's buffers, without what they leave in doubt; None where the shadow can give none sooner.

        They are proven as a clone's are, by the WAL since the backup that the shadow was made from. Of what
        `lost_writes` has compared with the server's pages without a finding only that is read which the shadow may not
        have on its disk yet; of older changes the last ones that the check remembers count, too. Pages of which that
        WAL has an old image are left out: the shadow has that image, and what they were mended with may be in
        no WAL.
        """
        if self._clone is not None:
            self._clone.advance(plan)
        elif beats_some_blocks(self.cluster, plan):
            registry = Registry(self.cluster.settings.proof.clones or self.cluster.state)
            self._clone = warm_clone(
                self.cluster, self.repository, plan, registry=registry, wait=_WAIT_SECONDS
            )
        if self._clone is None:
            return None
        # Read before the pages: it only moves on, and every change before it is on the shadow's disk.
        on_disk = redo_position(self._clone)
        since, known, doubtful = _compared(
            subject, self._clone.plan.chain[-1].start_lsn, on_disk, target, blocks
        )
        blocks = [block for block in blocks if block not in doubtful]
        known |= {block: max(lsn, known.get(block, lsn)) for block, lsn in beyond.items()}
        words: dict[str, Any] = {"beyond": known, "may_promote": False, "since": since}
        good = good_images(subject, self._clone, target, blocks, **words)
        if good.doubts:
            self._clone.advance(checkpointed())
            good = good_images(subject, self._clone, target, blocks, known=good.wal, **words)
        proven = {block: image for block, image in good.images.items() if block not in good.empty}
        return replace(good, images=proven, empty=frozenset(), doubts={}) if proven else None

    def give_back(self) -> None:
        if self._clone is not None:
            self._clone.destroy()
            self._clone = None


def _compared(
    subject: Subject, base: Lsn, on_disk: Lsn, target: Target, blocks: Collection[int]
) -> tuple[Lsn, dict[int, Lsn], frozenset[int]]:
    """From where on the WAL has to be read, the last changes of the blocks before that are remembered, and the blocks
    that were once old there. `base` is the start of the shadow's backup."""
    compared = Memory.of(subject).compared(base)
    if compared is None:
        return base, {}, frozenset()
    since, fork = min(compared.end, on_disk), (*target.node, "main")
    known = {block: compared.changes.before(fork, block, since.value) for block in blocks}
    old = frozenset(block for block in blocks if (fork, block) in compared.once_old)
    return since, {block: Lsn(lsn) for block, lsn in known.items() if lsn}, old
