"""The whole cluster brought back: in place where the operator orders it, and always among the alternatives."""

from __future__ import annotations

from collections.abc import Sequence

from knockwood.model.finding import Verdict
from knockwood.model.recovery import Alternative, Precondition, Step
from knockwood.recover.plan.damage import PHYSICAL, Damage, Kind
from knockwood.recover.plan.offer import Offer, Rank, Turn, key
from knockwood.recover.plan.situation import Situation, WholeRestore

_COVERED = PHYSICAL | {Kind.SEQUENCE}


def in_place(damages: Sequence[Damage], situation: Situation) -> Offer | None:
    """The restore in place that the operator ordered; None if none was."""
    whole = situation.whole
    if whole is None or not whole.ordered:
        return None
    lasting = seconds(situation)
    return Offer(
        Rank.RESTORE_IN_PLACE,
        Turn.PAGES,
        f"restore the whole cluster in place, to {whole.target}",
        frozenset(key(damage.finding) for damage in damages if _covers(damage, whole)),
        (
            Step(
                kind="restore-in-place",
                title=f"restore the whole cluster in place, to {whole.target}; the old one is kept beside",
                arguments=whole.arguments,
                preconditions=(
                    Precondition("local reach", "the data directory lies on this machine"),
                    Precondition(
                        "the target can be reached", f"from backup {whole.backup}; {_proved(situation)}"
                    ),
                    Precondition("room for a second cluster", "on the data directory's file system"),
                    Precondition("the server is stopped", "it is, or it is stopped when this step runs"),
                ),
                locks="everything: the server is down until it is started again",
                blocked_seconds=lasting,
                seconds=lasting,
                undo="the old data directory is put back",
            ),
        ),
        whole.expected_loss,
        refused=whole.refused,
    )


def _covers(damage: Damage, whole: WholeRestore) -> bool:
    """Replaying WAL undoes damage of bytes; wrong rows are gone only from before they were written."""
    return damage.kind in _COVERED or (damage.kind is Kind.ROWS and whole.rows_back)


def _proved(situation: Situation) -> str:
    if situation.latest_proof is Verdict.HELD:
        return "the newest proof held"
    return "no proof shows that the backups can be restored: knockwood prove"


def alternatives(situation: Situation, chosen: bool) -> list[Alternative]:
    """The whole restores that were not chosen, with what they would lose, lock and last."""
    whole = situation.whole
    if whole is None:
        return []
    why = "a smaller repair heals what can be healed" if chosen else "it has to be ordered"
    if whole.unread:
        why += "; whether its WAL is whole is read only then"
    lasting = seconds(situation)
    found = [
        Alternative(
            f"restore the cluster beside this one: knockwood restore --to {whole.target} --into DIR",
            whole.refused or f"{why}; applications would have to move to it; {_proved(situation)}",
            whole.expected_loss,
            "nothing until applications move",
            lasting,
        )
    ]
    if not whole.ordered:
        found.append(
            Alternative(
                f"restore the cluster in place: knockwood recover --in-place --to {whole.target}",
                whole.refused or f"{why}; the server would be down meanwhile",
                whole.expected_loss,
                "everything: the server is down",
                lasting,
            )
        )
    return found


def seconds(situation: Situation) -> float | None:
    """How long the newest proof took to restore the cluster; None where nothing was proved."""
    proved = situation.rates.proved_seconds
    return round(proved, 1) if proved is not None else None
