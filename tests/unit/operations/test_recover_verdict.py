"""The verdict of a recovery whose first plan the server outran."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from knockwood.model import Claim, Verdict
from knockwood.model.recovery import ExpectedLoss, Outcome, Plan, Recovery, StepResult
from knockwood.operations.recover import Executed

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def executed(
    outcome: Outcome, *claims: Claim, left: tuple[str, ...] = (), earlier: tuple[Executed, ...] = ()
) -> Executed:
    plan = Plan("shop", "heal", (), ExpectedLoss(0, 0))
    results = (StepResult("repair-pages", "block 3", outcome),)
    return Executed(
        plan, Recovery("1", "shop", NOW, NOW, results, claims), Path("f"), "r", earlier=earlier, left=left
    )


HELD = Claim("check lost_writes", Verdict.HELD, "")
BROKEN = Claim("check lost_writes", Verdict.BROKEN, "")
OTHER = Claim("check toast", Verdict.BROKEN, "")


@pytest.mark.parametrize(
    ("before", "after", "left", "wanted"),
    [
        ((BROKEN,), (HELD,), (), Verdict.HELD),
        ((), (HELD,), (), Verdict.HELD),
        ((OTHER,), (HELD,), (), Verdict.BROKEN),
        ((), (HELD,), ("no primary key",), Verdict.BROKEN),
        ((), (BROKEN,), (), Verdict.BROKEN),
        ((), (), (), Verdict.NOT_CHECKED),
    ],
)
def test_the_verdict_of_all_together(
    before: tuple[Claim, ...], after: tuple[Claim, ...], left: tuple[str, ...], wanted: Verdict
) -> None:
    first = executed(Outcome.REFUSED, *before)
    assert executed(Outcome.DONE, *after, left=left, earlier=(first,)).verdict is wanted
