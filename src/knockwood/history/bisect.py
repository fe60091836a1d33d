"""Which state of the past to look at next, to find the first bad one soonest. Pure: no clone, no clock.

States are numbered: 0 is where the range starts, i the one after its i-th commit, `last` the newest. Looking
at a state (a probe) costs time: a backup is fetched and replayed forward, or a kept good image is copied
and replayed on. The search is a bisection whose splits may be moved off the middle to where probing
is cheap (at a backup, shortly after the good image), but never so far that the promised number of probes
could be passed. Skipping states that cannot be checked follows the idea of `git bisect skip`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from knockwood.model.finding import Verdict

_GRID: Final = 48
"""States weighed for one split; more would cost longer to weigh than they save."""

_WORTH_MOVING: Final = 8
"""States in the range from which one more probe than a plain bisection is allowed, to save replay."""

_SMALL_REPLAY: Final = 4 << 20


class Outcome(StrEnum):
    """What a search came to."""

    FOUND = "found"
    NARROWED = "narrowed"
    BAD_FROM_START = "bad_from_start"
    NEVER_BAD = "never_bad"
    NOT_MONOTONE = "not_monotone"
    NOT_CHECKABLE = "not_checkable"


@dataclass(frozen=True, slots=True)
class Result:
    """`first_bad` and `last_good` are neighbours if FOUND; if NARROWED every state between could not be
    checked (or `last_good` is None: no good state was seen). `again` is the probe that contradicts a single
    turn (NOT_MONOTONE)."""

    outcome: Outcome
    first_bad: int | None = None
    last_good: int | None = None
    again: int | None = None


@dataclass(frozen=True, slots=True)
class Rates:
    """What things take on this machine: bytes per second, and seconds for each start and each check."""

    fetch: float = 150e6
    replay: float = 80e6
    copy: float = 400e6
    start: float = 1.5
    check: float = 0.2

    def fetched(self, count: int, seconds: float) -> Rates:
        return replace(self, fetch=_mean(self.fetch, count / max(seconds, 1e-3)))

    def replayed(self, count: int, seconds: float) -> Rates:
        """Learn from a replay of `count` bytes of WAL: small ones tell what a start takes, large ones the rate."""
        if count < _SMALL_REPLAY:
            return replace(self, start=_mean(self.start, seconds))
        return replace(self, replay=_mean(self.replay, count / max(seconds - self.start, seconds / 10, 1e-3)))

    def copied(self, count: int, seconds: float) -> Rates:
        return replace(self, copy=_mean(self.copy, max(count, 1) / max(seconds, 1e-3)))

    def checked(self, seconds: float) -> Rates:
        return replace(self, check=_mean(self.check, seconds))


def _mean(old: float, new: float) -> float:
    # Recent measurements count most: the first probe already says what this machine is like.
    return old / 4 + new * 3 / 4


@dataclass(frozen=True, slots=True)
class Restorable:
    """A backup: the number of the state it restores, where its WAL begins, and its bytes."""

    index: int
    start: int
    bytes: int


@dataclass(slots=True)
class Costs:
    """Seconds to bring a clone to a state. `position` gives a state's byte position in the WAL (about).

    `backups` hold at least one that restores state 0; `image` is the bytes that a copy of a clone takes
    (0 where the file system shares them).
    """

    position: Callable[[int], int]
    backups: tuple[Restorable, ...]
    image: int = 0
    rates: Rates = field(default_factory=Rates)

    def replay(self, start: int, index: int) -> float:
        return max(0, self.position(index) - start) / self.rates.replay

    def cold(self, index: int) -> tuple[float, Restorable]:
        """From the cheapest backup."""
        usable = [b for b in self.backups if b.index <= index]
        ways = [(b.bytes / self.rates.fetch + self.replay(b.start, index), b) for b in usable]
        seconds, backup = min(ways, key=lambda way: (way[0], -way[1].index))
        return seconds + self.rates.start, backup

    @property
    def copying(self) -> float:
        return self.image / self.rates.copy

    def reach(self, index: int, held: int | None) -> tuple[float, Restorable | None]:
        """Seconds to a state, from the image held (None) or from a backup, whichever is cheaper."""
        seconds, backup = self.cold(index)
        if held is not None and held <= index:
            warm = self.copying + self.replay(self.position(held), index) + self.rates.start
            if warm <= seconds:
                return warm, None
        return seconds, backup

    def settle(self, low: int, high: int, held: int | None) -> float:
        """About how long it takes to find the turn after state `low`, up to state `high`."""
        count = high - low
        if count <= 1:
            return 0.0
        middle = max(low, 0) + (high - max(low, 0)) // 2
        fetch = self.cold(middle)[1].bytes / self.rates.fetch
        again = min(self.copying, fetch) if held is not None else fetch
        each = self.rates.start + self.rates.check + again
        return math.log2(count) * each + self.replay(self.position(max(low, 0)), high)

    def worth_keeping(self, index: int) -> bool:
        """Whether a copy of an image at this state costs less than the chance of needing it again."""
        return self.copying < self.cold(index)[0] / 2


class Search:
    """The state of one search. Ask `next`, look at that state, `tell` what was seen, until `next` is None.

    `confirm` asks for so many further probes spread over the range, to see whether there is one turn only.
    """

    def __init__(self, last: int, costs: Costs, *, confirm: int = 0) -> None:
        if last < 0:
            raise ValueError("there is no state to look at")
        self.last = last
        self.costs = costs
        self.seen: dict[int, Verdict] = {}
        self._low = -1
        self._high: int | None = None
        self._unknown: list[int] = []
        self._budget = _probes(last + 1) + (1 if last >= _WORTH_MOVING else 0)
        self._samples = _spread(last, confirm)
        self._extra = len(self._samples)

    @property
    def promised(self) -> int:
        """Probes that suffice, at most, if every state can be checked."""
        return 1 + self._budget_at_first + self._extra

    @property
    def _budget_at_first(self) -> int:
        return _probes(self.last + 1) + (1 if self.last >= _WORTH_MOVING else 0)

    # --- what next --------------------------------------------------------------------------------------

    def next(self, held: int | None = None) -> int | None:
        """The state to look at now, or None at the end. `held` is the state of the image at hand."""
        newest = self.seen.get(self.last)
        if newest is None:
            return self.last
        if newest is Verdict.NOT_CHECKED:
            return None
        if newest is Verdict.BROKEN:
            gap = self._gap()
            if gap is not None:
                return self._split(*gap, held)
        return next((sample for sample in self._samples if sample not in self.seen), None)

    def _gap(self) -> tuple[int, int] | None:
        """The neighbours of the states among which to probe; None if the turn is found, or cannot be."""
        low, high = self._low, self._high
        assert high is not None
        if not self._unknown:
            return (low, high) if high - low > 1 else None
        # States that cannot be checked are mostly the early ones (a table was not there yet), so look
        # behind them first, then before them.
        if high - self._unknown[-1] > 1:
            return self._unknown[-1], high
        if self._unknown[0] - low > 1:
            return low, self._unknown[0]
        return None

    def _split(self, low: int, high: int, held: int | None) -> int:
        reach = 1 << max(self._budget - 1, 0)
        first, last = max(low + 1, high - reach), min(high - 1, low + reach)
        if self._unknown or first > last:
            first, last = low + 1, high - 1
        middle = low + (high - low) // 2
        choices = {middle, first, last}
        choices.update(b.index for b in self.costs.backups)
        step = max(1, (last - first) // _GRID)
        choices.update(range(first, last + 1, step))
        allowed = [index for index in choices if first <= index <= last]
        return min(
            allowed, key=lambda index: (self._expected(low, index, high, held), abs(index - middle), index)
        )

    def _expected(self, low: int, index: int, high: int, held: int | None) -> float:
        """Seconds until the end, on average, with a probe at `index` first."""
        count = high - low
        bad = (index - low) / count
        return (
            self.costs.reach(index, held)[0]
            + self.costs.rates.check
            + bad * self.costs.settle(low, index, held)
            + (1 - bad) * self.costs.settle(index, high, index)
        )

    # --- what was seen ----------------------------------------------------------------------------------

    def tell(self, index: int, verdict: Verdict) -> None:
        """Take in what a probe showed: BROKEN is bad, HELD good."""
        in_search = self._high is None or self._low < index < self._high
        self.seen[index] = verdict
        if index == self.last:
            if verdict is Verdict.BROKEN:
                self._high = index
            return
        if self._high is None or not in_search:
            return
        if verdict is Verdict.NOT_CHECKED:
            self._unknown = sorted({*self._unknown, index})
            return
        self._budget = max(self._budget - 1, 0)
        if verdict is Verdict.BROKEN:
            self._high = index
        else:
            self._low = index
        self._unknown = [each for each in self._unknown if self._low < each < self._high]

    # --- how it stands ----------------------------------------------------------------------------------

    def remaining(self) -> int:
        """Probes still to make, at most, if every state left can be checked."""
        samples = sum(sample not in self.seen for sample in self._samples)
        newest = self.seen.get(self.last)
        if newest is None:
            return self.promised
        if newest is not Verdict.BROKEN:
            return samples if newest is Verdict.HELD else 0
        assert self._high is not None
        if not self._unknown:
            return (self._budget if self._high - self._low > 1 else 0) + samples
        after, before = self._high - self._unknown[-1], self._unknown[0] - self._low
        return _probes(after) + _probes(before) + samples

    def likely(self) -> int:
        """Probes still to make, about: those of a plain bisection."""
        if self.seen.get(self.last) is not Verdict.BROKEN or self._unknown:
            return self.remaining()
        assert self._high is not None
        samples = sum(sample not in self.seen for sample in self._samples)
        return min(self.remaining(), _probes(self._high - self._low) + samples)

    def seconds_left(self, held: int | None = None) -> float:
        """About how long the probes still to make will take, by the rates known now."""
        index = self.next(held)
        if index is None:
            return 0.0
        now = self.costs.reach(index, held)[0] + self.costs.rates.check
        if self.seen.get(self.last) is None:
            return now + self.costs.settle(-1, self.last, None)
        gap = self._gap() if self._high is not None else None
        if gap is None:
            return now * max(1, self.remaining())
        return self._expected(gap[0], index, gap[1], held)

    def result(self) -> Result:
        """What is known now; the answer once `next` is None."""
        newest = self.seen.get(self.last)
        if newest is None or newest is Verdict.NOT_CHECKED:
            return Result(Outcome.NOT_CHECKABLE)
        if newest is Verdict.HELD:
            bad = [index for index, verdict in self.seen.items() if verdict is Verdict.BROKEN]
            if bad:
                return Result(Outcome.NOT_MONOTONE, again=max(bad))
            return Result(Outcome.NEVER_BAD, last_good=self.last)
        assert self._high is not None
        good = self._low if self._low >= 0 else None
        again = self._contradiction()
        if again is not None:
            return Result(Outcome.NOT_MONOTONE, self._high, good, again)
        if self._high - self._low > 1:
            return Result(Outcome.NARROWED, self._high, good)
        if good is None:
            return Result(Outcome.BAD_FROM_START, first_bad=0)
        return Result(Outcome.FOUND, self._high, good)

    def _contradiction(self) -> int | None:
        """A state good after the first bad one, or bad before the last good one."""
        assert self._high is not None
        for index in sorted(self.seen):
            if index > self._high and self.seen[index] is Verdict.HELD:
                return index
            if index < self._low and self.seen[index] is Verdict.BROKEN:
                return index
        return None


def _probes(count: int) -> int:
    """Probes that find one of so many in the worst case."""
    return max(count - 1, 0).bit_length()


def _spread(last: int, count: int) -> Sequence[int]:
    if count > last:
        return range(last + 1)
    return sorted({last * step // (count + 1) for step in range(1, count + 1)})
