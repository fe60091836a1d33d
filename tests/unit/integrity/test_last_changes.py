"""The last changes of blocks, put together from pieces of WAL in any order, written and read again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.integrity import last_changes
from knockwood.integrity.last_changes import LastChanges

FORKS = [(1663, 5, 16384, "main"), (1663, 5, 16385, "main"), (1664, 0, 1262, "main")]
PIECES = st.lists(st.tuples(st.sampled_from(FORKS), st.integers(0, 5), st.integers(1, 1000)), max_size=30)


def made_of(pieces: list[tuple[tuple[int, int, int, str], int, int]]) -> LastChanges:
    made = LastChanges()
    for fork, block, start in pieces:
        made.add(fork, np.array([block], np.uint32), np.array([start], np.uint64))
    return made


@given(PIECES)
def test_the_last_of_each_block_is_known(pieces: list[tuple[tuple[int, int, int, str], int, int]]) -> None:
    made = LastChanges.from_bytes(made_of(pieces).as_bytes())
    plain: dict[tuple[tuple[int, int, int, str], int], int] = {}
    for fork, block, start in pieces:
        plain[fork, block] = max(start, plain.get((fork, block), 0))
    for fork in FORKS:
        for block in range(7):
            start = plain.get((fork, block), 0)
            assert made.before(fork, block, 2000) == start
            # What lies after an image says nothing of it.
            assert made.before(fork, block, start) == 0


def test_maps_and_starts_that_are_not_known_are_left_out() -> None:
    made = LastChanges()
    made.add((1663, 5, 16384, "vm"), np.array([0], np.uint32), np.array([7], np.uint64))
    made.add(FORKS[0], np.array([0, 1], np.uint32), np.array([0, 7], np.uint64))
    assert made.before((1663, 5, 16384, "vm"), 0, 9) == made.before(FORKS[0], 0, 9) == 0
    assert made.before(FORKS[0], 1, 9) == 7


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_changes, "_MOST", 2)
    made = made_of([(FORKS[0], 1, 100), (FORKS[1], 1, 300), (FORKS[2], 1, 200)])
    assert LastChanges.from_bytes(made.as_bytes()).complete
    made.limit()
    assert not LastChanges.from_bytes(made.as_bytes()).complete
    assert [made.before(fork, 1, 1000) for fork in FORKS] == [0, 300, 200]
