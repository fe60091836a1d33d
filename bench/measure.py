"""Measured runs: seconds, processor seconds and peak memory of a command with all its children."""

from __future__ import annotations

import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from knockwood.host import processes
from knockwood.host.privileges import Account
from sandbox import Said, environment

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Series:
    """Repeated measurements of one thing; raises ValueError for none at all."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("no measurements")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, digits: int = 2) -> str:
        """`median (least to most, count)`."""
        low, high = min(self.values), max(self.values)
        return f"{self.median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}, {len(self.values)} runs)"


def ratio(peer: Series, ours: Series) -> float:
    """How many times as fast ours is, by medians of seconds: above 1 is faster than the peer."""
    return peer.median / ours.median


def ratios_of_pairs(peer: Series, ours: Series) -> Series:
    """The same for each pair of neighbouring runs: what disturbed the machine disturbed both."""
    return Series(tuple(a / b for a, b in zip(peer.values, ours.values, strict=True)))


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak bytes over all processes at one moment. `own` leaves out PostgreSQL servers that a command starts.

    `own` is resident memory, which counts shared pages once for each process: at worst too much.
    `server` is what the server's processes hold besides.
    """

    own: int
    server: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One command that ran to its end; `processor` is seconds of all its processes."""

    said: Said
    memory: Memory
    processor: float

    @property
    def seconds(self) -> float:
        return self.said.seconds


class Sampler(threading.Thread):
    """Looks at a process and all its descendants every 50 ms and keeps the peak."""

    def __init__(self, pid: int) -> None:
        super().__init__(name="memory", daemon=True)
        self._root = psutil.Process(pid)
        self._ended = threading.Event()
        self.own = 0
        self.server = 0

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            own, server = self._sample()
            self.own, self.server = max(self.own, own), max(self.server, server)

    def end(self) -> Memory:
        self._ended.set()
        self.join()
        return Memory(self.own, self.server)

    def _sample(self) -> tuple[int, int]:
        own = server = 0
        try:
            family = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return 0, 0
        for process in family:
            try:
                resident = process.memory_info().rss
                if process.name() == "postgres":
                    server += process.memory_full_info().pss
                else:
                    own += resident
            except psutil.Error:  # it has ended in the meantime
                continue
        return own, server


def measured(
    command: Sequence[str | Path],
    *,
    account: Account | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 3600,
) -> Measured:
    """Run a command that must succeed; raises RuntimeError with what it printed if it does not."""
    words = [str(word) for word in command]
    used = _children_seconds()
    begun = time.monotonic()
    child = processes.start(
        words, account=account, env=environment(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    sampler = Sampler(child.pid)
    sampler.start()
    try:
        out, err = child.communicate(timeout=timeout)
        seconds = time.monotonic() - begun
    finally:
        memory = sampler.end()
        processes.stop(child, grace=0)
    said = Said(
        " ".join(words), child.returncode, out.decode(errors="replace"), err.decode(errors="replace"), seconds
    )
    if not said.ok:
        raise RuntimeError(f"status {said.status}: {said.command}\n" + "\n".join(said.lines(30)))
    return Measured(said, memory, _children_seconds() - used)


def _children_seconds() -> float:
    # Those that were waited for, and what they had waited for themselves.
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def alternating(
    runs: int, things: Mapping[str, Callable[[], Measured]], between: Callable[[str], None]
) -> dict[str, list[Measured]]:
    """Run each thing in turn, `runs` times: what slows the machine for a while slows all of them."""
    found: dict[str, list[Measured]] = {name: [] for name in things}
    for _ in range(runs):
        for name, thing in things.items():
            found[name].append(thing())
            between(name)
    return found


def seconds_of(runs: Iterable[Measured]) -> Series:
    return Series(tuple(run.seconds for run in runs))


def processor_of(runs: Iterable[Measured]) -> Series:
    return Series(tuple(run.processor for run in runs))


def peak_of(runs: Iterable[Measured]) -> Memory:
    """The highest of several runs."""
    seen = list(runs)
    return Memory(max(run.memory.own for run in seen), max(run.memory.server for run in seen))
