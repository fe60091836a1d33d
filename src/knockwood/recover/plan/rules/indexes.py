"""Indexes are built anew from their tables: no row is touched, none is lost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from knockwood.model.finding import Verdict
from knockwood.model.recovery import Precondition, Step
from knockwood.recover.plan.damage import Damage, Kind
from knockwood.recover.plan.offer import Offer, Rank, Turn, key
from knockwood.recover.plan.situation import Rates, Situation

# What REINDEX CONCURRENTLY names the index it builds, and the one it has replaced.
_LEFTOVER = re.compile(r"_cc(new|old)\d*\"?\Z")


def offers(damages: Sequence[Damage], situation: Situation) -> Iterator[Offer]:
    """One offer per index; what a failed REINDEX CONCURRENTLY left is dropped instead."""
    found = [damage for damage in damages if damage.kind is Kind.INDEX]
    found.sort(key=_place)
    for (database, index), group in groupby(found, _place):
        yield _offer(database, index, list(group), situation)


def _place(damage: Damage) -> tuple[str, str]:
    return damage.finding.location.database or "", damage.finding.location.index or ""


def _offer(database: str, index: str, group: list[Damage], situation: Situation) -> Offer:
    heals = frozenset(key(damage.finding) for damage in group)
    only_invalid = all(damage.finding.check == "invalid_indexes" for damage in group)
    table = next((damage.table for damage in group if damage.table[1]), (database or None, None))
    if only_invalid and _LEFTOVER.search(index):
        return Offer(
            Rank.STATEMENT, Turn.INDEXES, _drop(database, index).title, heals, (_drop(database, index),)
        )
    system = any(damage.system for damage in group)
    return Offer(
        Rank.REINDEX,
        Turn.INDEXES,
        f"rebuild index {index}",
        heals,
        (_reindex(database, index, table[1], system, situation),),
        sound_table=table,
        refused=_doubt(group, situation),
    )


def _doubt(group: list[Damage], situation: Situation) -> str | None:
    """An index that disagrees with its table may be the one that is right: then it is the only witness."""
    if not any(damage.doubtful_table for damage in group):
        return None
    if situation.checked.get("lost_writes") in (Verdict.HELD, Verdict.BROKEN):
        return None
    return (
        "the index and the table disagree, and it is not known whether the table lost a write: an index that"
        " is rebuilt can no longer tell; run the check lost_writes"
    )


def _reindex(database: str, index: str, table: str | None, system: bool, situation: Situation) -> Step:
    size = situation.by_name(database or None, index)
    whole = situation.by_name(database or None, table)
    read = (size.bytes or 0) + (whole.bytes or 0) if size and whole else None
    # A system catalog's index cannot be rebuilt concurrently.
    locks = f"writes to {table or 'the catalog'}" if system else "nothing but DDL on the table"
    lasting = Rates.seconds(read, situation.rates.scan)
    return Step(
        kind="rebuild-index",
        title=f"rebuild index {index}" + (f" in database {database}" if database else ""),
        arguments={"database": database or None, "index": index, "concurrently": not system},
        preconditions=(
            Precondition("the server is up"),
            Precondition("the server is the primary"),
            Precondition("a superuser"),
            Precondition(
                "the table is sound", f"{table or 'its table'} has no damage that is not mended before"
            ),
        ),
        locks=locks,
        blocked_seconds=lasting if system else 0.0,
        seconds=lasting,
        undo="none is needed: the index holds the same rows as before, in order",
    )


def _drop(database: str, index: str) -> Step:
    return Step(
        kind="drop-index",
        title=f"drop {index}, which a rebuild that failed has left in database {database}",
        arguments={"database": database, "index": index},
        preconditions=(
            Precondition("the server is up"),
            Precondition("the server is the primary"),
            Precondition("a superuser"),
            Precondition("the index is invalid", "nothing uses it, and no constraint rests on it"),
        ),
        locks="nothing (DROP INDEX CONCURRENTLY)",
        blocked_seconds=0.0,
        undo="none is needed: no query used it",
    )
