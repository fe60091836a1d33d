"""One row of the catalogue, from a healthy copy to a judgement: damage it, then look as a user would."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from damage_places import Damage, Judgement, judge
from damage_rows import Row, inflict
from damage_site import Site, copy_of
from knockwood.integrity.check import Weight
from knockwood.integrity.registry import select
from knockwood.integrity.run import Report
from knockwood.operations.check import check
from knockwood.operations.protect import receiving
from knockwood.operations.proving import prove_cluster
from knockwood.repository.targets import Latest

HEAVY = [item.name for item in select(None, [Weight.HEAVY])]


@dataclass(slots=True)
class Case:
    """A row and what came of it. `seconds` by step; `not_checked` are the reasons that checks gave."""

    title: str
    key: str
    judgement: Judgement
    seconds: dict[str, float] = field(default_factory=dict)
    not_checked: list[str] = field(default_factory=list)
    check_seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "row": self.key,
            "title": self.title,
            "seconds": {step: round(took, 1) for step, took in self.seconds.items()},
            "check_seconds": {name: round(took, 2) for name, took in self.check_seconds.items()},
            "damages": [
                {
                    "database": outcome.damage.database,
                    "line": outcome.damage.line,
                    "places": [str(place) for place in outcome.damage.places],
                    "found": outcome.found,
                    "checks": outcome.checks,
                    "consequences": outcome.consequences,
                    "first": outcome.first,
                    "note": outcome.damage.note,
                }
                for outcome in self.judgement.outcomes
            ],
            "false_alarms": self.judgement.false_alarms,
            "not_checked": self.not_checked,
        }


def play(healthy: Site, row: Row, parent: Path) -> Case:
    """Damage a copy of the healthy cluster and look for it."""
    with copy_of(healthy, parent) as site:
        damages = inflict(site, row)
        return look(site, row, damages)


def look(site: Site, row: Row, damages: list[Damage]) -> Case:
    """The light checks on the server; the proof with its comparison, where the row asks for it; the heavy
    checks on the server, or for what SQL can see on a clone."""
    case = Case(row.title, row.key, judge(damages, []))
    with receiving(site.cluster, site.repository):
        steps: list[tuple[str, Callable[[], None]]] = [
            ("light", lambda: _add(case, check(site.cluster))),
            ("proof", lambda: _prove(site, case)),
            ("heavy", lambda: _add(case, check(site.cluster, HEAVY, here=not row.clone))),
        ]
        for name, step in steps:
            if name == "proof" and not row.compare:
                continue
            begun = time.monotonic()
            step()
            case.seconds[name] = time.monotonic() - begun
    return case


def _add(case: Case, report: Report) -> None:
    for finding in report.findings:
        case.judgement.add(finding.as_json())
    case.not_checked += [f"{gap.check}: {gap.reason}" for gap in report.not_checked]
    case.check_seconds |= {result.name: result.seconds for result in report.results}


def _prove(site: Site, case: Case) -> None:
    proof = prove_cluster(site.cluster, backup=None, target=Latest())
    stored = site.repository.get_json(f"proofs/{proof.id}.json")
    for finding in stored["findings"] + [f for table in stored["tables"] for f in table["findings"]]:
        case.judgement.add(finding)
    case.not_checked += [
        f"proof: {claim.name}: {claim.detail}" for claim in proof.claims if claim.verdict == "not_checked"
    ]
