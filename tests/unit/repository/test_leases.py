"""One process at a time, whoever dies, stands still or has a clock of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from knockwood.errors import LockHeldError, RepositoryError, StoppedError, StorageUnavailableError
from knockwood.host.files import Chunk
from knockwood.repository.leases import Lease, lease
from knockwood.repository.storage import ObjectInfo, Storage
from knockwood.repository.storage.holder import Holder
from knockwood.repository.storage.local import LocalStorage

FORK = multiprocessing.get_context("spawn")


class Place:
    """As much of a repository as a lease needs."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(LocalStorage(tmp_path))


def leave(place: Place, generation: int, holder: Holder | None, age: float = 0) -> None:
    """Write a generation as another process would have, `age` seconds ago."""
    name = f"leases/backup/{generation:012d}.json"
    body = json.dumps({"holder": holder.to_json() if holder else None, "nonce": secrets.token_hex(4)})
    place.storage.put_new(name, [body.encode()])
    assert isinstance(place.storage, LocalStorage)
    moment = time.time() - age
    os.utime(place.storage.root / name, (moment, moment))


def elsewhere(ttl: float = 60) -> Holder:
    return replace(Holder.own("base backup", ttl), machine="another", host="db2")


def test_a_held_lease_names_its_holder(place: Place) -> None:
    with lease(place, "backup", "base backup") as held:
        held.assert_held()
        refused = pytest.raises(LockHeldError, match=rf"base backup, pid {os.getpid()} on ")
        with refused, lease(place, "backup", "expire"):
            pass
        with lease(place, "expire", "expire"):
            held.assert_held()
    with lease(place, "backup", "expire"):
        pass


def test_generations_only_grow_and_few_are_kept(place: Place) -> None:
    numbers = []
    for _ in range(3):
        with lease(place, "backup", "base backup") as held:
            for _ in range(3):
                held.assert_held()
                numbers.append(held.generation)
    assert numbers == sorted(set(numbers))
    assert len(list(place.storage.list("leases/"))) == 2


def test_a_lease_is_renewed_while_it_is_held(place: Place) -> None:
    with lease(place, "backup", "base backup", ttl=0.3) as held:
        first = held.generation
        while held.generation < first + 2:
            time.sleep(0.01)


def test_a_lease_is_given_back_when_the_work_fails(place: Place) -> None:
    with pytest.raises(ZeroDivisionError), lease(place, "backup", "base backup"):
        raise ZeroDivisionError
    with lease(place, "backup", "base backup"):
        pass


def test_a_dead_process_of_this_machine_is_replaced_at_once(place: Place) -> None:
    child = FORK.Process(target=_take_and_stay, args=(str(place.storage.url), None))
    child.start()
    _wait_for(place)
    with pytest.raises(LockHeldError, match=f"pid {child.pid}"), lease(place, "backup", "mine"):
        pass
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with lease(place, "backup", "mine"):
        pass


def test_a_reused_pid_is_not_taken_for_the_holder(place: Place) -> None:
    own = Holder.own("base backup", 60)
    assert own.started is not None
    leave(place, 1, replace(own, pid=os.getppid(), started=1))
    with lease(place, "backup", "mine"):
        pass


@pytest.mark.parametrize(("age", "free"), [(0, False), (50, False), (70, True)])
def test_a_holder_elsewhere_has_its_time_by_the_storages_clock(place: Place, age: float, free: bool) -> None:
    leave(place, 7, elsewhere(), age)
    if free:
        with lease(place, "backup", "mine") as held:
            assert held.generation == 8
    else:
        with pytest.raises(LockHeldError, match="on db2"), lease(place, "backup", "mine"):
            pass


def test_a_holder_whose_time_lies_ahead_is_watched(place: Place) -> None:
    leave(place, 1, elsewhere(ttl=0.4), age=-3600)
    with lease(place, "backup", "mine"):
        pass


def test_a_clock_that_jumped_takes_nothing_from_a_living_holder(place: Place) -> None:
    assert isinstance(place.storage, LocalStorage)
    with lease(place, "backup", "base backup", ttl=4) as held:
        for info in place.storage.list("leases/"):
            os.utime(place.storage.root / info.name, (0, 0))
        with pytest.raises(LockHeldError), lease(place, "backup", "other"):
            pass
        held.assert_held()


def test_who_was_replaced_notices(place: Place) -> None:
    slow = Lease(place.storage, "backup", replace(elsewhere(ttl=3600), host="slow"))
    slow.acquire()
    for info in place.storage.list("leases/"):
        assert isinstance(place.storage, LocalStorage)
        os.utime(place.storage.root / info.name, (0, 0))
    with lease(place, "backup", "mine") as mine:
        with pytest.raises(LockHeldError, match="was lost: held by mine"):
            slow.assert_held()
        mine.assert_held()
        with pytest.raises(LockHeldError, match="was lost"):
            slow.assert_held()
        slow.release()
        mine.assert_held()


def test_a_stale_number_that_became_free_again_wins_nothing(place: Place) -> None:
    """A process that stood still between looking and creating, while the holder renewed twice."""
    with lease(place, "backup", "base backup") as held:
        stale = Lease(place.storage, "backup", elsewhere())
        state = stale._newest()
        for _ in range(4):
            held.assert_held()
        with pytest.raises(LockHeldError):
            stale._advance(state.generation, stale.holder)
        held.assert_held()


