"""The scenarios in small: played to the end on a real server, judged by the witness."""

from __future__ import annotations

from pathlib import Path

import pytest

from knockwood.drill.scenarios import SCENARIOS, find_scenario
from knockwood.drill.scenarios.base import Scale
from knockwood.drill.story import Kind, Story
from knockwood.errors import UsageError
from knockwood.model import Verdict

# Bisecting takes the longest.
LONG = ("bad-release",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in SCENARIOS]
)
def test_a_scenario_holds_and_leaves_nothing(name: str, shared_folder: Path) -> None:
    parent = shared_folder / f"drill-{name}"
    parent.mkdir(mode=0o755)
    story = Story()
    scale = Scale(orders=20_000, clients=3, warm_up=1.0, aftermath=0.5)
    card = find_scenario(name).play(story, scale, 3, parent)
    assert [gate for gate in card.gates if not gate.passed] == []
    assert card.verdict is Verdict.HELD
    assert card.acknowledged_commits > 0
    assert card.good_transactions_lost == 0
    assert card.seconds.detect is not None
    assert [line for line in story.lines if line.kind is Kind.FAILED] == []
    assert list(parent.iterdir()) == []


def test_a_typo_suggests_the_scenario() -> None:
    with pytest.raises(UsageError) as caught:
        find_scenario("corupt-table")
    assert caught.value.hint == "did you mean corrupt-table?"
