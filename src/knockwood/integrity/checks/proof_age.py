"""Whether somebody restored a backup lately and looked at what came out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from knockwood.host import clock
from knockwood.integrity.check import NotChecked, Outcome, Role, Subject, Weight
from knockwood.integrity.databases import about_the_server
from knockwood.model import Finding, Location, Severity
from knockwood.repository.repository import Repository

PROOFS = "proofs/"


def newest_proof(repository: Repository) -> dict[str, Any] | None:
    """The newest stored proof, as JSON; None if there is none."""
    names = [info.name for info in repository.storage.list(PROOFS) if info.name.endswith(".json")]
    if not names:
        return None
    proof: dict[str, Any] = repository.get_json(max(names))
    return proof


@dataclass(frozen=True, slots=True)
class ProofAge:
    """The newest proof held, or at least broke nothing, and is still valid."""

    name = "proof_age"
    title = "A restore was proved lately"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        if subject.role is Role.CLONE:
            yield from about_the_server(subject, self.name)
            return
        if subject.repository is None:
            yield NotChecked(self.name, "no repository is set for this cluster")
            return
        proof = newest_proof(subject.repository)
        if proof is None:
            yield self._finding(subject, "no restore was ever proved", {})
            return
        evidence = {key: proof.get(key) for key in ("id", "verdict", "valid_until", "backup")}
        if proof.get("verdict") == "broken":
            yield self._finding(subject, f"the newest proof {proof['id']} found something broken", evidence)
        if datetime.fromisoformat(proof["valid_until"]) < clock.now():
            yield self._finding(
                subject, f"the newest proof {proof['id']} was valid until {proof['valid_until']}", evidence
            )

    def _finding(self, subject: Subject, summary: str, evidence: dict[str, Any]) -> Finding:
        return Finding(
            check=self.name,
            severity=Severity.HIGH,
            location=Location(cluster=subject.cluster),
            summary=summary,
            meaning="nobody knows whether the backups can be restored",
            remedy="knockwood prove",
            evidence=evidence,
        )


CHECK = ProofAge()
