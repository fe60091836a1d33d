"""What proofs say of backups. They are written elsewhere: what is not understood proves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from knockwood.errors import KnockwoodError
from knockwood.model import Verdict
from knockwood.repository.backups.model import Backup
from knockwood.repository.repository import Repository


def read_proofs(repository: Repository) -> list[Any]:
    """Every proof that can be read; one that cannot proves nothing."""
    found = []
    for info in list(repository.storage.list("proofs/")):
        if info.name.endswith(".json"):
            try:
                found.append(repository.get_json(info.name))
            except KnockwoodError:
                continue
    return found


def proved_clean(proofs: Iterable[Any]) -> frozenset[str]:
    """The ids of the backups of which a proof held in every claim."""
    clean = set()
    for proof in proofs:
        if isinstance(proof, Mapping) and proof.get("verdict") == str(Verdict.HELD):
            backup = proof.get("backup")
            if isinstance(backup, str):
                clean.add(backup)
    return frozenset(clean)


def is_unproved(backup: Backup, proved: frozenset[str]) -> bool:
    """Whether it is incremental and no proof of it held: PostgreSQL may have left pages out of it (decision 13)."""
    return backup.kind != "full" and backup.id not in proved


def trusted(backups: Sequence[Backup], proofs: Iterable[Any]) -> list[Backup]:
    """The backups without the unproved ones; all of them where nothing else is left."""
    proved = proved_clean(proofs)
    return [each for each in backups if not is_unproved(each, proved)] or list(backups)
