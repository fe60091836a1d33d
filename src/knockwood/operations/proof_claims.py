"""Claims of a proof about the repository itself, whatever came of the restore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from knockwood.model import Claim, worst
from knockwood.postgres.binaries import Programs
from knockwood.repository.backups.model import Backup
from knockwood.repository.repository import Repository
from knockwood.repository.verify import Verification, verify

_ATTEMPTS: Final = 8


def backup_health(chain: Sequence[Backup]) -> Claim:
    """What the page checksums said while the backup and its ancestors were taken."""
    verdict = worst(backup.health.verdict for backup in chain)
    reasons = [backup.health.reason for backup in chain if backup.health.reason]
    reasons += [
        f"{backup.id}: {backup.health.bad_page_count} damaged pages"
        for backup in chain
        if backup.health.bad_page_count
    ]
    return Claim("page checksums of the backup", verdict, some(reasons))


def verified(repository: Repository, programs_for: Callable[[int], Programs]) -> Claim:
    """What `verify` says of all backups and all WAL."""
    outcome = _settled(repository, programs_for)
    reasons = [f"{item.object}: {item.reason}" for item in outcome.damaged]
    reasons += [f"gap {gap.start} to {gap.end}: {gap.reason}" for gap in outcome.gaps]
    reasons += [gap.reason for gap in outcome.not_checked]
    text = f"{outcome.backups} backups and {outcome.segments} WAL segments"
    return Claim("backups and WAL verified", outcome.verdict, some([*reasons, text]))


def _settled(repository: Repository, programs_for: Callable[[int], Programs]) -> Verification:
    """Verified; again where a partial segment was replaced by a longer one between listing and reading."""
    outcome = verify(repository, programs_for=programs_for)
    for _ in range(_ATTEMPTS):
        gone = [d.object for d in outcome.damaged if repository.storage.info(d.object) is None]
        if not gone or not all(name.startswith("wal/partial/") for name in gone):
            break
        outcome = verify(repository, programs_for=programs_for)
    return outcome


def some(reasons: Sequence[str], most: int = 5) -> str:
    """The first reasons in one line, and how many more there are."""
    shown = "; ".join(reasons[:most])
    return f"{shown}; and {len(reasons) - most} more" if len(reasons) > most else shown
