"""What the WAL says of a page: no lost change is overlooked, and none is made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fix_pages import ABSENT, KNOWN, SERVER, TABLE, WAL, chain
from knockwood.model import Lsn
from knockwood.recover.plan.page_wal import (
    HINT,
    BlockRecord,
    WalFacts,
    find_begun_anew,
    find_poison,
    proves_newest,
)
from knockwood.recover.plan.pages import (
    OnDisk,
    PageClass,
    Procedure,
    classify,
)

records = st.lists(st.integers(1, 50), min_size=1, max_size=8, unique=True).map(sorted)


def test_wal_read_on_from_where_it_was_read_to_says_the_same_as_all_of_it() -> None:
    every = chain((100, "Heap INSERT", None), (200, "Heap UPDATE", None), (300, "Heap UPDATE", None))
    known = WalFacts(True, tuple(every[:2]), Lsn(50), Lsn(250), beyond=Lsn(100))
    # Read again from before the first part's end, and past where the question ends.
    later = WalFacts(True, tuple(every[1:]), Lsn(150), Lsn(400))
    assert known.gone_on(later, Lsn(350)) == WalFacts(True, tuple(every), Lsn(50), Lsn(350), beyond=Lsn(100))
    assert known.gone_on(later, Lsn(300)).records == tuple(every[:2])
    unknown = known.gone_on(WalFacts(False, reason="a segment is missing"), Lsn(350))
    assert (unknown.known, unknown.reason) == (False, "a segment is missing")


def test_an_image_without_the_change_before_it_is_poison() -> None:
    sound = chain((100, "Heap INSERT", None), (200, "Heap UPDATE", 150), (300, "Heap UPDATE", 250))
    assert find_poison(sound) is None
    lost = chain((100, "Heap INSERT", None), (200, "Heap UPDATE", None), (300, "Heap UPDATE", 150))
    found = find_poison(lost)
    assert found is not None
    assert (found.first_after, found.stale_lsn, found.lost, found.xids) == (
        Lsn(300), Lsn(150), (Lsn(200),), (200,),
    )  # fmt: skip
    zeroed = chain((100, "Heap INSERT", None), (300, "Heap UPDATE", 0))
    found = find_poison(zeroed)
    assert found is not None
    assert found.stale_lsn == Lsn(0)
    judged = classify(OnDisk("good", Lsn(350)), ABSENT, WalFacts(True, tuple(lost)), TABLE, SERVER)
    assert judged.procedure is Procedure.ROWS
    read = chain((100, "Heap INSERT", None), (200, "Heap UPDATE", None), (300, HINT, 150))
    for kind in (HINT, "Heap2 PRUNE_ON_ACCESS"):
        wal = WalFacts(True, (*read, *chain((400, kind, None))))
        assert classify(OnDisk("good", Lsn(450)), ABSENT, wal, TABLE, SERVER).procedure is Procedure.REPLACE
    # Two sessions may log the same hint at once.
    twice = chain((100, "Heap INSERT", None), (200, HINT, 150), (300, HINT, 150))
    assert find_poison(twice) is None


@pytest.mark.parametrize(
    ("before", "held", "lost"),
    [
        ([], False, None),  # a new page
        ([], True, ()),
        (["Heap INSERT"], False, (100,)),
        (["Heap INSERT", "Heap DELETE", "Heap2 VISIBLE"], False, (100, 110)),
        (["Heap INSERT+INIT", "Heap DELETE", "Heap2 PRUNE_ON_ACCESS"], False, (100, 110, 120)),
        (["Heap DELETE", "Heap2 PRUNE_ON_ACCESS"], True, (100, 110)),
        (["Heap DELETE", "Heap2 PRUNE"], True, (100, 110)),
        (["Heap2 VACUUM", "Heap INSERT+INIT", "Heap2 VACUUM"], True, None),
        (["Heap DELETE", "Heap2 PRUNE_ON_ACCESS", "Heap2 PRUNE_VACUUM_CLEANUP", HINT], True, None),
        (["Heap DELETE", "Heap2 VACUUM", "Heap2 VISIBLE"], True, None),
        (["XLOG FPI"], True, None),
        (["Heap2 VACUUM", "Heap INSERT"], True, (100, 110)),
    ],
)
def test_a_page_with_rows_that_is_begun_anew_had_been_emptied(
    before: list[str], held: bool, lost: tuple[int, ...] | None
) -> None:
    every = chain(*((100 + 10 * at, kind, None) for at, kind in enumerate([*before, "Heap INSERT+INIT"])))
    found = find_begun_anew(every, held=held)
    if lost is None:
        assert found is None
        return
    assert found is not None
    assert found.emptied
    assert (found.first_after, found.lost) == (every[-1].lsn, tuple(map(Lsn, lost)))
    wal = WalFacts(True, tuple(every), held=held)
    judged = classify(OnDisk("good", Lsn(990)), ABSENT, wal, TABLE, SERVER)
    assert (judged.damage, judged.procedure) == (PageClass.POISONED, Procedure.ROWS)
    assert "taken for an empty page" in judged.reason
    assert proves_newest(Lsn(990), wal) is not None


def test_images_are_proven_by_the_last_record() -> None:
    assert proves_newest(Lsn(5100), WAL) is None
    assert "before" in (proves_newest(Lsn(1100), WAL) or "")
    assert "after" in (proves_newest(Lsn(50000), WAL) or "")
    assert proves_newest(Lsn(400), WalFacts(True, (), Lsn(500))) is None
    assert proves_newest(Lsn(600), WalFacts(True, (), Lsn(500))) is not None
    assert proves_newest(Lsn(5100), WalFacts(False)) is not None


@given(records, st.data())
def test_a_lost_change_is_always_seen(places: list[int], data: st.DataObject) -> None:
    """Play a page forward, with or without losing the writes since some point before an image."""
    lsn = 0
    history: list[BlockRecord] = []
    lose_at = data.draw(st.one_of(st.none(), st.integers(1, len(places))))
    for number, place in enumerate(places):
        if lose_at == number:
            lsn = data.draw(st.integers(0, max(history[-1].end.value - 51, 0) // 100)) * 100
            lsn = max((r.end.value for r in history if r.end.value <= lsn), default=0)
        image = number == lose_at or data.draw(st.booleans())
        history.append(
            BlockRecord(Lsn(place * 100), Lsn(place * 100 + 50), "Heap", image, Lsn(lsn) if image else None)
        )
        lsn = place * 100 + 50
    found = find_poison(history)
    if lose_at is None or lose_at >= len(places):
        assert found is None
    else:
        assert found is not None
        assert found.first_after == history[lose_at].lsn


def test_a_backup_from_after_the_damage_proves_nothing() -> None:
    assert "known to have changed" in (proves_newest(Lsn(3900), KNOWN) or "")
    assert proves_newest(Lsn(4000), KNOWN) is not None
    assert proves_newest(Lsn(4100), KNOWN) is None
    assert proves_newest(Lsn(6100), KNOWN) is not None


@pytest.mark.parametrize(("inner", "good"), [(4100, True), (4000, False), (3900, False), (None, False)])
def test_an_image_in_the_wal_after_a_change_known_from_elsewhere(inner: int | None, good: bool) -> None:
    """The first record since the backup is an image: it shows whether the backup's page held the change."""
    image = BlockRecord(Lsn(7000), Lsn(7100), "Heap UPDATE", True, None if inner is None else Lsn(inner))
    wal = replace(KNOWN, records=(image,))
    assert (proves_newest(Lsn(7100), wal) is None) is good
    assert proves_newest(Lsn(7100), replace(wal, beyond=None)) is None
    poison = wal.poison
    if inner is not None and not good:
        assert poison is not None
        assert poison.lost == (Lsn(4000),)
    else:
        assert poison is None
    judged = classify(OnDisk("zero"), ABSENT, wal, TABLE, SERVER)
    assert judged.procedure is (Procedure.REPLACE if good else Procedure.REFUSE)
    if poison is not None:
        judged = classify(OnDisk("good", Lsn(7100)), ABSENT, wal, TABLE, SERVER)
        assert judged.procedure is Procedure.ROWS


@given(st.integers(1, 20), st.integers(0, 25))
def test_a_known_change_within_the_wal_adds_nothing_that_the_wal_does_not_say(at: int, inner: int) -> None:
    """A change that is known twice is one change: where the record is among those read, nothing is judged
    otherwise, but for images made after it from a page that lacked it."""
    records = tuple(
        BlockRecord(
            Lsn(100 * n), Lsn(100 * n + 50), "Heap UPDATE", n == 21, Lsn(100 * inner) if n == 21 else None
        )
        for n in range(1, 22)
    )
    assert find_poison(records, Lsn(100 * at)) == find_poison(records)
