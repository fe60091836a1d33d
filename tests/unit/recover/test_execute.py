"""Executing plans: approval, order, what ends a run and what leaves it open."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from knockwood.errors import HostError, InternalError, RefusedError
from knockwood.model import Claim, Verdict
from knockwood.model.recovery import Outcome, Plan, Recovery, Step, StepResult
from knockwood.recover.execute import StepProgress, execute, resume, roll_back, unfinished
from knockwood.recover.journal import StepJournal

PLAN = Plan("shop", "mend", (Step("a", "first"), Step("b", "second"), Step("a", "third")))


@dataclass
class Handler:
    """Does what `answers` say, by title: an outcome, or an error that is raised; notes first if told to."""

    kind: str
    answers: dict[str, Outcome | Exception] = field(default_factory=dict)
    notes: bool = False
    done: list[str] = field(default_factory=list)

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        if self.notes:
            journal.note("begun", True)
        answer = self.answers.get(step.title, Outcome.DONE)
        if isinstance(answer, Exception):
            raise answer
        self.done.append(step.title)
        return StepResult(step.kind, step.title, answer, "said so")

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        answer = self.answers.get(f"back {step.title}", Outcome.ROLLED_BACK)
        if isinstance(answer, Exception):
            raise answer
        self.done.append(f"back {step.title}")
        return StepResult(step.kind, step.title, answer)


def test_steps_are_done_in_order_then_verified_then_kept(tmp_path: Path) -> None:
    done: list[str] = []
    handlers = [Handler("a", done=done), Handler("b", done=done)]
    told: list[StepProgress] = []
    kept: dict[str, Recovery] = {}
    claim = Claim("checks", Verdict.HELD)
    recovery = execute(
        PLAN,
        handlers,
        tmp_path,
        approve=PLAN.id,
        verify=lambda: (claim,),
        keep=kept.__setitem__,
        progress=told.append,
    )
    assert done == ["first", "second", "third"]
    assert recovery.complete
    assert (recovery.verdict, recovery.claims) == (Verdict.HELD, (claim,))
    [(name, stored)] = kept.items()
    assert name.endswith(PLAN.id)
    assert stored == recovery
    assert [(p.position, p.total, p.result is None) for p in told][:2] == [(1, 3, True), (1, 3, False)]
    assert unfinished(tmp_path) == []


def test_only_the_approved_plan_is_executed(tmp_path: Path) -> None:
    handlers = [Handler("a"), Handler("b")]
    with pytest.raises(RefusedError, match="approved was"):
        execute(PLAN, handlers, tmp_path, approve="0" * 16)
    empty = Plan("shop", "mend", refused=("it is unsafe",))
    with pytest.raises(RefusedError, match="no steps") as told:
        execute(empty, handlers, tmp_path, approve=empty.id)
    assert told.value.hint == "it is unsafe"
    with pytest.raises(RefusedError, match="'b'"):
        execute(PLAN, handlers[:1], tmp_path, approve=PLAN.id)
    assert unfinished(tmp_path) == []


def test_a_refusal_that_noted_nothing_ends_the_run(tmp_path: Path) -> None:
    handlers = [Handler("a"), Handler("b", {"second": RefusedError("somebody changed it", hint="look")})]
    kept: dict[str, Recovery] = {}
    recovery = execute(PLAN, handlers, tmp_path, approve=PLAN.id, keep=kept.__setitem__)
    assert [result.outcome for result in recovery.results] == [Outcome.DONE, Outcome.REFUSED]
    assert recovery.results[1].detail == "somebody changed it; look"
    assert recovery.verdict is Verdict.BROKEN
    assert unfinished(tmp_path) == []
    assert len(kept) == 1


@pytest.mark.parametrize(
    "answer",
    [RefusedError("changed meanwhile"), HostError("the disk is slow"), Outcome.FAILED, Outcome.REFUSED],
)
def test_what_may_be_half_done_stays_open(tmp_path: Path, answer: Outcome | Exception) -> None:
    second = Handler("b", {"second": answer}, notes=True)
    handlers = [Handler("a"), second]
    recovery = execute(PLAN, handlers, tmp_path, approve=PLAN.id)
    assert not recovery.complete
    [entry] = unfinished(tmp_path, "shop")
    assert (entry.steps_done, entry.rolling_back) == (1, False)
    assert entry.reason
    assert unfinished(tmp_path, "other") == []
    with pytest.raises(RefusedError, match="unfinished"):
        execute(PLAN, handlers, tmp_path, approve=PLAN.id)
    second.answers.clear()
    recovery = resume(entry.folder, handlers)
    assert recovery.complete
    assert handlers[0].done == ["first", "third"], "what was done is not done again"
    with pytest.raises(RefusedError, match="come to its end"):
        resume(entry.folder, handlers)


def test_rolled_back_from_the_last_step_to_the_first(tmp_path: Path) -> None:
    done: list[str] = []
    handlers = [Handler("a", {"third": HostError("no")}, done=done), Handler("b", done=done)]
    execute(PLAN, handlers, tmp_path, approve=PLAN.id)
    [entry] = unfinished(tmp_path)
    handlers[1].answers["back second"] = HostError("not now")
    assert roll_back(entry.folder, handlers).results[-1].outcome is Outcome.FAILED
    assert unfinished(tmp_path)[0].rolling_back
    with pytest.raises(RefusedError, match="being rolled back"):
        resume(entry.folder, handlers)
    handlers[1].answers.clear()
    recovery = roll_back(entry.folder, handlers)
    assert done[2:] == ["back third", "back second", "back first"]
    assert [result.outcome for result in recovery.results] == [Outcome.ROLLED_BACK] * 3
    assert recovery.verdict is Verdict.BROKEN
    assert unfinished(tmp_path) == []


class Independent(Handler):
    """Of steps with other first letters nothing hinders it."""

    def independent(self, step: Step, refused: Step) -> bool:
        return step.title[0] != refused.title[0]


def test_what_does_not_rest_on_a_refused_step_is_done_all_the_same(tmp_path: Path) -> None:
    plan = Plan("shop", "mend", tuple(Step("a", title) for title in ("x1", "y1", "x2", "y2")))
    handler = Independent("a", {"x1": Outcome.REFUSED})
    recovery = execute(plan, [handler], tmp_path, approve=plan.id, verify=lambda: (Claim("c", Verdict.HELD),))
    assert handler.done == ["x1", "y1", "y2"]
    assert [str(result.outcome) for result in recovery.results] == ["refused", "done", "refused", "done"]
    assert recovery.results[2].detail == "it rests on what was refused: x1"
    assert (recovery.complete, recovery.verdict) == (False, Verdict.BROKEN)
    assert len(recovery.claims) == 1
    assert unfinished(tmp_path) == []
    noted = Independent("a", {"x1": Outcome.REFUSED}, notes=True)
    execute(plan, [noted], tmp_path, approve=plan.id)
    assert noted.done == ["x1"]
    assert len(unfinished(tmp_path)) == 1


def test_a_run_that_went_on_past_a_refusal_and_was_killed_asks_again(tmp_path: Path) -> None:
    plan = Plan("shop", "mend", tuple(Step("a", title) for title in ("x1", "y1")))
    killed = Independent("a", {"x1": Outcome.REFUSED, "y1": HostError("no disk")})
    recovery = execute(plan, [killed], tmp_path, approve=plan.id)
    assert [str(result.outcome) for result in recovery.results] == ["failed"]
    [left] = unfinished(tmp_path)
    again = Independent("a")
    assert resume(left.folder, [again]).complete
    assert again.done == ["x1", "y1"]


def test_a_roll_back_that_is_refused_leaves_the_way_forward_open(tmp_path: Path) -> None:
    done: list[str] = []
    handlers = [Handler("a", {"third": HostError("no")}, done=done), Handler("b", done=done)]
    execute(PLAN, handlers, tmp_path, approve=PLAN.id)
    [entry] = unfinished(tmp_path)
    handlers[0].answers["back third"] = RefusedError("others have built on it")
    recovery = roll_back(entry.folder, handlers)
    assert recovery.results[-1].outcome is Outcome.REFUSED
    [entry] = unfinished(tmp_path)
    assert not entry.rolling_back
    assert entry.reason == "others have built on it"
    handlers[0].answers.clear()
    assert resume(entry.folder, handlers).complete
    assert done == ["first", "second", "third"]
    assert unfinished(tmp_path) == []


def test_half_rolled_back_it_goes_no_other_way(tmp_path: Path) -> None:
    handlers = [Handler("a", {"third": HostError("no")}), Handler("b")]
    execute(PLAN, handlers, tmp_path, approve=PLAN.id)
    [entry] = unfinished(tmp_path)
    handlers[1].answers["back second"] = RefusedError("others have built on it")
    roll_back(entry.folder, handlers)
    with pytest.raises(RefusedError, match="being rolled back"):
        resume(entry.folder, handlers)


def test_a_defect_is_raised_and_leaves_the_run_open(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        execute(
            PLAN, [Handler("a"), Handler("b", {"second": ZeroDivisionError("x")})], tmp_path, approve=PLAN.id
        )
    assert "ZeroDivisionError" in (unfinished(tmp_path)[0].reason or "")


def test_a_handler_that_answers_for_another_is_a_defect(tmp_path: Path) -> None:
    class Wrong(Handler):
        def run(self, step: Step, journal: StepJournal) -> StepResult:
            return StepResult("other", step.title, Outcome.DONE)

    with pytest.raises(InternalError, match="answered for 'other'"):
        execute(PLAN, [Wrong("a"), Handler("b")], tmp_path, approve=PLAN.id)


def test_what_could_not_be_kept_is_kept_by_resuming(tmp_path: Path) -> None:
    """The checks are not asked twice, and the outcome keeps its name."""
    handlers = [Handler("a"), Handler("b")]
    asked: list[int] = []
    kept: dict[str, Recovery] = {}

    def verify() -> tuple[Claim, ...]:
        asked.append(1)
        return (Claim("checks", Verdict.HELD),)

    def away(name: str, recovery: Recovery) -> None:
        raise HostError("the repository is away")

    with pytest.raises(HostError):
        execute(PLAN, handlers, tmp_path, approve=PLAN.id, verify=verify, keep=away)
    [entry] = unfinished(tmp_path)
    recovery = resume(entry.folder, handlers, verify=verify, keep=kept.__setitem__)
    assert list(kept) == [entry.folder.name]
    assert recovery.verdict is Verdict.HELD
    assert len(asked) == 1
