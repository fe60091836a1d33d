"""The worker processes of a backup, as their parent sees them: fed, listened to, and never left behind."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final

import knockwood
from knockwood import errors
from knockwood.errors import HostError, KnockwoodError
from knockwood.host import clock, processes
from knockwood.model import Lsn
from knockwood.repository.backups.model import Pack
from knockwood.repository.backups.pagecheck import PageCheck, Suspect
from knockwood.repository.backups.take_worker import Job

_MODULE: Final = "knockwood.repository.backups.take_worker"

_AHEAD: Final = 2
"""Batches that a worker has: it begins the next while it asks for more."""

_LOOK: Final = 5.0
"""Seconds between looks at whether the backup's session still lives."""

_GRACE: Final = 5.0
"""Seconds that a worker has to remove what it was writing, where the backup is given up."""


def _temporary() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8")


@dataclass(eq=False)
class _Worker:
    child: subprocess.Popen[bytes]
    reader: threading.Thread | None = None
    read: int = 0
    told_to_end: bool = False
    ended: bool = False
    index: IO[str] = field(default_factory=_temporary)
    entries: IO[str] = field(default_factory=_temporary)
    suspects: list[Suspect] = field(default_factory=list)
    packs: tuple[Pack, ...] = ()

    def tell(self, value: Any) -> None:
        assert self.child.stdin is not None
        # One that is dead is heard of by the end of its output.
        with suppress(BrokenPipeError):
            self.child.stdin.write(json.dumps(value).encode() + b"\n")
            self.child.stdin.flush()


class WorkerPool:
    """Processes that copy files into packs. Leaving the block kills those that still run.

    They are children of the thread that makes the pool and die with it, whatever kills it: the kernel
    sends SIGKILL, and the end of their input tells them too.
    """

    def __init__(self, job: Job, count: int, check: PageCheck) -> None:
        self._check = check
        self._heard: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        try:
            for number in range(count):
                self._start(replace(job, first=job.first + number))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers:
            if worker.child.poll() is None:
                worker.child.terminate()
        for worker in self._workers:
            processes.stop(worker.child, grace=_GRACE)
        for worker in self._workers:
            if worker.reader is not None:
                worker.reader.join()
            for pipe in (worker.child.stdin, worker.child.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
            worker.index.close()
            worker.entries.close()

    def _start(self, job: Job) -> None:
        package = str(Path(knockwood.__path__[0]).parent)
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        child = processes.start(
            [sys.executable, "-P", "-c", f"import {_MODULE}; {_MODULE}.main()"],
            # numpy starts a thread per core for linear algebra, which nobody does here.
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            death_signal=signal.SIGKILL,
        )
        worker = _Worker(child)
        self._workers.append(worker)
        worker.reader = threading.Thread(target=self._listen, args=(worker,), daemon=True)
        worker.reader.start()
        worker.tell(asdict(job))

    @property
    def pids(self) -> list[int]:
        return [worker.child.pid for worker in self._workers]

    # --- the work --------------------------------------------------------------------------------

    def run(
        self,
        batches: Iterator[list[str]],
        look: Callable[[], None],
        told: Callable[[int, str], None],
    ) -> tuple[Pack, ...]:
        """Hand out all batches of paths and wait until all is stored; the packs.

        `look` is called now and then and may raise; `told` gets the bytes read so far and a path.
        Raises what a worker failed with, HostError for one that was killed.
        """
        for worker in self._workers * _AHEAD:
            self._feed(worker, batches)
        looked = clock.monotonic()
        while not all(worker.ended for worker in self._workers):
            if clock.monotonic() - looked >= _LOOK:
                look()
                looked = clock.monotonic()
            try:
                worker, message = self._heard.get(timeout=1.0)
            except queue.Empty:
                continue
            if message is not None and self._take(worker, message):
                told(sum(one.read for one in self._workers), message["path"])
                if "more" in message:
                    self._feed(worker, batches)
            elif message is None and not worker.ended:
                raise _died(worker)
        return tuple(pack for worker in self._workers for pack in worker.packs)

    def index(self) -> Iterator[str]:
        """The lines of the index of members, each with its end."""
        for worker in self._workers:
            worker.index.seek(0)
            yield from worker.index

    def entries(self) -> Iterator[str]:
        """The lines of the manifest."""
        for worker in self._workers:
            worker.entries.seek(0)
            for line in worker.entries:
                yield line.rstrip("\n")

    def _feed(self, worker: _Worker, batches: Iterator[list[str]]) -> None:
        if worker.told_to_end:
            return
        batch = next(batches, None)
        worker.told_to_end = batch is None
        worker.tell(batch)

    def _take(self, worker: _Worker, message: dict[str, Any]) -> bool:
        """Note what a worker said; whether it is at work still. Raises what it failed with."""
        if "failed" in message:
            raise _failure(message)
        if "packs" in message:
            worker.packs = tuple(Pack.from_json(pack) for pack in message["packs"])
            self._check.merge(worker.suspects, message["overflow"], message["pages"])
            worker.ended = True
            return False
        worker.read = message["read"]
        return True

    def _listen(self, worker: _Worker) -> None:
        assert worker.child.stdout is not None
        for line in worker.child.stdout:
            kind, text = line[:1], line[1:].decode()
            if not text.endswith("\n"):
                break  # killed in the middle of it
            if kind == b"i":
                worker.index.write(text)
            elif kind == b"m":
                worker.entries.write(text)
            elif kind == b"s":
                file, block, reason, lsn = json.loads(text)
                worker.suspects.append(Suspect(file, block, reason, Lsn(lsn)))
            else:
                self._heard.put((worker, json.loads(text)))
        self._heard.put((worker, None))


def _died(worker: _Worker) -> KnockwoodError:
    status = processes.stop(worker.child, grace=0)
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return HostError(
        f"a worker process of the backup ended with {how}",
        where=f"pid {worker.child.pid}",
        hint="was it killed for its memory? the kernel's log tells; nothing was listed, take the backup again",
    )


def _failure(message: dict[str, Any]) -> KnockwoodError:
    kind = getattr(errors, message["failed"], KnockwoodError)
    made = kind(message["what"], where=message["where"], hint=message["hint"])
    assert isinstance(made, KnockwoodError)
    return made
