"""What the WAL says of page LSNs, on made-up records."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from knockwood.integrity.page_audit import (
    Deviation,
    Expectation,
    Expectations,
    Touch,
    explained,
    judge,
    of_old_page,
    touch_of,
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


def reference(lsn: int, block: int, touch: Touch = Touch.CHANGE, image: int = -1) -> BlockReference:
    return BlockReference(lsn, None, FORK, block, touch, image)


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
    made = expectations(reference(100, 1, Touch.BARE, 0), (200, 2))
    assert verdict(made, 1, None) is None
    assert verdict(made, 1, 1) is None
    assert verdict(made, 1, 50) == "stale"


def test_records_that_may_leave_a_page_alone_prove_nothing() -> None:
    made = expectations((100, 1), reference(200, 1, Touch.PERHAPS), (300, 2))
    assert verdict(made, 1, 150) is None
    assert verdict(made, 1, 250) is None
    assert verdict(made, 1, 100) == "stale"
    assert verdict(expectations((100, 1), (200, 1)), 1, 150) == "stale"
    assert list(expectations(reference(100, 1, Touch.PERHAPS)).by_fork()) == []


def test_which_records_may_leave_a_page_alone() -> None:
    assert touch_of(("Hash", "DELETE"), "main", True) is Touch.PERHAPS
    assert touch_of(("Hash", "INSERT"), "main", True) is Touch.CHANGE
    assert touch_of(("Heap2", "VISIBLE"), "main", False) is Touch.PERHAPS
    assert touch_of(("Heap2", "VISIBLE"), "main", True) is Touch.VISIBLE
    assert touch_of(("Heap2", "VISIBLE"), "vm", False) is Touch.CHANGE
    assert touch_of(("XLOG", "FPI"), "main", True) is Touch.BARE
    assert touch_of(("XLOG", "FPI_FOR_HINT"), "main", True) is Touch.HINT


def test_free_space_maps_are_not_followed() -> None:
    made = expectations(BlockReference(100, None, (1663, 5, 16384, "fsm"), 0, Touch.HINT, 0))
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
        touch = Touch.PERHAPS if apart else Touch.CHANGE
        made.add([BlockReference(lsn, lsn + 1, FORK, block, touch, -1)])
        if lsn in cuts:
            list(made.by_fork())
        if not apart:
            plain[block] = Expectation(lsn, lsn + 1, sure=lsn)
        elif block in plain:
            plain[block].unsure = True
    found = {int(b): e[at] for _, e in made.by_fork() for at, b in enumerate(e.blocks)}
    assert found == plain


REDO, LOST = "redo", "lost"
Event = str | tuple[int, Touch, bool]
TOUCHES = st.sampled_from([Touch.CHANGE, Touch.CHANGE, Touch.HINT, Touch.PERHAPS, Touch.VISIBLE])


class Pages:
    """A made-up server: pages by their LSN, WAL with an image at a page's first touch after each redo position."""

    def __init__(self) -> None:
        self.made = Expectations()
        self.inside: dict[tuple[int, int], Lsn] = {}
        self.lsns: dict[int, int] = {}
        self.changed: dict[int, int] = {}
        self.lsn = self.redo = 1000

    def touch(self, block: int, touch: Touch, sets_lsn: bool) -> None:
        start, self.lsn = self.lsn, self.lsn + 10
        had = self.lsns.setdefault(block, 0)
        whole = had <= self.redo
        if touch is Touch.HINT and not whole:
            return  # nothing is logged
        image = 0 if whole else -1
        if whole:
            self.inside[start, 0] = Lsn(had)
        self.made.add([BlockReference(start, self.lsn, FORK, block, touch, image)])
        if touch is Touch.CHANGE or sets_lsn:
            self.lsns[block] = self.lsn
        if touch is Touch.CHANGE:
            self.changed[block] = start

    def old_images(self) -> list[int]:
        found = []
        for _, block, lsn, number, before in self.made.images():
            if of_old_page(self.inside[lsn, number], before):
                found.append(block)
        return found


