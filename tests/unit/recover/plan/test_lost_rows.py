"""Lost changes merged with what is there now: only what the damage explains is touched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.recover.plan.lost_rows import Change, Key, Row, merge_lost

K: Key = ("1",)
OLD: Row = ("1", "old")
NEW: Row = ("1", "new")
LATER: Row = ("1", "later")


def at(*rows: Row) -> dict[Key, list[tuple[str, Row]]]:
    return {K: [(f"(0,{number})", row) for number, row in enumerate(rows, 1)]}


@pytest.mark.parametrize(
    ("stale", "true", "there", "changes"),
    [
        ({K: OLD}, {K: NEW}, at(OLD), [Change.UPDATE]),
        ({K: OLD}, {K: NEW}, at(NEW), []),
        ({K: OLD}, {K: NEW}, at(OLD, NEW), [Change.DELETE]),
        ({}, {K: NEW}, {}, [Change.INSERT]),
        ({}, {K: NEW}, at(NEW), []),
        ({K: OLD}, {}, at(OLD), [Change.DELETE]),
        ({K: OLD}, {}, {}, []),
        ({K: OLD}, {K: OLD}, at(LATER), []),
    ],
)
def test_what_the_damage_explains(
    stale: dict[Key, Row],
    true: dict[Key, Row],
    there: dict[Key, list[tuple[str, Row]]],
    changes: list[Change],
) -> None:
    merged = merge_lost(stale, true, there)
    assert not merged.conflicts
    assert [mend.change for mend in merged.mends] == changes


@pytest.mark.parametrize(
    ("stale", "true", "there"),
    [
        ({K: OLD}, {K: NEW}, at(LATER)),
        ({K: OLD}, {K: NEW}, {}),
        ({K: OLD}, {K: NEW}, at(OLD, LATER)),
        ({}, {K: NEW}, at(LATER)),
        ({K: OLD}, {}, at(LATER)),
        ({K: OLD}, {K: NEW}, at(OLD, OLD)),
    ],
)
def test_what_somebody_changed_since(
    stale: dict[Key, Row], true: dict[Key, Row], there: dict[Key, list[tuple[str, Row]]]
) -> None:
    merged = merge_lost(stale, true, there)
    assert not merged.mends
    assert len(merged.conflicts) == 1


rows = st.dictionaries(st.integers(1, 4).map(lambda n: (str(n),)), st.sampled_from("abc"))


@given(rows, rows)
def test_applied_to_the_stale_rows_it_gives_the_true_ones(
    stale: dict[Key, str], true: dict[Key, str]
) -> None:
    old = {key: (*key, value) for key, value in stale.items()}
    new = {key: (*key, value) for key, value in true.items()}
    there = {key: [(f"(0,{key[0]})", row)] for key, row in old.items()}
    merged = merge_lost(old, new, there)
    assert not merged.conflicts
    state = dict(old)
    for mend in merged.mends:
        if mend.after is None:
            del state[mend.key]
        else:
            state[mend.key] = mend.after
    assert state == new
