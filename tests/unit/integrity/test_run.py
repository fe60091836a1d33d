"""The run of checks: whatever fails inside is not checked, never green."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from knockwood.errors import LoadTooHighError, ServerDownError, UsageError
from knockwood.integrity import budget, registry, run
from knockwood.integrity.check import Budget, NotChecked, Outcome, Role, Subject, Weight
from knockwood.model import Finding, Location, Severity, Timeline, Verdict
from knockwood.postgres.connection import ServerFacts

NOWHERE = Subject(
    "shop",
    "host=/nonexistent dbname=shop",
    ServerFacts(180000, 1, Timeline(1), False, 1 << 24, True, "replica", None, False),
)


class Made:
    weight = Weight.LIGHT
    title = "made up"

    def __init__(self, name: str, *outcomes: Outcome | Exception) -> None:
        self.name = name
        self._outcomes = outcomes

    def run(self, subject: Subject) -> Iterator[Outcome]:
        for outcome in self._outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome


FINDING = Finding("bad", Severity.HIGH, Location(relation="t", block=3), "wrong")


@pytest.fixture
def with_checks(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(*checks: Made) -> None:
        monkeypatch.setattr(registry, "all_checks", lambda: checks)

    return use


def test_an_error_is_a_reason_and_keeps_what_was_found(with_checks: Any) -> None:
    with_checks(Made("bad", FINDING, FINDING, ValueError("odd")), Made("good"))
    report = run.run_checks(NOWHERE)
    assert report.findings == (FINDING,)
    assert report.not_checked == (NotChecked("bad", "ValueError: odd"),)
    assert [result.verdict for result in report.results] == [Verdict.BROKEN, Verdict.HELD]
    assert report.verdict is Verdict.BROKEN


def test_a_failed_check_is_never_green(with_checks: Any) -> None:
    with_checks(Made("bad", RuntimeError("x")), Made("good"))
    assert run.run_checks(NOWHERE).verdict is Verdict.NOT_CHECKED


def test_once_the_server_is_gone_the_rest_is_not_checked(with_checks: Any) -> None:
    with_checks(Made("first"), Made("second", ServerDownError("no answer")), Made("third", FINDING))
    report = run.run_checks(NOWHERE)
    assert [gap.check for gap in report.not_checked] == ["second", "third"]
    assert "server is gone" in report.not_checked[1].reason
    assert report.findings == ()


def test_nothing_chosen_is_not_checked(with_checks: Any) -> None:
    with_checks()
    assert run.run_checks(NOWHERE).verdict is Verdict.NOT_CHECKED


def test_a_typo_is_told_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        run.run_checks(NOWHERE, ["page_checksum"])
    assert caught.value.hint == "did you mean page_checksums?"


def test_the_order_is_light_first_then_by_name() -> None:
    checks = registry.all_checks()
    assert [c.name for c in checks] == [c.name for c in registry.select([c.name for c in reversed(checks)])]
    assert sorted(checks, key=lambda c: (c.weight is Weight.HEAVY, c.name)) == list(checks)
    assert registry.select(["page-checksums"])[0].name == "page_checksums"
    assert {c.weight for c in registry.select(weights=[Weight.HEAVY])} == {Weight.HEAVY}


def test_progress_is_told_before_and_after(with_checks: Any) -> None:
    with_checks(Made("a"), Made("b"))
    told: list[run.CheckProgress] = []
    run.run_checks(NOWHERE, progress=told.append)
    assert [(p.check.name, p.position, p.total, p.result is None) for p in told] == [
        ("a", 1, 2, True),
        ("a", 1, 2, False),
        ("b", 2, 2, True),
        ("b", 2, 2, False),
    ]


def test_a_machine_that_stays_busy_is_not_checked() -> None:
    busy = replace(NOWHERE, budget=Budget(max_load=-1.0))
    with pytest.raises(LoadTooHighError, match="stayed above"):
        budget.pace(busy, longest=0)
    budget.pace(NOWHERE)


def test_a_clone_is_not_asked_for_indexes_that_were_being_built() -> None:
    [result] = run.run_checks(replace(NOWHERE, role=Role.CLONE), ["invalid_indexes"]).results
    assert result.verdict is Verdict.NOT_CHECKED
    assert "being built" in result.not_checked[0].reason
