"""Judging pages: every class has its procedure, and nothing unproven is ever written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fix_pages import ABSENT, KNOWN, SERVER, TABLE, WAL, chain
from knockwood.model import Lsn
from knockwood.recover.plan.page_wal import (
    WalFacts,
)
from knockwood.recover.plan.pages import (
    SEGMENT_PAGES,
    InBuffers,
    OnDisk,
    PageClass,
    Procedure,
    RelationFacts,
    ServerFactsForPages,
    classify,
    segment_of,
    segment_path,
)

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


# --- a change that is known from elsewhere, older than the WAL that was read ------------------------------------


def test_an_old_page_is_one_that_lacks_a_change_known_from_elsewhere() -> None:
    assert classify(OnDisk("good", Lsn(3900)), ABSENT, KNOWN, TABLE, SERVER).damage is PageClass.STALE
    assert classify(OnDisk("good", Lsn(4000)), ABSENT, KNOWN, TABLE, SERVER).damage is PageClass.STALE
    assert classify(OnDisk("good", Lsn(4100)), ABSENT, KNOWN, TABLE, SERVER).damage is PageClass.HEALTHY
    held = classify(BAD, InBuffers("present", Lsn(3900)), KNOWN, TABLE, SERVER)
    assert held.procedure is Procedure.REFUSE
    held = classify(BAD, InBuffers("present", Lsn(4100)), KNOWN, TABLE, SERVER)
    assert held.procedure is Procedure.SAVE_BUFFER
