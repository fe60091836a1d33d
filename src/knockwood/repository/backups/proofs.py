"""What proofs say of backups. They are written elsewhere: what is not understood proves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from knockwood.errors import KnockwoodError
from knockwood.model import Verdict
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
