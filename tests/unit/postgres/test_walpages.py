"""Segments made by hand: records across pages and segments, switches, unfinished and overwritten ones."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fix_wal import BASE, SIZE, Writer
from knockwood.postgres.walpages import Tail, read_segment, sound
from knockwood.postgres.walreader import PAGE_BYTES
from knockwood.postgres.walrecords import decode


def read_all(writer: Writer) -> list[int]:
    """The LSNs found, segment after segment."""
    found: list[int] = []
    tail: Tail | None = None
    for segment, raw in writer.segments():
        result = read_segment(raw, segment, tail)
        assert result.broken is None
        for stretch in result.stretches:
            rows = decode(stretch)
            assert rows.bad is None
            assert (rows.end > rows.lsn).all()
            assert (rows.end[:-1] <= rows.lsn[1:]).all()
            found += rows.lsn.tolist()
        tail = result.tail
    return found


@given(st.lists(st.one_of(st.integers(0, 300), st.integers(5000, 80_000)), min_size=1, max_size=12))
def test_every_record_is_found_where_it_begins(sizes: list[int]) -> None:
    writer = Writer()
    for size in sizes:
        writer.record(size)
    assert read_all(writer) == writer.lsns


@given(st.lists(st.integers(0, 9000), min_size=20, max_size=40), st.integers(0, 3))
def test_one_segment_alone_begins_with_its_first_whole_record(sizes: list[int], skip: int) -> None:
    writer = Writer()
    for size in sizes:
        writer.record(size)
    segments = writer.segments()
    segment, raw = segments[min(skip, len(segments) - 1)]
    result = read_segment(raw, segment, None)
    found = [lsn for stretch in result.stretches for lsn in stretch.lsns.tolist()]
    begin, end = segment.start.value, segment.end.value
    wanted = [lsn for lsn in writer.lsns if begin <= lsn < end]
    if len(segments) > segment.number - BASE // SIZE + 1 and wanted:
        wanted = [lsn for lsn in wanted if lsn < result.end]
    assert found == wanted


@given(st.lists(st.integers(0, 500), min_size=3, max_size=60), st.integers(1, 400))
def test_what_is_cut_in_the_middle_of_a_record_ends_before_it(sizes: list[int], cut: int) -> None:
    writer = Writer()
    for size in sizes:
        writer.record(size, info=0x10, xid=7)
    del writer.wal[-min(cut, len(writer.wal) - 100) :]
    while writer.wal and writer.wal[-1] == 0:
        # Zeroes at its end may belong to a record that is whole, or not: the checksum tells.
        del writer.wal[-1]
    whole = bytes(writer.wal)
    segment, raw = writer.segments()[0]
    result = read_segment(raw, segment, None)
    assert result.broken is None
    assert result.zeroes
    found = [lsn for stretch in result.stretches for lsn in stretch.lsns.tolist()]
    assert found == writer.lsns[: len(found)]
    for stretch in result.stretches:
        for begin, lsn in zip(stretch.starts.tolist(), stretch.lsns.tolist(), strict=True):
            length = int(stretch.buffer[begin : begin + 4].view("<u4")[0])
            assert sound(stretch.buffer[begin : begin + length])
            assert lsn < BASE + len(whole)


def test_damage_ends_it_and_is_told() -> None:
    writer = Writer()
    for _ in range(300):
        writer.record(100)
    segment, raw = writer.segments()[0]
    wrong = raw.copy()
    at = writer.lsns[150] - BASE + 8  # its link to the record before
    wrong[at] ^= 0xFF
    result = read_segment(wrong, segment, None)
    assert result.broken == "a record does not link to the one before it"
    assert result.end == writer.lsns[150]
    other = raw.copy()
    other[3 * PAGE_BYTES + 8] ^= 0x01  # the address of a page
    result = read_segment(other, segment, None)
    assert result.broken == "a page that does not belong there"
    assert result.end <= BASE + 3 * PAGE_BYTES


def test_a_record_that_does_not_go_on_is_damage() -> None:
    writer = Writer()
    while writer.position < BASE + SIZE - 200:
        writer.record(100)
    writer.record(5000)
    first, second = writer.segments()
    tail = read_segment(first[1], first[0], None).tail
    assert tail is not None
    assert tail.lsn == writer.lsns[-1]
    wrong = second[1].copy()
    wrong[16] ^= 1  # how much of the record is left
    assert read_segment(wrong, second[0], tail).broken == "a record that began before does not go on here"
    assert read_segment(second[1], second[0], tail).broken is None


def test_after_a_crash_a_record_begun_is_given_up() -> None:
    # The server wrote the first half of a record, crashed, and went on at the next page with another
    # (XLOG_OVERWRITE_CONTRECORD), whose page says so.
    writer = Writer()
    while writer.position < BASE + 2 * PAGE_BYTES - 100:
        writer.record(50)
    begun = writer.record(3000)
    del writer.wal[2 * PAGE_BYTES :]
    writer.lsns.remove(begun)
    writer.previous = writer.lsns[-1]
    more = writer.record(8, info=0xD0, manager=0)
    writer.record(60)
    flags = 2 * PAGE_BYTES + 2
    writer.wal[flags] |= 8
    segment, raw = writer.segments()[0]
    result = read_segment(raw, segment, None)
    assert result.broken is None
    assert [lsn for stretch in result.stretches for lsn in stretch.lsns.tolist()] == writer.lsns
    assert more in writer.lsns


@given(st.data())
def test_what_pages_say_of_their_first_record_saves_time_and_is_not_trusted(data: st.DataObject) -> None:
    writer = Writer()
    for _ in range(600):
        writer.record(data.draw(st.integers(0, 300)) if len(writer.lsns) % 50 == 0 else 60)
    segment, raw = writer.segments()[0]
    wrong = raw.copy()
    page = data.draw(st.integers(1, 7))
    at = page * PAGE_BYTES + 16
    wrong[at : at + 4] = np.frombuffer(struct.pack("<I", data.draw(st.integers(0, (1 << 32) - 1))), np.uint8)
    right, found = read_segment(raw, segment, None), read_segment(wrong, segment, None)
    assert [one.lsns.tolist() for one in found.stretches] == [one.lsns.tolist() for one in right.stretches]
    assert found.end == right.end
