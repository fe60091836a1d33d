"""Page repair: the plan for damaged pages, the handlers that execute it, and the checks afterwards.

`plan_pages` makes the plan. `PageRepairs` holds the clones that its steps share, and gives the handlers to
`recover.execute.execute`; `verify_pages` asks amcheck and the pages again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from knockwood.errors import RefusedError
from knockwood.history.standing import just_before
from knockwood.model import Lsn
from knockwood.model.recovery import Outcome, Step, StepResult
from knockwood.operations.page_repair_images import GoodImages
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
from knockwood.postgres.connection import connect, with_words
from knockwood.recover import pages_facts as facts
from knockwood.recover import rows
from knockwood.recover.evidence import Keep
from knockwood.recover.execute import Handler
from knockwood.recover.indexes import mend_indexes, reindex
from knockwood.recover.journal import StepJournal
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_maps import rebuild_map
from knockwood.recover.pages_session import Patience
from knockwood.recover.pages_write import OutdatedError, Repaired, repair, standbys
from knockwood.recover.plan.lost_rows import Key, Row
from knockwood.recover.plan.pages import Procedure

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
class PageRepairs(GoodImages):
    """The handlers of one plan, with the images that they share."""

    patience: Patience = field(default_factory=Patience)

    @property
    def handlers(self) -> tuple[Handler, ...]:
        return (_Pages(self), _Maps(self), _Rows(self), _Reindex(self))

    def good_pages(
        self, words: Mapping[str, Any], blocks: Sequence[int], not_in_wal: Sequence[int] = ()
    ) -> dict[str, Any]:
        """What restores have to know later (`recoveries.aware`) of the pages of a step, good from now on."""
        return {
            "database": words["database"],
            "relation": words["relation"],
            "blocks": list(blocks),
            "good_from": str(facts.flush_wal(self.subject, words["database"])),
            "not_in_wal": list(not_in_wal),
            "new_full_backup_needed": bool(not_in_wal),
        }

    def say_mended(self, words: Mapping[str, Any], images: Mapping[int, Lsn]) -> None:
        """Say in the WAL that blocks of a step's table have what these images of old pages lack."""
        with connect(with_words(self.subject.dsn, dbname=words["database"])) as connection:
            target = facts.target_of(connection, words["database"], words["oid"])
        facts.say_mended(self.subject, target, images)


def _keeper(journal: StepJournal) -> Keep:
    """Keeps evidence; a page that has changed since the first time is kept as well, under another name."""

    def free(name: str, data: bytes) -> str | None:
        """A name under which nothing is kept yet; None where the data are kept already."""
        for number in count():
            label = f"{name}.{number}" if number else name
            if journal.kept(label) is None:
                return label
            if journal.read_evidence(label) == data:
                return None
        raise AssertionError

    def keep(pieces: Mapping[str, bytes]) -> None:
        labels = {name: free(name, data) for name, data in pieces.items()}
        journal.evidence_of_many({label: pieces[name] for name, label in labels.items() if label})

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
        if done.old_images:
            self.context.say_mended(words, done.old_images)
        others = standbys(self.context.subject)
        verdict = f"mended {len(done.mended)} pages" if done.mended else "the pages were sound already"
        if done.unproven:
            left = "; ".join(f"block {block}: {why}" for block, why in sorted(done.unproven.items())[:5])
            verdict += f", but not {len(done.unproven)} that no backup has a proven image of ({left})"
        told = f"; standbys not checked: {', '.join(others)}" if others else ""
        alone = sorted({*done.mended, *done.healthy} - {*done.logged})
        if alone:
            told += f"; take a new full backup: {len(alone)} repaired pages are in no WAL"
        outcome = Outcome.DONE if done.mended else Outcome.ALREADY_DONE
        return StepResult(
            step.kind,
            step.title,
            Outcome.REFUSED if done.unproven else outcome,
            f"{verdict}: {done.verified}{told}",
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
                **self.context.good_pages(words, sorted({*done.mended, *done.healthy}), alone),
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
        # Also where another run had brought them over and was killed before it said so.
        images = {int(damage["block"]): Lsn.parse(damage["first_after"]) for damage in words["damages"]}
        context.say_mended(words, images)
        counts = Counter(str(mend.change) for mend in done.mends)
        return StepResult(
            step.kind,
            step.title,
            Outcome.DONE if done.mends else Outcome.ALREADY_DONE,
            ", ".join(f"{number} rows to {change}" for change, number in sorted(counts.items()))
            or "no row lacks a lost change any more",
            blocked_seconds=round(done.locked_seconds, 3),
            evidence=journal.evidence_paths,
            values={"xid": done.xid, **counts, **context.good_pages(words, words["blocks"])},
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
            # On a page that was emptied nothing is left of what was there before.
            if not damage.get("emptied"):
                stops.append((Lsn.parse(damage["lost"][0]), False, damage))
            stops.append((Lsn.parse(damage["first_after"]), True, damage))
        stops.sort(key=lambda stop: stop[:2])
        before: dict[int, dict[Key, Row]] = defaultdict(dict)
        with self.context.clone_at(
            words["backup"], target, lambda plan: just_before(plan, stops[0][0])
        ) as clone:
            for lsn, later, damage in stops:
                if lsn != clone.plan.target_lsn:
                    clone.advance(just_before(clone.plan, lsn))
                block, dsn = int(damage["block"]), clone.dsn(target.database)
                if later:
                    rows.require_ended(clone.dsn(clone.entrance), target, damage["xids"])
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
