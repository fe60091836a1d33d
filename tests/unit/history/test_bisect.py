"""The search finds the first bad state of every history that turns once, within the probes it promised."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.history.bisect import Costs, Outcome, Rates, Restorable, Result, Search
from knockwood.model import Verdict

GOOD, BAD, UNKNOWN = Verdict.HELD, Verdict.BROKEN, Verdict.NOT_CHECKED
SEGMENT = 16 << 20


def costs_of(last: int, backups: list[tuple[int, int]], image: int = 0, rates: Rates | None = None) -> Costs:
    made = tuple(
        Restorable(index, max(0, index - 1) * SEGMENT, size) for index, size in [(0, 10**8), *backups]
    )
    return Costs(lambda index: index * SEGMENT, made, image, rates or Rates())


def search_for(
    last: int, look: Callable[[int], Verdict], costs: Costs | None = None, confirm: int = 0
) -> tuple[Search, list[int], Result]:
    """Run a search as an operation would: the last good state probed is the image at hand."""
    search = Search(last, costs or costs_of(last, []), confirm=confirm)
    probes: list[int] = []
    held: int | None = None
    while (index := search.next(held)) is not None:
        assert 0 <= index <= last
        assert index not in probes
        before = search.remaining()
        assert search.seconds_left(held) > 0
        verdict = look(index)
        search.tell(index, verdict)
        assert search.remaining() < before or UNKNOWN in search.seen.values()
        probes.append(index)
        if verdict is GOOD and (held is None or index > held):
            held = index
    assert search.remaining() == 0
    assert search.seconds_left(held) == 0
    return search, probes, search.result()


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, Costs]:
    last = draw(st.integers(0, 1500))
    places = st.tuples(st.integers(0, last), st.integers(0, 10**12))
    rates = Rates(
        fetch=draw(st.floats(1e5, 1e10)),
        replay=draw(st.floats(1e5, 1e10)),
        copy=draw(st.floats(1e5, 1e10)),
        start=draw(st.floats(0, 100)),
        check=draw(st.floats(0.001, 1000)),
    )
    image = draw(st.integers(0, 10**12))
    return last, costs_of(last, draw(st.lists(places, max_size=5)), image, rates)


@given(histories(), st.data())
def test_the_first_bad_is_found_within_the_promise(history: tuple[int, Costs], data: st.DataObject) -> None:
    last, costs = history
    turn = data.draw(st.integers(0, last + 1))
    confirm = data.draw(st.integers(0, 5))
    search, probes, result = search_for(last, lambda index: BAD if index >= turn else GOOD, costs, confirm)
    assert len(probes) <= search.promised
    if turn > last:
        assert result == Result(Outcome.NEVER_BAD, last_good=last)
    elif turn == 0:
        assert result == Result(Outcome.BAD_FROM_START, first_bad=0)
    else:
        assert result == Result(Outcome.FOUND, turn, turn - 1)


@given(histories(), st.data())
def test_what_cannot_be_checked_is_never_taken_for_good_or_bad(
    history: tuple[int, Costs], data: st.DataObject
) -> None:
    last, costs = history
    turn = data.draw(st.integers(0, last + 1))
    stretches = data.draw(st.lists(st.tuples(st.integers(0, last), st.integers(0, 400)), max_size=3))

    def look(index: int) -> Verdict:
        if any(start <= index < start + count for start, count in stretches):
            return UNKNOWN
        return BAD if index >= turn else GOOD

    _, _, result = search_for(last, look, costs)
    if look(last) is UNKNOWN:
        assert result == Result(Outcome.NOT_CHECKABLE)
    elif turn > last:
        assert result.outcome is Outcome.NEVER_BAD
    elif result.outcome is Outcome.FOUND:
        assert (result.first_bad, result.last_good) == (turn, turn - 1)
    elif result.outcome is Outcome.BAD_FROM_START:
        assert turn == 0
    else:
        assert result.outcome is Outcome.NARROWED
        assert result.first_bad is not None
        assert look(result.first_bad) is BAD
        before = -1 if result.last_good is None else result.last_good
        assert before < turn <= result.first_bad
        assert look(result.first_bad - 1) is UNKNOWN
        if before >= 0:
            assert look(before) is GOOD
        assert look(before + 1) is UNKNOWN


@given(st.lists(st.sampled_from([GOOD, BAD]), min_size=1, max_size=60))
def test_with_every_state_confirmed_a_second_turn_is_always_told(states: list[Verdict]) -> None:
    last = len(states) - 1
    _, probes, result = search_for(last, lambda index: states[index], confirm=len(states))
    assert sorted(probes) == list(range(len(states)))
    turns = sum(a is not b for a, b in pairwise(states))
    if set(states) == {GOOD}:
        assert result.outcome is Outcome.NEVER_BAD
    elif turns == 0:
        assert result.outcome is Outcome.BAD_FROM_START
    elif turns == 1 and states[-1] is BAD:
        assert result.outcome is Outcome.FOUND
    else:
        assert result.outcome is Outcome.NOT_MONOTONE
        assert result.again is not None


def test_the_promise_is_that_of_a_bisection_and_one_more() -> None:
    assert [Search(last, costs_of(last, [])).promised for last in (0, 1, 7, 8, 1000, 10**6)] == [
        1, 2, 4, 6, 12, 22,
    ]  # fmt: skip


def test_a_table_that_was_made_late_is_searched_from_when_it_was_there() -> None:
    def look(index: int) -> Verdict:
        return UNKNOWN if index < 700 else BAD if index >= 900 else GOOD

    _, probes, result = search_for(1000, look)
    assert result == Result(Outcome.FOUND, 900, 899)
    assert len(probes) < 20


def test_bad_as_soon_as_it_can_be_checked_blames_nobody() -> None:
    _, _, result = search_for(1000, lambda index: UNKNOWN if index < 700 else BAD)
    assert result == Result(Outcome.NARROWED, 700, None)


def test_dear_replay_moves_the_first_probes_to_backups() -> None:
    backups = [(index, 10**8) for index in (100, 420, 800)]
    slow = Rates(replay=1e5)
    _, probes, result = search_for(
        1000, lambda i: BAD if i >= 500 else GOOD, costs_of(1000, backups, 0, slow)
    )
    assert probes[0] == 1000
    assert probes[1] in {100, 420, 800}
    assert result.first_bad == 500


def test_dear_backups_are_fetched_once_and_replayed_on_from() -> None:
    """With an image at hand that copies for nothing, no backup of a terabyte is fetched to save some WAL."""
    costs = costs_of(1000, [(300, 10**12), (600, 10**12)], 0, Rates(replay=1e9))
    assert costs.reach(900, 250)[1] is None
    assert costs.reach(200, 250)[1] is not None


@pytest.mark.parametrize(("image", "worth"), [(0, True), (10**9, True), (10**12, False)])
def test_an_image_is_kept_where_a_copy_is_cheaper_than_a_restore(image: int, worth: bool) -> None:
    assert costs_of(10, [], image, Rates(fetch=1e7)).worth_keeping(5) is worth


def test_rates_are_learned() -> None:
    rates = Rates().fetched(10**9, 100).replayed(10**6, 3).replayed(10**9, 13).copied(10**9, 1).checked(2)
    assert 1e7 < rates.fetch < 6e7
    assert 2 < rates.start < 3
    assert 8e7 < rates.replay < 1.1e8
    assert 4e8 < rates.copy < 1e9
    assert 1 < rates.check < 2


def test_no_state_is_no_search() -> None:
    with pytest.raises(ValueError, match="no state"):
        Search(-1, costs_of(0, []))
