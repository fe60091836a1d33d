"""Rows joined: by chain, by move, then by key; what is left came or went."""

from __future__ import annotations

from pathlib import Path

import pytest

from knockwood.errors import UsageError
from knockwood.history.diff import Between, OneTransaction, parse_subject
from knockwood.history.rowstore import AFTER, BEFORE, RowStore
from knockwood.history.transaction import ColumnValue
from knockwood.model import Lsn


def values(*texts: str | None) -> list[ColumnValue]:
    return [ColumnValue(text, None if text is None else text.encode()) for text in texts]


def test_rows_meet(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "rows")
    store.put(
        BEFORE, 1, [(0, 0, b"a", values("a", None)), (0, 1, b"b", values("b")), (0, 2, b"m", values("m"))]
    )
    store.put(BEFORE, 1, [(0, 3, b"x", values("x")), (0, 4, None, values("nokey"))])
    store.put(AFTER, 1, [(0, 0, b"changed", values("changed")), (0, 9, b"b", values("b again"))])
    store.put(AFTER, 1, [(1, 0, b"n", values("moved")), (0, 10, None, values("nokey"))])
    # Another table's key says nothing here.
    store.put(AFTER, 2, [(5, 0, b"x", values("other"))])
    store.move([((0, 2), (1, 0))])
    assert store.has(BEFORE, 0, 3)
    assert not store.has(AFTER, 0, 3)
    store.join()
    found = [
        (before, old and old[0].text, after, new and new[0].text)
        for before, old, after, new in store.changes()
    ]
    assert found == [
        (0, "a", 0, "changed"),
        (0, "b", 0, "b again"),
        (0, "m", 1, "moved"),
        (0, "x", None, None),
        (0, "nokey", None, None),
        (None, None, 0, "nokey"),
        (None, None, 5, "other"),
    ]
    store.leave_out(5)
    assert len(list(store.changes())) == 6
    store.close()


def test_equal_keys_meet_one_to_one(tmp_path: Path) -> None:
    """The rows of a rewritten table without a key are paired as they are: the copies too."""
    store = RowStore(tmp_path / "rows")
    store.put(BEFORE, 1, [(0, number, b"same", values("same")) for number in range(3)])
    store.put(AFTER, 1, [(1, number, b"same", values("same")) for number in range(2)])
    assert store.forget(7) == 0
    store.join()
    kinds = [(before is not None, after is not None) for before, _, after, _ in store.changes()]
    assert sorted(kinds) == [(True, False), (True, True), (True, True)]
    store.close()


def test_what_a_difference_is_asked_of() -> None:
    assert parse_subject(" 4711 ") == OneTransaction(4711)
    assert parse_subject(str((3 << 32) + 4711)) == OneTransaction(4711)
    assert parse_subject("xid:12") == OneTransaction(12)
    assert parse_subject("0/10..1/2F") == Between(Lsn(0x10), Lsn((1 << 32) + 0x2F))
    for text in ("2", "abc", "0/10", "0/20..0/10", "0/1...0/2"):
        with pytest.raises(UsageError):
            parse_subject(text)
