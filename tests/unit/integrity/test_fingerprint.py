"""Fingerprints: what goes into a row's hash, how totals add up, and what a snapshot may miss."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from knockwood.integrity.fingerprint import (
    Blocks,
    Column,
    RowVersion,
    Snapshot,
    Totals,
    Type,
    hashable,
    precedes,
    row_hash,
    split,
    totals_query,
    versions_query,
)

TYPES = {
    23: Type(23, "pg_catalog.int4", "b", 0, 0, "pg_catalog.int4send"),
    25: Type(25, "pg_catalog.text", "b", 0, 0, "pg_catalog.textsend"),
    1042: Type(1042, "pg_catalog.bpchar", "b", 0, 0, "pg_catalog.bpcharsend"),
    1700: Type(1700, "pg_catalog.numeric", "b", 0, 0, "pg_catalog.numeric_send"),
    1231: Type(1231, "pg_catalog._numeric", "b", 0, 1700, "pg_catalog.array_send"),
    1033: Type(1033, "pg_catalog.aclitem", "b", 0, 0, None),
    1034: Type(1034, "pg_catalog._aclitem", "b", 0, 1033, "pg_catalog.array_send"),
    90: Type(90, "public.mood", "e", 0, 0, "pg_catalog.enum_send"),
    91: Type(91, "public.money", "d", 1700, 0, "pg_catalog.numeric_send"),
    92: Type(92, "public.wallet", "d", 91, 0, "pg_catalog.numeric_send"),
    93: Type(93, "public.pair", "c", 0, 0, "pg_catalog.record_send", (23, 1033)),
}
HASHES = st.integers(-(2**63), 2**63 - 1)


def column(oid: int, typmod: int = -1, deterministic: bool = True) -> str:
    return hashable(Column("c", oid, typmod, deterministic), TYPES)


def test_types_whose_hash_tells_all_values_apart_are_hashed_directly() -> None:
    assert column(23) == column(25) == column(90) == column(1042, 9) == "t.c"


def test_types_that_call_different_bytes_equal_are_sent() -> None:
    assert column(1700) == "pg_catalog.numeric_send(t.c)"
    assert column(1231) == "pg_catalog.array_send(t.c)"
    assert column(1042) == "pg_catalog.bpcharsend(t.c)"
    assert column(25, deterministic=False) == "pg_catalog.textsend(t.c)"


def test_domains_are_hashed_as_what_they_hold() -> None:
    assert column(92) == column(91) == "pg_catalog.numeric_send(t.c::pg_catalog.numeric)"


def test_types_without_a_send_function_and_what_holds_them_go_as_text() -> None:
    assert column(1033) == column(1034) == column(93) == "(t.c)::pg_catalog.text"


def test_the_row_hash_names_every_column_in_order() -> None:
    columns = [Column('"a b"', 23, -1), Column("c", 1700, -1)]
    assert row_hash(columns, TYPES) == (
        'pg_catalog.hash_record_extended(row(t."a b", pg_catalog.numeric_send(t.c)), 0)'
    )


@given(st.lists(HASHES), st.lists(HASHES), st.randoms())
def test_totals_do_not_depend_on_order_and_can_be_taken_apart(
    first: list[int], second: list[int], random: object
) -> None:
    both = [*first, *second]
    shuffled = sorted(both, key=hash)
    assert totals(both) == totals(shuffled) == totals(first) + totals(second)
    assert totals(both).without(second) == totals(first)


@given(HASHES)
def test_a_row_that_is_there_twice_is_seen_although_xor_cancels(value: int) -> None:
    assert totals([value, value]).xor == 0
    assert totals([value, value]) != totals([])


def totals(hashes: list[int]) -> Totals:
    result = Totals()
    for value in hashes:
        result += Totals(1, value, value)
    return result


@given(st.integers(0, 100_000), st.integers(1, 5000))
def test_chunks_cover_every_block_once_and_the_last_is_open(blocks: int, size: int) -> None:
    pieces = split(blocks, size)
    assert pieces[0].start == 0
    assert pieces[-1].end is None
    assert all(a.end == b.start for a, b in pairwise(pieces))
    assert pieces[-1].start < max(blocks, 1)


@given(st.integers(3, 2**32 - 1), st.integers(1, 2**31 - 1))
def test_transaction_ids_go_round(xid: int, distance: int) -> None:
    later = (xid + distance) % 2**32
    assert precedes(xid, later)
    assert not precedes(later, xid)
    assert not precedes(xid, xid)


def test_a_snapshot_may_miss_what_ran_and_its_subtransactions() -> None:
    snapshot = Snapshot.parse("100:200:120,150")
    assert not snapshot.may_miss(99)
    assert not snapshot.may_miss(110)
    assert snapshot.may_miss(120)
    assert snapshot.may_miss(130), "it may be a subtransaction of 120"
    assert snapshot.may_miss(200)
    assert snapshot.may_miss(5000)


def test_a_snapshot_with_nothing_running_misses_only_what_comes() -> None:
    epoch = 1 << 32
    snapshot = Snapshot.parse(f"{epoch + 10}:{epoch + 10}:")
    assert snapshot.horizon == 10
    assert not snapshot.may_miss(2**32 - 5)
    assert snapshot.may_miss(10)


def test_row_versions_are_read_back() -> None:
    version = RowVersion.parse("(12,3) 700 0 -55 o")
    assert (version.ctid, version.xmin, version.xmax, version.hash) == ("(12,3)", 700, 0, -55)
    assert (version.old, version.recent, version.multi) == (True, False, False)
    assert RowVersion.parse("(0,1) 9 8 7 xm").multi


def test_queries_name_the_table_alone_and_its_blocks() -> None:
    query = totals_query('public."T %"', "h(t)", Blocks(5, 9))
    assert 'from only public."T %" t where' in query
    assert "'(5,0)'" in query
    assert "'(9,0)'" in query
    still = versions_query("t", "h(t)", Blocks(0, None), 700, None)
    assert "mxid_age" not in still
    assert "age('700'" in still
