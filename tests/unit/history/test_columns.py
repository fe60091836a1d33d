"""Columns: what is packed comes back, whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import ObjectDamagedError
from knockwood.history.columns import pack, unpack

numbers = st.lists(st.integers(-(1 << 62), 1 << 62), max_size=50)


@given(numbers, numbers, st.booleans())
def test_what_is_packed_comes_back(first: list[int], second: list[int], delta: bool) -> None:
    columns = {"first": np.array(first, np.int64), "second": np.array(second, np.int64)}
    small = all(abs(number) < 1 << 60 for number in first)
    data = pack(columns, delta={"first"} if delta and small else (), extra={"more": [1]})
    found, extra = unpack(data)
    assert {name: column.tolist() for name, column in found.items()} == {"first": first, "second": second}
    assert extra == {"more": [1]}
    only, _ = unpack(data, ["second"])
    assert list(only) == ["second"]
    assert only["second"].tolist() == second


def test_narrow_types_are_chosen() -> None:
    data = pack({"times": np.arange(10**15, 10**15 + 1000)}, delta={"times"})
    assert len(data) < 1000 + 200


@given(st.binary(max_size=60))
def test_what_is_no_index_is_said_to_be_damaged(data: bytes) -> None:
    whole = pack({"a": np.arange(5)})
    for wrong in (data, whole[:-1], whole + b"x"):
        with pytest.raises(ObjectDamagedError):
            unpack(wrong)
