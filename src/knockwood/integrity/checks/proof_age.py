"""Whether somebody restored a backup lately and looked at what came out."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from knockwood.integrity.ages import AgeCheck, Stale, newest_proof, stale_proof
from knockwood.integrity.check import Schedule
from knockwood.repository.repository import Repository


def _look(repository: Repository, schedule: Schedule, now: datetime) -> Iterator[Stale]:
    proof = newest_proof(repository)
    if proof is None:
        return iter([Stale("no restore was ever proved", {})])
    return stale_proof(proof, schedule, now)


CHECK = AgeCheck(
    name="proof_age",
    title="A restore was proved lately",
    meaning="nobody knows whether the backups can be restored",
    remedy="knockwood prove",
    look=_look,
)
