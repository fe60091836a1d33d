"""What the WAL says of page LSNs, on made-up records."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from knockwood.integrity.page_audit import Deviation, Expectations, explained, judge
from knockwood.model import Lsn
from knockwood.postgres.walrefs import BlockReference, RelationEvent

FORK = (1663, 5, 16384, "main")


def reference(lsn: int, block: int, rmgr: str = "Heap", operation: str = "INSERT") -> BlockReference:
    return BlockReference(lsn, *FORK, block, rmgr, operation)


def expectations(*references: BlockReference, hints: bool = True) -> Expectations:
    made = Expectations(hints)
    for each in references:
        made.add(each)
    return made


def verdict(made: Expectations, block: int, lsn: int | None, missing: bool = False) -> str | None:
    deviation = judge(
        FORK,
        block,
        made.blocks[FORK][block],
        None if lsn is None else Lsn(lsn),
        missing,
        Lsn(1000),
        Lsn(2000),
    )
    return deviation.kind if deviation else None


def test_a_page_is_the_last_record_s_or_younger() -> None:
    made = expectations(reference(100, 1), reference(200, 1), reference(300, 2), reference(400, 3))
    assert verdict(made, 1, 250) is None
    assert verdict(made, 1, 300) is None  # the end of a record may be the start of the next
    assert verdict(made, 1, 1500) is None  # written after the checkpoint
    assert verdict(made, 1, 200) == "stale"
    assert verdict(made, 1, 350) == "foreign"
    assert verdict(made, 1, 2001) == "future"
    assert verdict(made, 1, None) == "zeroed"
    assert verdict(made, 1, None, missing=True) == "missing"


def test_the_newest_record_has_no_end_yet() -> None:
    assert verdict(expectations(reference(100, 1)), 1, 900) is None


def test_bare_images_may_be_of_new_pages_or_of_a_gist_build() -> None:
    made = expectations(reference(100, 1, "XLOG", "FPI"), reference(200, 2))
    assert verdict(made, 1, None) is None
    assert verdict(made, 1, 1) is None
    assert verdict(made, 1, 50) == "stale"


def test_records_that_may_leave_a_page_alone_prove_nothing() -> None:
    hash_records = expectations(reference(100, 1), reference(200, 1, "Hash", "DELETE"), reference(300, 2))
    assert verdict(hash_records, 1, 150) is None
    assert verdict(hash_records, 1, 250) is None
    visible = reference(200, 1, "Heap2", "VISIBLE")
    assert verdict(expectations(reference(100, 1), visible, hints=False), 1, 150) is None
    assert verdict(expectations(reference(100, 1), visible), 1, 150) == "stale"


def test_free_space_maps_are_not_followed() -> None:
    assert expectations(BlockReference(100, 1663, 5, 16384, "fsm", 0, "XLOG", "FPI")).blocks == {}


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
    made, pages, lsn = Expectations(True), {}, 8
    for block, size in steps:
        made.add(reference(lsn, block))
        lsn += size
        pages[block] = lsn
    for block, page_lsn in pages.items():
        assert (
            judge(FORK, block, made.blocks[FORK][block], Lsn(page_lsn), False, Lsn(lsn + 1), Lsn(lsn)) is None
        )
        older = judge(FORK, block, made.blocks[FORK][block], Lsn(1), False, Lsn(lsn + 1), Lsn(lsn))
        assert older is not None
