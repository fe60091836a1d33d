"""Constraints that were never checked for old rows are checked now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from knockwood.model.recovery import Precondition, Step
from knockwood.recover.plan.damage import Damage, Kind
from knockwood.recover.plan.offer import Offer, Rank, Turn, key
from knockwood.recover.plan.situation import Rates, Situation


def offers(damages: Sequence[Damage], situation: Situation) -> Iterator[Offer]:
    """One offer per constraint; its table must hold no rows that are known to be wrong."""
    for damage in damages:
        if damage.kind is Kind.UNVALIDATED:
            yield _offer(damage, situation)


def _offer(damage: Damage, situation: Situation) -> Offer:
    place = damage.finding.location
    table, name = place.relation, str(damage.finding.evidence.get("object") or place.key or "")
    title = f"check every row of {table} against constraint {name}"
    whole = situation.by_name(place.database, table)
    step = Step(
        kind="validate-constraint",
        title=f"{title} in database {place.database}",
        arguments={"database": place.database, "relation": table, "constraint": name},
        preconditions=(
            Precondition("the server is up"),
            Precondition("the server is the primary"),
            Precondition("a superuser"),
            Precondition("no row breaks it", "PostgreSQL reads them all, and changes nothing if one does"),
        ),
        locks="nothing but DDL on the table",
        blocked_seconds=0.0,
        seconds=Rates.seconds(whole.bytes if whole else None, situation.rates.scan),
        undo="none is needed: no row is changed",
    )
    return Offer(
        Rank.STATEMENT,
        Turn.CONSTRAINTS,
        title,
        frozenset({key(damage.finding)}),
        (step,),
        sound_table=(place.database, table),
    )
