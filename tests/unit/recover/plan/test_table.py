"""The plan to bring a table back: what it does, what it refuses, what it loses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from knockwood.recover.plan.table import MODES, Comparison, Mode, TableState, plan_table

ARGUMENTS = {"database": "d", "schema": "s", "table": "t", "backup": "b", "as_of": "0/100"}
KEYED = TableState(True, 10, key=("id",))
COUNTS = st.integers(0, 5)
MODE = st.sampled_from(["refuse", "keep-current", "keep-restored", "replace"])


def test_a_table_that_is_gone_is_made_again_whatever_the_mode() -> None:
    state = TableState(False, 10, referring=("line",), referred=("customer",), views=("v",))
    plan = plan_table("shop", "d.s.t", ARGUMENTS, "refuse", state, None)
    assert [step.arguments["how"] for step in plan.steps] == ["create"]
    assert plan.steps[0].locks == "SHARE ROW EXCLUSIVE on customer, line"
    assert plan.expected_loss.nothing
    assert "views v" in plan.steps[0].title


@given(MODE, COUNTS, COUNTS, COUNTS)
def test_nothing_that_changed_is_lost_without_being_asked_for(
    mode: Mode, missing: int, changed: int, newer: int
) -> None:
    rows = Comparison(1, missing, changed, newer, ("(1)",))
    plan = plan_table("shop", "d.s.t", ARGUMENTS, mode, KEYED, None if mode == "replace" else rows)
    assert bool(plan.steps) != bool(plan.refused)
    if mode == "refuse" and changed:
        assert "(1)" in plan.refused[0]
    elif mode in ("refuse", "keep-current"):
        assert bool(plan.steps) == bool(missing)
        assert plan.expected_loss.nothing
    elif mode == "keep-restored" and plan.steps:
        assert plan.expected_loss.rows == changed
    elif mode == "replace":
        assert plan.expected_loss.rows is None


def test_without_a_key_only_a_replacement_is_offered_and_not_under_foreign_keys() -> None:
    plain = TableState(True, 10)
    assert "cannot be told apart" in plan_table("shop", "t", ARGUMENTS, "refuse", plain, None).refused[0]
    assert plan_table("shop", "t", ARGUMENTS, "replace", plain, None).steps
    tied = TableState(True, 10, key=("id",), referring=("line",))
    assert "rows of line" in plan_table("shop", "t", ARGUMENTS, "replace", tied, None).refused[0]
    altered = TableState(True, 10, key=("id",), hindrances=("column a is gone",))
    for mode in MODES:
        plan = plan_table("shop", "t", ARGUMENTS, mode, altered, None)  # type: ignore[arg-type]
        assert (plan.steps, plan.refused[0]) == ((), "column a is gone")