def test_a_lease_that_cannot_be_read_is_said(place: Place) -> None:
    place.storage.put_new("leases/backup/000000000001.json", [b"{"])
    with pytest.raises(RepositoryError, match="a lease that cannot be read"), lease(place, "backup", "x"):
        pass


class Failing:
    """A storage whose writes fail, or are stopped, before or after they are done, as `fail` says."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.fail: list[str] = []

    @property
    def url(self) -> str:
        return self.inner.url

    def put_new(self, name: str, chunks: Iterable[Chunk]) -> int:
        when = self.fail.pop(0) if self.fail else ""
        if when == "before":
            raise StorageUnavailableError("down")
        size = self.inner.put_new(name, chunks)
        if when == "after":
            raise StorageUnavailableError("down")
        if when == "stopped":
            raise StoppedError("stopped by SIGTERM")
        return size

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        return self.inner.read(name, start, end)

    def info(self, name: str) -> ObjectInfo | None:
        return self.inner.info(name)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def delete(self, name: str) -> None:
        self.inner.delete(name)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_passing_failure_loses_no_lease(tmp_path: Path, when: str) -> None:
    place = Place(storage := Failing(LocalStorage(tmp_path)))
    with lease(place, "backup", "base backup") as held:
        storage.fail = [when, when]
        with pytest.raises(StorageUnavailableError):
            held.assert_held()
        if when == "before":
            with pytest.raises(StorageUnavailableError):
                held.assert_held()
        storage.fail = []
        held.assert_held()
    storage.fail = [when]
    with pytest.raises(StorageUnavailableError), lease(place, "backup", "mine"):
        pass
    with lease(place, "backup", "mine"):
        storage.fail = [when]
    with lease(place, "backup", "mine"):
        pass


def test_a_lease_that_could_not_be_renewed_in_time_is_found_out(tmp_path: Path) -> None:
    place = Place(storage := Failing(LocalStorage(tmp_path)))
    with lease(place, "backup", "base backup") as held:
        storage.fail = ["before"]
        with pytest.raises(StorageUnavailableError):
            held.assert_held()


def test_who_is_stopped_while_taking_it_gives_it_back(tmp_path: Path) -> None:
    place = Place(storage := Failing(LocalStorage(tmp_path)))
    storage.fail = ["stopped"]
    with pytest.raises(StoppedError), lease(place, "backup", "base backup"):
        pass
    newest = max((tmp_path / "leases/backup").iterdir())
    assert json.loads(newest.read_text())["holder"] is None, "another machine would have to wait"
    with lease(place, "backup", "mine") as held:
        held.assert_held()


def test_giving_back_does_not_wait_for_a_dead_storage(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knockwood.repository.leases._PATIENCE", 0.01)
    with lease(place, "backup", "base backup") as held:
        held._busy.acquire()
    held._busy.release()
    # It was not given back, and yet this process knows that nobody works under it.
    with lease(place, "backup", "mine"):
        pass


def test_of_many_threads_one_wins(place: Place) -> None:
    for _ in range(10):
        together = threading.Barrier(8)
        holding: list[int] = []

        def work(together: threading.Barrier = together, holding: list[int] = holding) -> None:
            together.wait()
            try:
                with lease(place, "backup", "race"):
                    holding.append(1)
                    together.wait()
            except LockHeldError:
                together.wait()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(holding) == 1


def test_many_processes_never_hold_it_together(tmp_path: Path) -> None:
    """Each adds to a number in a file, without any other lock, while it holds the lease; some die in it."""
    workers = [FORK.Process(target=_count, args=(str(tmp_path), number)) for number in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) >= 5
    inside: str | None = None
    for line in lines:
        what, who = line.split()
        if what == "in":
            assert inside is None or inside.startswith("dies")
            inside = who
        else:
            assert inside == who
            inside = None


def _take_and_stay(address: str, _unused: Any) -> None:
    with lease(Place(LocalStorage(Path(address))), "backup", "base backup"):
        time.sleep(60)


def _wait_for(place: Place) -> None:
    deadline = time.monotonic() + 20
    while not list(place.storage.list("leases/")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _count(folder: str, number: int) -> None:
    place = Place(LocalStorage(Path(folder) / "repository"))
    log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    taken = 0
    end = time.monotonic() + 20
    while taken < 6 and time.monotonic() < end:
        try:
            with lease(place, "backup", f"worker {number}", ttl=30) as held:
                dies = number == 0 and taken == 3
                who = f"{'dies' if dies else 'lives'}-{number}-{taken}"
                held.assert_held()
                os.write(log, f"in {who}\n".encode())
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)
                held.assert_held()
                os.write(log, f"out {who}\n".encode())
                taken += 1
        except LockHeldError:
            time.sleep(0.002)


def test_the_holders_times_are_kept_exactly() -> None:
    own = Holder.own("x", timedelta(minutes=1).total_seconds())
    assert Holder.from_json(json.loads(json.dumps(own.to_json()))) == own
