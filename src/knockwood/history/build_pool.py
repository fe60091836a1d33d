"""Processes that index segments side by side, as their parent sees them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import knockwood
from knockwood.history.build_worker import piece_as_json
from knockwood.host import processes
from knockwood.repository.repository import Repository
from knockwood.repository.walk import Piece

_MODULE: Final = "knockwood.history.build_worker"

BATCH: Final = 8
"""Segments a worker takes at once; unless it did the one before the first of them, it reads that again."""

FEWEST: Final = 8
"""Below so many segments starting processes costs more than it saves."""

_MOST_WORKERS: Final = 4

_ENVIRONMENT: Final = {
    # One thread each: the work is divided by segments already.
    "OPENBLAS_NUM_THREADS": "1",
    # glibc keeps what is freed for the next segment: pages given back and faulted in again cost a tenth.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


@dataclass(slots=True)
class _Pool:
    batches: list[list[int]]
    stored: dict[int, str]
    advance: Callable[[], None]
    lock: threading.Lock

    def serve(self, child: subprocess.Popen[bytes], job: bytes, first: list[int]) -> None:
        """Feed one worker until nothing is left or it is dead; begin with a batch of its own."""
        assert child.stdin is not None
        assert child.stdout is not None
        # One that dies leaves its segments to the parent.
        with suppress(BrokenPipeError, ValueError):
            child.stdin.write(job)
            batch: list[int] | None = first
            while batch is not None:
                child.stdin.write(json.dumps(batch).encode() + b"\n")
                child.stdin.flush()
                for line in child.stdout:
                    answer = json.loads(line)
                    if not answer:
                        break
                    self._note(*answer)
                else:
                    return
                batch = self._after(batch[-1])

    def _after(self, last: int) -> list[int] | None:
        """A worker's next batch: what follows its last one, for it has the end of that at hand."""
        with self.lock:
            if not self.batches:
                return None
            firsts = [batch[0] for batch in self.batches]
            at = firsts.index(last + 1) if last + 1 in firsts else len(firsts) // 2
            return self.batches.pop(at)

    def _note(self, position: int, name: str | None) -> None:
        if name is None:
            return
        with self.lock:
            self.stored[position] = name
            self.advance()


def build_in_processes(
    repository: Repository,
    pieces: Sequence[Piece],
    sizes: Mapping[str, int],
    missing: Sequence[int],
    workers: int | None,
    advance: Callable[[], None],
) -> dict[int, str]:
    """Index the missing positions of `pieces` with several processes; the names of the heads stored.

    What they could not store (damage, the archive's unfinished end, a worker that was killed) is left out,
    for the caller to do itself. With one processor, or few segments, everything is. `advance` is called
    for each segment stored.
    """
    whole = [position for position in missing if pieces[position].end is None]
    count = min(workers if workers is not None else (os.cpu_count() or 1), _MOST_WORKERS)
    if count < 2 or len(whole) < FEWEST:
        return {}
    batches = _batches(whole)
    count = min(count, len(batches))
    # Far from each other, so that each has much to go on with.
    firsts = [batches[number * len(batches) // count] for number in range(count)]
    pool = _Pool([one for one in batches if one not in firsts], {}, advance, threading.Lock())
    job = {
        "storage": repository.storage.url,
        "recipients": repository.recipients,
        "identities": repository.identities,
        "pieces": [piece_as_json(piece) for piece in pieces],
        "sizes": [sizes[piece.object] for piece in pieces],
    }
    line = json.dumps(job).encode() + b"\n"
    with ExitStack() as stack:
        children = [_start(stack) for _ in range(count)]
        threads = [
            threading.Thread(target=pool.serve, args=(child, line, first))
            for child, first in zip(children, firsts, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            for child in children:
                processes.stop(child, grace=0)
            raise
    return pool.stored


def _batches(positions: Sequence[int]) -> list[list[int]]:
    """Neighbours together, at most so many at once."""
    found: list[list[int]] = []
    for position in positions:
        if found and len(found[-1]) < BATCH and found[-1][-1] + 1 == position:
            found[-1].append(position)
        else:
            found.append([position])
    return found


def _start(stack: ExitStack) -> subprocess.Popen[bytes]:
    package = str(Path(knockwood.__path__[0]).parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    child = processes.start(
        [sys.executable, "-P", "-c", f"import {_MODULE}; {_MODULE}.main()"],
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        death_signal=signal.SIGKILL,
    )

    def end() -> None:
        processes.stop(child, grace=0)
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    stack.callback(end)
    return child
