"""Judging pages: every class has its procedure, and nothing unproven is ever written."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.model import Lsn
from knockwood.recover.plan.page_masks import describe, masked, same
from knockwood.recover.plan.pages import (
    HINT,
    SEGMENT_PAGES,
    BlockRecord,
    InBuffers,
    OnDisk,
    PageClass,
    Procedure,
    RelationFacts,
    ServerFactsForPages,
    WalFacts,
    classify,
    find_begun_anew,
    find_poison,
    held_rows,
    proves_newest,
    segment_of,
    segment_path,
)

TABLE = RelationFacts(20000, "r", "p")
SERVER = ServerFactsForPages(
    checksums=True,
    full_page_writes=True,
    superuser=True,
    in_recovery=False,
    can_evict=True,
    sees_buffers=True,
)
LAST = BlockRecord(Lsn(5000), Lsn(5100), "Heap UPDATE")
WAL = WalFacts(True, (BlockRecord(Lsn(1000), Lsn(1100), "Heap INSERT"), LAST), Lsn(500), Lsn(9000))
ABSENT = InBuffers("absent")
BAD = OnDisk("bad", reason="checksum")


def test_segments_of_a_gigabyte() -> None:
    assert segment_of(0) == (0, 0)
    assert segment_of(SEGMENT_PAGES - 1) == (0, (1 << 30) - 8192)
    assert segment_of(SEGMENT_PAGES) == (1, 0)
    assert segment_of(3 * SEGMENT_PAGES + 7) == (3, 7 * 8192)
    assert segment_path("base/5/16384", SEGMENT_PAGES - 1) == "base/5/16384"
    assert segment_path("pg_tblspc/9/PG_18_1/5/16384_vm", 2 * SEGMENT_PAGES) == (
        "pg_tblspc/9/PG_18_1/5/16384_vm.2"
    )


@pytest.mark.parametrize(
    ("disk", "buffers", "wal", "damage", "procedure"),
    [
        (BAD, ABSENT, WAL, PageClass.BAD_CHECKSUM, Procedure.WRITE),
        (BAD, ABSENT, WalFacts(False), PageClass.BAD_CHECKSUM, Procedure.WRITE),
        (replace(BAD, belongs_to=(7,)), ABSENT, WAL, PageClass.MISDIRECTED, Procedure.WRITE),
        (OnDisk("unreadable"), ABSENT, WAL, PageClass.UNREADABLE, Procedure.WRITE),
        (BAD, InBuffers("unknown"), WAL, PageClass.REFUSED, Procedure.REFUSE),
        (BAD, InBuffers("present", Lsn(5100)), WAL, PageClass.GOOD_IN_BUFFERS, Procedure.SAVE_BUFFER),
        (BAD, InBuffers("present", Lsn(1100)), WAL, PageClass.REFUSED, Procedure.REFUSE),
        (BAD, InBuffers("present", Lsn(5100)), WalFacts(False), PageClass.REFUSED, Procedure.REFUSE),
        (BAD, InBuffers("present", zero=True), WAL, PageClass.REFUSED, Procedure.REFUSE),
        (OnDisk("zero"), ABSENT, WAL, PageClass.ZEROED, Procedure.REPLACE),
        (OnDisk("zero"), ABSENT, WalFacts(True), PageClass.ZEROED, Procedure.REPLACE),
        (OnDisk("zero"), ABSENT, WalFacts(False), PageClass.REFUSED, Procedure.REFUSE),
        (
            OnDisk("zero"),
            InBuffers("present", Lsn(5100)),
            WAL,
            PageClass.GOOD_IN_BUFFERS,
            Procedure.SAVE_BUFFER,
        ),
        (OnDisk("good", Lsn(1100)), ABSENT, WAL, PageClass.STALE, Procedure.REPLACE),
        (OnDisk("good", Lsn(1100)), InBuffers("present", Lsn(1100)), WAL, PageClass.STALE, Procedure.REPLACE),
        (
            OnDisk("good", Lsn(1100)),
            InBuffers("present", Lsn(5100), dirty=True),
            WAL,
            PageClass.HEALTHY,
            Procedure.NOTHING,
        ),
        (OnDisk("good", Lsn(5100)), ABSENT, WAL, PageClass.HEALTHY, Procedure.NOTHING),
        (OnDisk("good", Lsn(1100)), ABSENT, WalFacts(False), PageClass.REFUSED, Procedure.REFUSE),
        (OnDisk("missing"), ABSENT, WAL, PageClass.REFUSED, Procedure.REFUSE),
    ],
)
def test_each_kind_of_damage(
    disk: OnDisk, buffers: InBuffers, wal: WalFacts, damage: PageClass, procedure: Procedure
) -> None:
    judged = classify(disk, buffers, wal, TABLE, SERVER)
    assert (judged.damage, judged.procedure) == (damage, procedure), judged.reason
    assert judged.reason


@pytest.mark.parametrize(
    ("relation", "word"),
    [
        (RelationFacts(1259, "r", "p"), "catalog"),
        (RelationFacts(20000, "r", "p", shared=True), "catalog"),
        (RelationFacts(20000, "r", "u"), "unlogged"),
        (RelationFacts(20000, "r", "t"), "temporary"),
        (RelationFacts(20000, "S", "p"), "sequence"),
        (RelationFacts(20000, "m", "p"), "REFRESH"),
        (RelationFacts(20000, "r", "p", "init"), "unlogged"),
        (RelationFacts(20000, "r", "p", method="columnar"), "columnar"),
    ],
)
def test_relations_that_are_left_alone(relation: RelationFacts, word: str) -> None:
    judged = classify(BAD, ABSENT, WAL, relation, SERVER)
    assert judged.procedure is Procedure.REFUSE
    assert word in judged.reason


def test_indexes_and_maps_are_made_anew() -> None:
    index = RelationFacts(20000, "i", "p", method="btree")
    assert classify(BAD, ABSENT, WAL, index, SERVER).procedure is Procedure.REINDEX
    for fork in ("fsm", "vm"):
        assert classify(BAD, ABSENT, WAL, replace(TABLE, fork=fork), SERVER).procedure is (
            Procedure.REBUILD_MAP
        )


@pytest.mark.parametrize(
    ("server", "word"),
    [
        (replace(SERVER, checksums=False), "data_checksums"),
        (replace(SERVER, full_page_writes=False), "full_page_writes"),
        (replace(SERVER, superuser=False), "superuser"),
        (replace(SERVER, in_recovery=True), "standby"),
        (replace(SERVER, lax=("zero_damaged_pages",)), "zero_damaged_pages"),
    ],
)
def test_servers_on_which_nothing_is_proven(server: ServerFactsForPages, word: str) -> None:
    judged = classify(BAD, ABSENT, WAL, TABLE, server)
    assert judged.procedure is Procedure.REFUSE
    assert word in judged.reason


def test_without_eviction_only_what_no_buffer_holds() -> None:
    old = replace(SERVER, can_evict=False)
    assert classify(OnDisk("zero"), ABSENT, WAL, TABLE, old).procedure is Procedure.REPLACE
    judged = classify(OnDisk("zero"), InBuffers("present", zero=True), WAL, TABLE, old)
    assert judged.procedure is Procedure.REFUSE
    assert "restart" in judged.reason


# --- what the WAL proves ----------------------------------------------------------------------------


def chain(*pieces: tuple[int, str, int | None]) -> list[BlockRecord]:
    return [
        BlockRecord(
            Lsn(at), Lsn(at + 50), kind, inner is not None, None if inner is None else Lsn(inner), xid=at
        )
        for at, kind, inner in pieces
    ]


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


@pytest.mark.parametrize(
    ("flags", "of", "held"),
    [
        ((), 5, False),
        ((0,), 5, False),
        ((0, 0), 5, False),
        ((0, 3), 5, True),
        ((1,), 5, True),
        ((1,), 9, False),
    ],
)
def test_a_page_held_rows_if_an_item_is_in_use(flags: tuple[int, ...], of: int, held: bool) -> None:
    items = b"".join((flag << 15 | 8000).to_bytes(4, "little") for flag in flags)
    header = struct.pack("<IIHHHHHHI", 7, of, 0, 0, 24 + len(items), 8000, 8192, 8192 + 4, 0)
    assert held_rows((header + items).ljust(8192, b"\0"), Lsn((7 << 32) + 8)) is held
    assert not held_rows(bytes(8192), Lsn(8))


def test_a_page_that_lost_changes_twice_is_refused() -> None:
    """Its first lost changes may have been brought over as rows: that would not bring the later ones."""
    first = chain((100, "Heap INSERT", None), (200, "Heap UPDATE", None), (300, "Heap UPDATE", 150))
    once = WalFacts(True, (*first, *chain((400, "Heap UPDATE", None))))
    twice = WalFacts(True, (*once.records, *chain((500, "Heap UPDATE", 350))))

    def judged(disk: OnDisk, buffers: InBuffers, wal: WalFacts) -> Procedure:
        return classify(disk, buffers, wal, TABLE, SERVER).procedure

    assert judged(OnDisk("good", Lsn(450)), ABSENT, once) is Procedure.ROWS
    assert judged(OnDisk("good", Lsn(350)), InBuffers("present", Lsn(450)), once) is Procedure.ROWS
    assert judged(OnDisk("good", Lsn(350)), InBuffers("unknown"), once) is Procedure.ROWS
    assert judged(OnDisk("good", Lsn(350)), ABSENT, once) is Procedure.REFUSE
    assert judged(OnDisk("zero"), ABSENT, once) is Procedure.REFUSE
    assert judged(OnDisk("good", Lsn(550)), ABSENT, twice) is Procedure.REFUSE


def test_images_are_proven_by_the_last_record() -> None:
    assert proves_newest(Lsn(5100), WAL) is None
    assert "before" in (proves_newest(Lsn(1100), WAL) or "")
    assert "after" in (proves_newest(Lsn(50000), WAL) or "")
    assert proves_newest(Lsn(400), WalFacts(True, (), Lsn(500))) is None
    assert proves_newest(Lsn(600), WalFacts(True, (), Lsn(500))) is not None
    assert proves_newest(Lsn(5100), WalFacts(False)) is not None


records = st.lists(st.integers(1, 50), min_size=1, max_size=8, unique=True).map(sorted)


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


states = st.sampled_from(["good", "zero", "bad", "missing", "unreadable"])
lsns = st.one_of(st.none(), st.integers(1, 9000).map(Lsn))


@given(
    st.builds(OnDisk, states, lsns),
    st.builds(
        InBuffers, st.sampled_from(["absent", "present", "unknown"]), lsns, st.booleans(), st.booleans()
    ),
    st.sampled_from([WAL, WalFacts(False), WalFacts(True)]),
    st.builds(
        ServerFactsForPages,
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
)
def test_nothing_is_written_that_a_buffer_could_overwrite(
    disk: OnDisk, buffers: InBuffers, wal: WalFacts, server: ServerFactsForPages
) -> None:
    judged = classify(disk, buffers, wal, TABLE, server)
    if judged.procedure is Procedure.WRITE:
        assert buffers.state == "absent"
        assert disk.state in ("bad", "unreadable")
    if judged.procedure is Procedure.REPLACE:
        assert wal.known
        assert server.can_evict or buffers.state == "absent"
    if judged.procedure in (Procedure.WRITE, Procedure.REPLACE, Procedure.SAVE_BUFFER):
        assert all((server.checksums, server.full_page_writes, server.superuser))
        assert not server.in_recovery
    if judged.procedure is Procedure.SAVE_BUFFER:
        assert buffers.lsn is not None
        assert wal.known


# --- masks ------------------------------------------------------------------------------------------


def heap_page(infomask: int = 0x0902, rows: int = 2) -> bytes:
    page = bytearray(8192)
    lower, upper = 24 + 4 * rows, 8192 - 40 * rows
    struct.pack_into("<IIHHHHHHI", page, 0, 1, 2, 0x1234, 0, lower, upper, 8192, 0x2004, 77)
    for row in range(rows):
        offset = 8192 - 40 * (row + 1)
        struct.pack_into("<I", page, 24 + 4 * row, offset | 1 << 15 | 36 << 17)
        page[offset : offset + 36] = bytes([row + 1]) * 36
        struct.pack_into("<H", page, offset + 20, infomask)
    return bytes(page)


def test_masks_leave_rows_and_drop_hints() -> None:
    page = heap_page()
    other = bytearray(heap_page(0x0502))
    struct.pack_into("<II", other, 0, 9, 9)
    struct.pack_into("<HH", other, 8, 0xFFFF, 0x0005)
    struct.pack_into("<I", other, 20, 12345)
    other[40:60] = b"x" * 20  # between the line pointers and the rows
    assert same(page, bytes(other))
    other[8191 - 4 - 8] ^= 1
    assert not same(page, bytes(other))
    assert not same(heap_page(0x0302), heap_page(0x0102))  # frozen is no hint
    assert masked(bytes(8192)) == bytes(8192)


@given(st.binary(max_size=120), st.binary(max_size=60))
def test_masks_take_any_bytes(head: bytes, tail: bytes) -> None:
    page = (head + heap_page()[len(head) :])[: 8192 - len(tail)] + tail
    assert len(masked(page)) == 8192
    assert masked(masked(page)) == masked(page)


def test_damage_in_words() -> None:
    good = heap_page()
    flipped = bytearray(good)
    flipped[8150] ^= 8
    assert describe(bytes(flipped), good) == "one bit differs, in byte 8150"
    assert describe(bytes(8192), good) == "it is all zeros"
    torn = good[:4096] + bytes(range(256)) * 16
    assert describe(torn, good).startswith("torn: its last")


# --- a change that is known from elsewhere, older than the WAL that was read ------------------------------------

KNOWN = WalFacts(True, (), Lsn(6000), Lsn(9000), beyond=Lsn(4000))


def test_an_old_page_is_one_that_lacks_a_change_known_from_elsewhere() -> None:
    assert classify(OnDisk("good", Lsn(3900)), ABSENT, KNOWN, TABLE, SERVER).damage is PageClass.STALE
    assert classify(OnDisk("good", Lsn(4000)), ABSENT, KNOWN, TABLE, SERVER).damage is PageClass.STALE
    assert classify(OnDisk("good", Lsn(4100)), ABSENT, KNOWN, TABLE, SERVER).damage is PageClass.HEALTHY
    held = classify(BAD, InBuffers("present", Lsn(3900)), KNOWN, TABLE, SERVER)
    assert held.procedure is Procedure.REFUSE
    held = classify(BAD, InBuffers("present", Lsn(4100)), KNOWN, TABLE, SERVER)
    assert held.procedure is Procedure.SAVE_BUFFER


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
