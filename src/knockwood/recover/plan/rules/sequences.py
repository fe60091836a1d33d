"""Sequences that are behind are raised past what their columns hold, never lowered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from knockwood.model.recovery import Precondition, Step
from knockwood.recover.plan.damage import Damage, Kind
from knockwood.recover.plan.offer import Offer, Rank, Turn, key
from knockwood.recover.plan.situation import Situation


def offers(damages: Sequence[Damage], situation: Situation) -> Iterator[Offer]:
    """One offer per sequence, over all the columns that it feeds."""
    found = sorted((damage for damage in damages if damage.kind is Kind.SEQUENCE), key=_place)
    for (database, sequence), group in groupby(found, _place):
        of_one = list(group)
        heals = frozenset(key(damage.finding) for damage in of_one)
        title = f"raise sequence {sequence} past what is used"
        columns = sorted({column for damage in of_one if (column := _column(damage))})
        reason = None if sequence and columns else "the finding does not name the sequence and its column"
        steps = () if reason else (_step(title, database, sequence, columns),)
        yield Offer(Rank.STATEMENT, Turn.SEQUENCES, title, heals, steps, refused=reason)


def _place(damage: Damage) -> tuple[str, str]:
    return damage.finding.location.database or "", str(damage.finding.evidence.get("sequence") or "")


def _column(damage: Damage) -> tuple[str, str] | None:
    """The table and column (both quoted) that the sequence feeds."""
    place = damage.finding.location
    name, separator, _ = (place.key or "").rpartition("=")
    return (place.relation, name) if place.relation and separator else None


def _step(title: str, database: str, sequence: str, columns: list[tuple[str, str]]) -> Step:
    return Step(
        kind="setval",
        title=f"{title} in database {database}",
        arguments={
            "database": database,
            "sequence": sequence,
            "columns": [{"table": table, "column": column} for table, column in columns],
        },
        preconditions=(
            Precondition("the server is up"),
            Precondition("the server is the primary"),
            Precondition("a superuser"),
            Precondition("the sequence is still behind", "looked at again while nobody can draw a number"),
        ),
        locks=f"nextval() of {sequence}, while the largest value is read",
        blocked_seconds=None,
        undo="none: numbers may have been given out since; a sequence that is too far ahead harms nothing",
    )
