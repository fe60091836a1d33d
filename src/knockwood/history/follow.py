"""The index made as WAL arrives: in a process of its own, behind everybody, that nobody waits for.

The receiver's promise (WAL durable in the repository) depends on nothing that happens here. What is not
indexed now, because the process was killed or the storage did not answer, is indexed when it is asked for.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from knockwood.errors import KnockwoodError
from knockwood.history import child
from knockwood.model.wal import WalSegment
from knockwood.repository.repository import Repository

_MODULE: Final = "knockwood.history.follow_worker"

_PAUSES: Final = (0.2, 2.0, 15.0)
"""Seconds after each try to index a segment."""

_PATIENCE: Final = 5.0
"""Seconds to wait for the thread at the end; its process is dead by then."""

Told = Callable[[str], None]


@contextmanager
def following(
    repository: Repository, told: Told = lambda text: None, *, patient: bool = True
) -> Iterator[Callable[[WalSegment], None]]:
    """A function that takes each segment just archived, returns at once and raises nothing.

    Problems are `told` from another thread, and again only when they change. A `patient` process has the
    lowest priority.
    """
    follower = _Follower(repository, told, patient)
    follower.start()
    try:
        yield follower.archived
    finally:
        follower.close()


class _Follower(threading.Thread):
    """Feeds the process. It is this thread's, which alone starts, feeds and ends it."""

    def __init__(self, repository: Repository, told: Told, patient: bool) -> None:
        super().__init__(name="history-index", daemon=True)
        self._job = json.dumps(child.repository_as_json(repository)).encode() + b"\n"
        self._told = told
        self._patient = patient
        self._names: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._worker: subprocess.Popen[bytes] | None = None
        self._last: str | None = None
        self._closed = threading.Event()

    def archived(self, segment: WalSegment) -> None:
        self._names.put(segment.name)

    def close(self) -> None:
        self._closed.set()
        self._names.put(None)
        worker = self._worker
        if worker is not None:
            worker.kill()
        self.join(_PATIENCE)

    def run(self) -> None:
        try:
            while (name := self._names.get()) is not None and not self._closed.is_set():
                self._follow(name)
        finally:
            self._end()

    def _follow(self, name: str) -> None:
        # One that is given up is no loss: the process looks back for it when the next one comes.
        for pause in _PAUSES:
            wrong, passing = self._index(name)
            if wrong is not None and wrong != self._last and not self._closed.is_set():
                self._told(f"{wrong}; what is missing is made when it is asked for")
            self._last = wrong
            if not passing or self._closed.wait(pause):
                return

    def _index(self, name: str) -> tuple[str | None, bool]:
        """What is wrong, if a segment was not indexed, and whether another try may help."""
        try:
            worker = self._worker or self._start()
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(name.encode() + b"\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if answer:
                wrong, passing = json.loads(answer)
                return wrong, passing
            wrong = f"its process ended with status {worker.wait()}"
        except (OSError, ValueError, KnockwoodError) as error:
            wrong = str(error)
        self._end()
        return wrong, True

    def _start(self) -> subprocess.Popen[bytes]:
        self._worker = worker = child.start(_MODULE, patient=self._patient)
        assert worker.stdin is not None
        worker.stdin.write(self._job)
        return worker

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            child.end(worker)
