"""Row changes on disk, array literals, and invariants held against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import HostError
from knockwood.history.transaction import ColumnValue, RowChange, TableId
from knockwood.recover.plan.rows import Culprit
from knockwood.recover.revert_invariants import worsened
from knockwood.recover.revert_rows import literal
from knockwood.recover.revert_spool import decode, encode, load, store

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.none()
values = st.builds(ColumnValue, texts, st.binary() | st.none())
rows = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), values, min_size=1)


@given(st.lists(st.tuples(rows, rows), max_size=4), st.integers(1, 2**32 - 1))
def test_changes_come_back_from_disk(pairs: list[tuple[dict[str, ColumnValue], ...]], xid: int) -> None:
    table = TableId("d\u2028", "s\n", 't"')
    changes = tuple(RowChange(table, "update", {}, before, after) for before, after in pairs)
    culprits = (Culprit(xid, changes), Culprit(1, ()))
    assert decode(encode(culprits)) == culprits


def test_changes_are_stored_once_and_damage_is_noticed(tmp_path: Path) -> None:
    change = RowChange(TableId("d", "s", "t"), "insert", {}, None, {"a": ColumnValue("1", b"\1")})
    path, sha256 = store(tmp_path, [Culprit(7, (change,))])
    assert store(tmp_path, [Culprit(7, (change,))]) == (path, sha256)
    assert load(path, sha256) == (Culprit(7, (change,)),)
    path.write_bytes(path.read_bytes().replace(b'"1"', b'"2"'))
    with pytest.raises(HostError, match="not those of the plan"):
        load(path, sha256)
    with pytest.raises(HostError, match="cannot be read"):
        decode(b'{"format": "something else"}\n')


def test_array_literals_quote_everything() -> None:
    assert literal([None, "NULL", 'a"b\\', "{,}"]) == '{NULL,"NULL","a\\"b\\\\","{,}"}'
    assert literal(["(1,1)", "(2,2)"], ";") == '{"(1,1)";"(2,2)"}'


def test_an_invariant_may_get_better_but_never_worse() -> None:
    before = {"total": frozenset({("1",), ("2",)})}
    assert worsened(before, {"total": frozenset({("2",)})}) == []
    [problem] = worsened(before, {"total": frozenset({("2",), ("3",)})})
    assert "1 row(s) more, such as (3)" in problem
    assert worsened({}, {"new": frozenset({(None,)})}) != []
