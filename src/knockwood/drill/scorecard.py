"""How a drill went: times, loss counted by the witness, and gates that no points can outweigh."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from knockwood.model import Verdict


@dataclass(frozen=True, slots=True)
class Gate:
    """Something that must not happen in a drill, whatever else went well."""

    name: str
    passed: bool
    detail: str

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds from the fault: to its detection, its diagnosis, the end of repair or restore, the end of its proof."""

    detect: float | None = None
    diagnose: float | None = None
    restore: float | None = None
    verify: float | None = None

    def as_json(self) -> dict[str, float | None]:
        return {
            name: None if value is None else round(value, 3)
            for name, value in (
                ("detect", self.detect),
                ("diagnose", self.diagnose),
                ("restore", self.restore),
                ("verify", self.verify),
            )
        }


@dataclass(frozen=True, slots=True)
class Scorecard:
    """The outcome of one scenario.

    `good_transactions_lost` counts acknowledged transactions that neither the restored nor the running
    database holds; `later_work_kept` those after the restore point that the running one still has.
    `writers_blocked`: seconds that a repair in place kept writers of the damaged relations waiting.
    """

    scenario: str
    title: str
    seed: int
    seconds: Seconds
    cause_first: bool
    acknowledged_commits: int
    good_transactions_lost: int
    later_work_kept: int
    failed_requests: int
    longest_stall: float
    findings: tuple[str, ...]
    gates: tuple[Gate, ...] = field(default=())
    writers_blocked: float | None = None

    @property
    def verdict(self) -> Verdict:
        return Verdict.HELD if self.gates and all(gate.passed for gate in self.gates) else Verdict.BROKEN

    def as_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "seed": self.seed,
            "verdict": str(self.verdict),
            "seconds": self.seconds.as_json(),
            "cause_first": self.cause_first,
            "acknowledged_commits": self.acknowledged_commits,
            "good_transactions_lost": self.good_transactions_lost,
            "later_work_kept": self.later_work_kept,
            "failed_requests": self.failed_requests,
            "longest_stall_seconds": round(self.longest_stall, 3),
            "writers_blocked_seconds": (
                None if self.writers_blocked is None else round(self.writers_blocked, 3)
            ),
            "findings": list(self.findings),
            "gates": [gate.as_json() for gate in self.gates],
        }
