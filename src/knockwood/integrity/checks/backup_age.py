"""How old the newest backup is that can be relied on."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from knockwood.integrity.ages import AgeCheck, Stale, stale_backups
from knockwood.integrity.check import Schedule
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.repository import Repository


def _look(repository: Repository, schedule: Schedule, now: datetime) -> Iterator[Stale]:
    return stale_backups(list_backups(repository), schedule, now)


CHECK = AgeCheck(
    name="backup_age",
    title="The newest healthy backup is recent",
    meaning="a restore starts from an old copy and replays more WAL, or cannot start at all",
    remedy="knockwood backup",
    look=_look,
)
