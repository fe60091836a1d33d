"""What a repair would do (Plan), and what it did (Recovery): shown first, hashed, then executed step by step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from knockwood.model.finding import Finding, Verdict, worst
from knockwood.model.proof import Claim


@dataclass(frozen=True, slots=True)
class Precondition:
    """Something that must hold when its step runs; it is checked again then, under the lock."""

    name: str
    detail: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class ExpectedLoss:
    """What is gone for good once the plan has run. None: not known. Zero: known to be nothing."""

    transactions: int | None = 0
    rows: int | None = 0
    detail: str = ""

    @property
    def nothing(self) -> bool:
        return self.transactions == 0 and self.rows == 0

    def as_json(self) -> dict[str, Any]:
        return {"transactions": self.transactions, "rows": self.rows, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan. `arguments` are JSON values and all that its executor needs.

    `locks` says what is locked and how, `blocked_seconds` how long writers wait, `seconds` how long it
    lasts (estimates; None where nobody can say), `undo` how it is taken back.
    """

    kind: str
    title: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preconditions: tuple[Precondition, ...] = ()
    locks: str = "nothing"
    blocked_seconds: float | None = 0.0
    seconds: float | None = None
    undo: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "title": self.title,
            "arguments": dict(self.arguments),
            "preconditions": [each.as_json() for each in self.preconditions],
            "locks": self.locks,
            "blocked_seconds": self.blocked_seconds,
            "seconds": self.seconds,
            "undo": self.undo,
        }


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another way to heal the same damage, and why it was not chosen."""

    title: str
    why_not: str
    expected_loss: ExpectedLoss = field(default_factory=ExpectedLoss)
    locks: str = "nothing"
    seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "why_not": self.why_not,
            "expected_loss": self.expected_loss.as_json(),
            "locks": self.locks,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps that heal what was found, smallest safe repair first. Nothing has been done yet.

    `refused` holds the reasons why a part, or all of it (then there are no steps), is not done.
    """

    cluster: str
    purpose: str
    steps: tuple[Step, ...] = ()
    expected_loss: ExpectedLoss = field(default_factory=ExpectedLoss)
    heals: tuple[Finding, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """A hash over everything that will be done: an approval of it holds for no other plan.

        Estimates are left out: measured again, they differ, and change nothing of what is done.
        """
        estimates = ("seconds", "blocked_seconds")
        content = {
            "cluster": self.cluster,
            "steps": [
                {name: value for name, value in step.as_json().items() if name not in estimates}
                for step in self.steps
            ],
            "expected_loss": self.expected_loss.as_json(),
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "cluster": self.cluster,
            "purpose": self.purpose,
            "steps": [step.as_json() for step in self.steps],
            "expected_loss": self.expected_loss.as_json(),
            "heals": [finding.as_json() for finding in self.heals],
            "alternatives": [each.as_json() for each in self.alternatives],
            "refused": list(self.refused),
        }


class Outcome(StrEnum):
    """How a step ended."""

    DONE = "done"
    ALREADY_DONE = "already_done"
    ROLLED_BACK = "rolled_back"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did. `evidence` are paths of what was kept (damaged pages, rows before)."""

    kind: str
    title: str
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0
    blocked_seconds: float = 0.0
    evidence: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "title": self.title,
            "outcome": str(self.outcome),
            "detail": self.detail,
            "seconds": self.seconds,
            "blocked_seconds": self.blocked_seconds,
            "evidence": list(self.evidence),
            "values": dict(self.values),
        }


@dataclass(frozen=True, slots=True)
class Recovery:
    """What executing a plan came to. `claims` are the checks that found the damage, asked again. Times UTC."""

    plan_id: str
    cluster: str
    started_at: datetime
    finished_at: datetime
    results: tuple[StepResult, ...]
    claims: tuple[Claim, ...] = ()

    @property
    def complete(self) -> bool:
        """Every step was done, now or before."""
        return all(result.outcome in (Outcome.DONE, Outcome.ALREADY_DONE) for result in self.results)

    @property
    def verdict(self) -> Verdict:
        """Broken unless complete; else what the checks afterwards said (of none: not checked)."""
        if not self.complete:
            return Verdict.BROKEN
        return worst(claim.verdict for claim in self.claims)

    def as_json(self) -> dict[str, Any]:
        return {
            "plan_id": self.plan_id,
            "cluster": self.cluster,
            "started_at": self.started_at.isoformat(),
            "finished_at": self.finished_at.isoformat(),
            "verdict": str(self.verdict),
            "results": [result.as_json() for result in self.results],
            "claims": [claim.as_json() for claim in self.claims],
        }
