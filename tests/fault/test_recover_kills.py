"""Kill -9 at every durable write of an execution: it resumes or rolls back, and no 'done' is a lie."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from knockwood.model.recovery import Outcome, Plan, Recovery, Step, StepResult
from knockwood.recover import execute as execution
from knockwood.recover.journal import Journal, StepJournal, folders


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote, flushed or not; so the disk need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


KILLED_IN_THE_MIDDLE = 18
PLAN = Plan(
    "shop",
    "write three files",
    tuple(Step("write", f"write {name}", {"name": name}) for name in ("first", "second", "third")),
)


class Write:
    """Appends one line to a file, once: the note says how long the file was before."""

    kind = "write"

    def __init__(self, place: Path) -> None:
        self.place = place

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        path = self.place / step.arguments["name"]
        before = path.read_bytes()
        journal.evidence("before", before)
        if "length" not in journal.notes:
            journal.note("length", len(before))
        if len(before) == journal.notes["length"]:
            durably(path, before + b"mended\n")
        journal.note("written", True)
        return StepResult(step.kind, step.title, Outcome.DONE, evidence=journal.evidence_paths)

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        path = self.place / step.arguments["name"]
        if "length" in journal.notes:
            durably(path, journal.read_evidence("before"))
        return StepResult(step.kind, step.title, Outcome.ROLLED_BACK)


def durably(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def in_child(act: Callable[[], object], kill_at: int, how: str) -> bool:
    """Run `act` in a child that is killed at its n-th durable write; True if it came to its end before."""
    with warnings.catch_warnings():
        # Threads of numpy's do nothing here.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            arm(kill_at, how)
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def arm(kill_at: int, how: str) -> None:
    count = 0
    write = os.write

    def counted() -> bool:
        nonlocal count
        count += 1
        return count == kill_at

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killing_fsync(handle: int) -> None:
        if how == "flushed" and counted():
            die()

    def tearing_write(handle: int, data: bytes) -> int:
        if how == "torn" and counted():
            write(handle, bytes(data)[: len(data) // 2])
            die()
        return write(handle, data)

    os.fsync, os.write = killing_fsync, tearing_write  # type: ignore[assignment]


def prepare(root: Path) -> tuple[Path, Path]:
    place, state = root / "data", root / "state"
    place.mkdir(parents=True)
    for step in PLAN.steps:
        (place / step.arguments["name"]).write_bytes(b"damaged\n")
    return place, state


def contents(place: Path) -> set[bytes]:
    return {(place / step.arguments["name"]).read_bytes() for step in PLAN.steps}


def no_lie(folder: Path, place: Path) -> None:
    """Every step that the journal calls done has its effect, and its evidence is the damaged file."""
    journal = Journal.open(folder)
    for event in journal.events:
        if event["event"] == "done":
            name = PLAN.steps[event["step"]].arguments["name"]
            assert (place / name).read_bytes() == b"damaged\nmended\n"
        if event["event"] == "evidence":
            for kept in event["kept"]:
                assert (journal.evidence_folder / kept["file"]).read_bytes() == b"damaged\n"


@pytest.mark.parametrize("how", ["flushed", "torn"])
@pytest.mark.parametrize("ending", ["resume", "roll back"])
def test_every_kill_resumes_or_rolls_back(tmp_path: Path, how: str, ending: str) -> None:
    """One kill during the execution, at each durable write in turn; then to one end or the other."""
    kills = 0
    for kill_at in range(1, 1000):
        place, state = prepare(tmp_path / str(kill_at))
        handlers = [Write(place)]
        kept: dict[str, Recovery] = {}
        ended = in_child(
            lambda handlers=handlers, state=state: execution.execute(
                PLAN, handlers, state, approve=PLAN.id, keep=lambda name, recovery: None
            ),
            kill_at,
            how,
        )
        if ended:
            break
        kills += 1
        open_ones = execution.unfinished(state)
        if not open_ones:
            # Before the plan was written nothing was touched; after the last line all is done.
            assert contents(place) == ({b"damaged\nmended\n"} if folders(state) else {b"damaged\n"})
            continue
        [entry] = open_ones
        no_lie(entry.folder, place)
        if ending == "resume":
            recovery = execution.resume(entry.folder, handlers, keep=kept.__setitem__)
            assert recovery.complete
            assert contents(place) == {b"damaged\nmended\n"}
            assert list(kept.values()) == [recovery]
        else:
            recovery = execution.roll_back(entry.folder, handlers)
            assert {result.outcome for result in recovery.results} <= {Outcome.ROLLED_BACK}
            assert contents(place) == {b"damaged\n"}
        no_lie_at_end(entry.folder, place, ending)
        assert execution.unfinished(state) == []
    assert kills > 15


def no_lie_at_end(folder: Path, place: Path, ending: str) -> None:
    if ending == "resume":
        no_lie(folder, place)
    assert Journal.open(folder).finished


@pytest.mark.parametrize("how", ["flushed", "torn"])
def test_kills_during_resuming_and_rolling_back(tmp_path: Path, how: str) -> None:
    """Killed in the middle, then at each durable write of what was to end it; a third run ends it."""
    for ending in ("resume", "roll back"):
        for kill_at in range(1, 1000):
            place, state = prepare(tmp_path / ending / str(kill_at))
            handlers = [Write(place)]
            assert not in_child(
                lambda handlers=handlers, state=state: execution.execute(
                    PLAN, handlers, state, approve=PLAN.id
                ),
                KILLED_IN_THE_MIDDLE,
                "flushed",
            )
            [entry] = execution.unfinished(state)
            assert 0 < entry.steps_done < 3
            act = execution.resume if ending == "resume" else execution.roll_back
            ended = in_child(
                lambda act=act, entry=entry, handlers=handlers: act(entry.folder, handlers), kill_at, how
            )
            if not ended and execution.unfinished(state):
                act(entry.folder, handlers)
            assert contents(place) == ({b"damaged\nmended\n"} if ending == "resume" else {b"damaged\n"})
            assert execution.unfinished(state) == []
            if ended:
                break
        assert kill_at > 4
