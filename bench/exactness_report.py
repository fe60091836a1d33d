"""What came of the exactness bench, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from knockwood.model import Proof, Verdict
from knockwood.operations.proof_pages import COMPARED
from tables import clipped, markdown


@dataclass
class Proved:
    """One proof and what was wrong with it; `named`: the differences as they were told."""

    name: str
    proof: Proof
    rows: int
    named: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    @property
    def equal(self) -> str:
        [verdict] = [claim.verdict for claim in self.proof.claims if claim.name == COMPARED]
        return str(verdict).replace("_", " ")

    @property
    def held(self) -> str:
        held = sum(claim.verdict is Verdict.HELD for claim in self.proof.claims)
        return f"{held} of {len(self.proof.claims)}"

    @property
    def not_held(self) -> list[str]:
        return [claim.name for claim in self.proof.claims if claim.verdict is not Verdict.HELD]

    def __str__(self) -> str:
        told = f"; {self.named}" if self.named else ""
        wrong = f"; VIOLATIONS {self.violations}" if self.violations else ""
        return f"{self.name}: tables {self.equal}, {self.held} claims held, {self.rows} rows{told}{wrong}"


@dataclass
class Round:
    """One version at one wal_level. `failures`: what could not be done."""

    version: str
    level: str
    proofs: list[Proved] = field(default_factory=list)
    load: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"PostgreSQL {self.version}, wal_level={self.level}"

    @property
    def violations(self) -> list[str]:
        wrong = [f"{self.name}: {failure}" for failure in self.failures]
        return wrong + [f"{self.name}: {p.name}: {line}" for p in self.proofs for line in p.violations]


def report(rounds: Sequence[Round], machine: str, clients: int) -> str:
    """The tables of all rounds as Markdown."""
    undamaged = [(r, p) for r in rounds for p in r.proofs if not p.name.startswith("one byte")]
    damaged = [(r, p) for r in rounds for p in r.proofs if p.name.startswith("one byte")]
    violations = sum(len(entry.violations) for entry in rounds)
    parts = [
        f"{machine}. {clients} clients of the shop without a pause, and nine awkward ones.",
        "### Proofs in a row",
        markdown(
            [
                "PostgreSQL",
                "wal_level",
                "proof",
                "rows",
                "tables equal to the primary",
                "claims held",
                "claims not held",
                "missing commits",
                "RTO s",
                "RPO s",
            ],
            [_proof_row(entry, proved) for entry, proved in undamaged],
        ),
        "### One changed byte",
        markdown(
            ["PostgreSQL", "wal_level", "changed", "tables equal to the primary", "found", "verdict"],
            [_byte_row(entry, proved) for entry, proved in damaged],
        ),
        "### The load",
        *(
            f"- {entry.name}: " + ", ".join(f"{name} {count}" for name, count in entry.load.items())
            for entry in rounds
        ),
        f"Violations: {violations}.",
    ]
    return "\n\n".join(parts[:6]) + "\n\n" + "\n".join(parts[6:-1]) + "\n\n" + parts[-1] + "\n"


def _proof_row(entry: Round, proved: Proved) -> list[str]:
    proof = proved.proof
    missing = "unknown" if proof.missing_commits is None else str(proof.missing_commits)
    rpo = "unknown" if proof.rpo_seconds is None else f"{proof.rpo_seconds:.2f}"
    return [
        entry.version,
        entry.level,
        proved.name.removeprefix("proof "),
        str(proved.rows),
        proved.equal,
        proved.held,
        ", ".join(proved.not_held) or "none",
        missing,
        f"{proof.rto_seconds:.1f}",
        rpo,
    ]


def _byte_row(entry: Round, proved: Proved) -> list[str]:
    return [
        entry.version,
        entry.level,
        proved.name.removeprefix("one byte of public."),
        proved.equal,
        clipped("; ".join(proved.named), 120) or "nothing",
        "wrong" if proved.violations else "as it must be",
    ]
