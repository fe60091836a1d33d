"""Kill -9 at each point of a revert: nothing is half-done, and going on writes each row exactly once."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_revert import Reverter, fingerprint
from knockwood.model.recovery import Outcome
from knockwood.recover import execute as execution
from knockwood.recover.revert_apply import RevertHandler

if TYPE_CHECKING:
    from fix_server import ServerFactory

POINTS = ("evidence", "locked", "written", "checked", "noted", "committed")


def killed_at(point: str, act: Callable[[Callable[[str], None]], object]) -> None:
    """Run `act` in a child that is killed when it reaches the point."""

    def reached(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            act(reached)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "it came to its end before"


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(
    "rounds", [1, pytest.param(6, marks=pytest.mark.slow)], ids=["once", "again and again"]
)
def test_killed_and_gone_on(new_server: ServerFactory, tmp_path: Path, point: str, rounds: int) -> None:
    made = Reverter(new_server(18), tmp_path)
    made.sql(
        "create table t (id int primary key, v int, n numeric);"
        "create table k (id int primary key, t int references t);"
        "insert into t select i, i, 100 from generate_series(1, 50) i;"
        "insert into k select i, i from generate_series(1, 50) i"
    )
    for _ in range(rounds):
        before = fingerprint(made.dsn)
        rogue = made.culprit(
            "update t set v = -v, n = n + 5 where id <= 20",
            "delete from k where id > 40",
            "insert into t values (99, 1, 1)",
        )
        after = fingerprint(made.dsn)
        made.sql("update t set n = n + 1 where id <= 20")  # so that adjusting twice would show
        plan = made.plan(made.request(rogue, counters=("t.n",)))
        killed_at(point, lambda reached, plan=plan: made.apply(plan, reached=reached))  # type: ignore[misc]
        [entry] = execution.unfinished(made.state, "shop")
        recovery = execution.resume(entry.folder, [RevertHandler(made.dsn)])
        [result] = recovery.results
        assert result.outcome is (Outcome.ALREADY_DONE if point == "committed" else Outcome.DONE), result
        made.sql("update t set n = n - 1 where id <= 20")
        assert fingerprint(made.dsn) == before
        assert after != before
        assert execution.unfinished(made.state, "shop") == []


@pytest.mark.parametrize("point", ["written", "noted", "committed"])
def test_killed_and_taken_back(new_server: ServerFactory, tmp_path: Path, point: str) -> None:
    made = Reverter(new_server(18), tmp_path)
    made.sql(
        "create table t (id int primary key, v int); insert into t select i, i from generate_series(1, 50) i"
    )
    rogue = made.culprit(
        "update t set v = -v where id <= 20", "delete from t where id > 40", "insert into t values (99, 1)"
    )
    after = fingerprint(made.dsn)
    plan = made.plan(made.request(rogue))
    killed_at(point, lambda reached: made.apply(plan, reached=reached))
    [entry] = execution.unfinished(made.state, "shop")
    # Killed again on its way back, and once more.
    if point == "committed":
        for where in ("written", "committed"):
            killed_at(
                where,
                lambda reached: execution.roll_back(entry.folder, [RevertHandler(made.dsn, reached=reached)]),
            )
    recovery = execution.roll_back(entry.folder, [RevertHandler(made.dsn)])
    assert [result.outcome for result in recovery.results] == [Outcome.ROLLED_BACK]
    assert fingerprint(made.dsn) == after
    assert execution.unfinished(made.state, "shop") == []
