"""A whole table brought back from a clone: never chosen by itself, for it may lose what was written since."""

from __future__ import annotations

from collections.abc import Sequence

from knockwood.model.recovery import Alternative, ExpectedLoss
from knockwood.recover.plan.damage import OF_TABLES, Damage, Kind

_LOSS = ExpectedLoss(
    None, None, "rows written since the point it is restored to, where they cannot be merged"
)


def command(damage: Damage) -> str | None:
    """What brings the damaged table back; None where it is not known which it is, or it is a catalog."""
    database, table = damage.table
    if damage.kind not in (*OF_TABLES, Kind.ROWS) or damage.system or not database or not table:
        return None
    if table.startswith("pg_toast."):
        return None
    return f"knockwood restore --table {database}.{table}"


def alternatives(damages: Sequence[Damage]) -> list[Alternative]:
    """One for each damaged table, in the order of their names."""
    found = sorted({each for damage in damages if (each := command(damage)) is not None})
    return [
        Alternative(
            f"bring the table back from a clone, beside it or with --in-place: {each}",
            "it is larger than the damage, and has to be asked for",
            _LOSS,
            "nothing beside it; in place the table, while rows are merged or it changes places",
        )
        for each in found
    ]
