"""Processes that index segments side by side, as their parent sees them."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final

from knockwood.history import child
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


@dataclass(slots=True)
class _Pool:
    batches: list[list[int]]
    stored: dict[int, str]
    advance: Callable[[], None]
    lock: threading.Lock

    def serve(self, worker: subprocess.Popen[bytes], job: bytes, first: list[int]) -> None:
        """Feed one worker until nothing is left or it is dead; begin with a batch of its own."""
        assert worker.stdin is not None
        assert worker.stdout is not None
        # One that dies leaves its segments to the parent.
        with suppress(BrokenPipeError, ValueError):
            worker.stdin.write(job)
            batch: list[int] | None = first
            while batch is not None:
                worker.stdin.write(json.dumps(batch).encode() + b"\n")
                worker.stdin.flush()
                for line in worker.stdout:
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
        **child.repository_as_json(repository),
        "pieces": [piece_as_json(piece) for piece in pieces],
        "sizes": [sizes[piece.object] for piece in pieces],
    }
    line = json.dumps(job).encode() + b"\n"
    with ExitStack() as stack:
        children = [_start(stack) for _ in range(count)]
        threads = [
            threading.Thread(target=pool.serve, args=(one, line, first))
            for one, first in zip(children, firsts, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            for one in children:
                processes.stop(one, grace=0)
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
    started = child.start(_MODULE)
    stack.callback(child.end, started)
    return started