@given(st.lists(st.one_of(st.just(REDO), st.tuples(st.integers(0, 2), TOUCHES, st.booleans())), max_size=60))
def test_an_image_of_a_page_that_lost_nothing_is_never_of_an_old_one(events: list[Event]) -> None:
    """Also where a record for hint bits, or one that says the page is all visible, does not set the page's LSN."""
    pages = Pages()
    for event in events:
        if isinstance(event, str):
            pages.redo, pages.lsn = pages.lsn, pages.lsn + 10
        else:
            pages.touch(*event)
    assert pages.old_images() == []


@given(
    st.lists(st.tuples(st.integers(0, 2), TOUCHES, st.booleans()), max_size=20),
    st.lists(st.tuples(TOUCHES, st.booleans()), max_size=10),
    st.booleans(),
)
def test_the_image_of_an_old_page_is_found(
    before: list[tuple[int, Touch, bool]], after: list[tuple[Touch, bool]], settled: bool
) -> None:
    """A page is put back to what it was two changes ago; the next record after a checkpoint tells."""
    pages = Pages()
    pages.touch(0, Touch.CHANGE, True)
    old = pages.lsns[0]
    pages.touch(0, Touch.CHANGE, True)
    for event in before:
        pages.touch(*event)
    if settled:
        assert list(pages.made.by_fork())
    pages.lsns[0] = old
    pages.redo, pages.lsn = pages.lsn, pages.lsn + 10
    pages.touch(0, Touch.CHANGE, True)
    for touch, sets_lsn in after:
        pages.touch(0, touch, sets_lsn)
    assert pages.old_images() == [0]


def test_images_of_pages_made_anew_and_bare_ones_say_nothing() -> None:
    assert [of_old_page(Lsn(had), 100) for had in (0, 1, 2, 100, 101)] == [False, False, True, True, False]
    assert not of_old_page(Lsn(50), 0)
    made = expectations((100, 1), reference(200, 1, Touch.BARE, 0), (300, 2))
    assert list(made.images()) == []
    # The change before an image may be older than what was copied over it.
    made = expectations((100, 1), reference(200, 1, Touch.BARE, 0), reference(300, 1, image=1))
    assert [taken[1:] for taken in made.images()] == [(1, 300, 1, 100)]
    # Nor does the first record of a block tell anything by itself.
    made = expectations(reference(100, 1, image=0), (200, 1), reference(300, 2, image=0))
    assert [taken[1:] for taken in made.images()] == [(1, 100, 0, 0), (2, 300, 0, 0)]


def test_hints_may_leave_a_page_s_lsn_alone() -> None:
    """Two readers at once, or a page that is being written: then the image inside counts."""
    made = expectations((100, 1), reference(200, 1, Touch.HINT, 0), (300, 2))
    last = of(made, 1)
    assert judge(FORK, 1, last, Lsn(150), False, Lsn(1000), Lsn(2000), Lsn(150)) is None
    assert judge(FORK, 1, last, Lsn(150), False, Lsn(1000), Lsn(2000), None) is None
    stale = judge(FORK, 1, last, Lsn(150), False, Lsn(1000), Lsn(2000), Lsn(160))
    assert stale is not None
    assert stale.kind == "stale"


def test_pages_that_became_all_visible_before_hints_were_logged() -> None:
    made = expectations((100, 1), reference(200, 1, Touch.VISIBLE), (300, 2))
    doubtful = judge(FORK, 1, of(made, 1), Lsn(150), False, Lsn(1000), Lsn(2000))
    assert doubtful is not None
    assert doubtful.if_hints_were_logged
    assert not doubtful.certain
    old = judge(FORK, 1, of(made, 1), Lsn(100), False, Lsn(1000), Lsn(2000))
    assert old is not None
    assert old.certain
