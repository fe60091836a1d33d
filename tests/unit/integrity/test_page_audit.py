"""What the WAL says of page LSNs, on made-up records."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from knockwood.integrity.page_audit import (
    Deviation,
    Expectation,
    Expectations,
    explained,
    judge,
    may_keep_lsn,
)
from knockwood.model import Lsn
from knockwood.postgres.walrefs import BlockReference, RelationEvent

FORK = (1663, 5, 16384, "main")

Step = tuple[int, int]


def expectations(*records: BlockReference | Step) -> Expectations:
    """Records as (start, block), or whole; each ends where the next begins."""
    made = Expectations()
    whole = [r if isinstance(r, BlockReference) else reference(*r) for r in records]
    starts = [r.lsn for r in whole[1:]] + [None]
    made.add(r._replace(following=after) for r, after in zip(whole, starts, strict=True))
    return made


def reference(lsn: int, block: int, *, image: bool = False, apart: bool = False) -> BlockReference:
    return BlockReference(lsn, None, FORK, block, image, apart)


def of(made: Expectations, block: int) -> Expectation:
    [(fork, expected)] = made.by_fork()
    assert fork == FORK
    return expected[expected.blocks.tolist().index(block)]


def verdict(made: Expectations, block: int, lsn: int | None, missing: bool = False) -> str | None:
    page_lsn = None if lsn is None else Lsn(lsn)
    deviation = judge(FORK, block, of(made, block), page_lsn, missing, Lsn(1000), Lsn(2000))
    [(_, expected)] = made.by_fork()
    lsns = np.full(len(expected.blocks), lsn or 0, np.uint64)
    doubtful = expected.blocks[expected.doubtful(lsns, Lsn(1000), Lsn(2000))]
    assert deviation is None or block in doubtful
    return deviation.kind if deviation else None


def test_a_page_is_the_last_record_s_or_younger() -> None:
    made = expectations((100, 1), (200, 1), (300, 2), (400, 3))
    assert verdict(made, 1, 250) is None
    assert verdict(made, 1, 300) is None  # the end of a record may be the start of the next
    assert verdict(made, 1, 1500) is None  # written after the checkpoint
    assert verdict(made, 1, 200) == "stale"
    assert verdict(made, 1, 350) == "foreign"
    assert verdict(made, 1, 2001) == "future"
    assert verdict(made, 1, None) == "zeroed"
    assert verdict(made, 1, None, missing=True) == "missing"


def test_the_newest_record_has_no_end_yet() -> None:
    assert verdict(expectations((100, 1)), 1, 900) is None


def test_bare_images_may_be_of_new_pages_or_of_a_gist_build() -> None:
    made = expectations(reference(100, 1, image=True), (200, 2))
    assert verdict(made, 1, None) is None
    assert verdict(made, 1, 1) is None
    assert verdict(made, 1, 50) == "stale"


def test_records_that_may_leave_a_page_alone_prove_nothing() -> None:
    made = expectations((100, 1), reference(200, 1, apart=True), (300, 2))
    assert verdict(made, 1, 150) is None
    assert verdict(made, 1, 250) is None
    assert verdict(made, 1, 100) == "stale"
    assert verdict(expectations((100, 1), (200, 1)), 1, 150) == "stale"
    assert list(expectations(reference(100, 1, apart=True)).by_fork()) == []


def test_which_records_may_leave_a_page_alone() -> None:
    assert may_keep_lsn(("Hash", "DELETE"), "main", True)
    assert not may_keep_lsn(("Hash", "INSERT"), "main", True)
    assert may_keep_lsn(("Heap2", "VISIBLE"), "main", False)
    assert not may_keep_lsn(("Heap2", "VISIBLE"), "main", True)
    assert not may_keep_lsn(("Heap2", "VISIBLE"), "vm", False)


def test_free_space_maps_are_not_followed() -> None:
    made = expectations(BlockReference(100, None, (1663, 5, 16384, "fsm"), 0, True, False))
    assert list(made.by_fork()) == []


def test_truncation_explains_what_lies_beyond_it() -> None:
    gone = Deviation(FORK, 7, "missing", Lsn(100), None)
    path = "base/5/16384"
    assert explained(gone, path, [RelationEvent(200, 9, "truncate", path, 7)])
    assert explained(gone, path, [RelationEvent(200, 9, "drop", path, None)])
    assert not explained(gone, path, [RelationEvent(200, 9, "truncate", path, 8)])
    assert not explained(gone, path, [RelationEvent(99, 9, "drop", path, None)])
    assert not explained(gone, path, [RelationEvent(200, 9, "drop", "base/5/1638", None)])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), min_size=1, max_size=40))
def test_a_page_written_by_the_records_is_never_wrong(steps: list[tuple[int, int]]) -> None:
    """Replay made-up records onto pages: each page's LSN is the end of its last record."""
    records, pages, lsn = [], {}, 8
    for block, size in steps:
        records.append((lsn, block))
        lsn += size
        pages[block] = lsn
    made = expectations(*records)
    for block, page_lsn in pages.items():
        assert judge(FORK, block, of(made, block), Lsn(page_lsn), False, Lsn(lsn + 1), Lsn(lsn)) is None
        assert judge(FORK, block, of(made, block), Lsn(1), False, Lsn(lsn + 1), Lsn(lsn)) is not None


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=60),
    st.lists(st.integers(1, 60), max_size=5),
)
def test_settling_now_and_then_changes_nothing(steps: list[tuple[int, bool]], cuts: list[int]) -> None:
    """The columns hold what a plain walk over the records holds, however often they are put in order."""
    plain: dict[int, Expectation] = {}
    made = Expectations()
    for lsn, (block, apart) in enumerate(steps, 1):
        made.add([BlockReference(lsn, lsn + 1, FORK, block, False, apart)])
        if lsn in cuts:
            list(made.by_fork())
        if not apart:
            plain[block] = Expectation(lsn, lsn + 1, False)
        elif block in plain:
            plain[block].unsure = True
    found = {int(b): e[at] for _, e in made.by_fork() for at, b in enumerate(e.blocks)}
    assert found == plain
