"""Which WAL is left to look at, when some of it has been."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from knockwood.integrity.audited import Memory, united, without
from knockwood.integrity.last_changes import LastChanges
from knockwood.model import Lsn

SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda p: (Lsn(min(p)), Lsn(max(p)))), max_size=6
)


def positions(spans: list[tuple[Lsn, Lsn]]) -> set[int]:
    return {at for start, end in spans for at in range(start.value, end.value)}


@given(SPANS)
def test_united_spans_hold_the_same_wal_once(spans: list[tuple[Lsn, Lsn]]) -> None:
    result = united(spans)
    assert positions(result) == positions(spans)
    assert all(a[1] < b[0] for a, b in pairwise(result))


@given(st.integers(0, 15), st.integers(15, 30), SPANS)
def test_what_is_left_is_exactly_what_no_span_holds(
    start: int, end: int, spans: list[tuple[Lsn, Lsn]]
) -> None:
    left = without((Lsn(start), Lsn(end)), spans)
    assert positions(left) == set(range(start, end)) - positions(spans)
    assert left == sorted(left)


def test_only_the_same_run_of_the_server_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "audited" / "1.json"
    memory = Memory(path, "boot 1")
    fork = (1663, 5, 16384, "main")
    changes = LastChanges()
    changes.add(fork, np.array([7], np.uint32), np.array([15], np.uint64))
    assert memory.changes().before(fork, 7, 99) == 0
    memory.save([(Lsn(10), Lsn(20)), (Lsn(20), Lsn(30)), (Lsn(1), Lsn(2))], Lsn(5), changes)
    assert memory.load() == [(Lsn(10), Lsn(30))]
    assert memory.changes().before(fork, 7, 99) == 15
    assert Memory(path, "boot 2").load() == []
    assert Memory(path, "boot 2").changes().before(fork, 7, 99) == 0
    memory.save([(Lsn(10), Lsn(20))], Lsn(5), None)
    assert memory.changes().before(fork, 7, 99) == 15
    assert memory.compared(Lsn(31)) is None
    known = memory.compared(Lsn(12))
    assert known is not None
    assert (known.end, known.once_old) == (Lsn(20), frozenset())
    memory.save([(Lsn(10), Lsn(25))], Lsn(5), None, [(fork, 7)])
    memory.save([(Lsn(10), Lsn(25))], Lsn(5), None, [(fork, 2)])
    known = memory.compared(Lsn(10))
    assert known is not None
    assert known.once_old == {(fork, 2), (fork, 7)}, "for good: the WAL keeps the image"
    path.with_suffix(".changes").write_bytes(b"boot 1\nno arrays")
    assert memory.compared(Lsn(10)) is None
    assert memory.changes().before(fork, 7, 99) == 0
    path.write_text('{"identity": "boot 1", "held": [["0/1", "0/9"]]}')
    assert memory.load() == [], "of a version that did not remember old images"
    path.write_text('{"identity": "boot 1", "held": [["zz"]], "once_old": []}')
    assert memory.load() == []
