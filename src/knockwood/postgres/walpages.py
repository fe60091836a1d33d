"""The pages of a WAL segment, stitched together: their payload without the page headers, and its records.

Pages begin with a header (40 bytes on a segment's first page, 24 elsewhere) that interrupts records. All
headers are multiples of 8 bytes and records begin at multiples of 8, so that what is stitched keeps its
alignment. Facts: xlog_internal.h (`XLogPageHeaderData`), xlogreader.c.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knockwood.model.wal import WalSegment
from knockwood.postgres.walreader import LONG_HEADER, PAGE_BYTES, SHORT_HEADER

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Words = NDArray[np.uint32]

_FIRST_PAYLOAD = PAGE_BYTES - LONG_HEADER
_PAYLOAD = PAGE_BYTES - SHORT_HEADER
_CONTINUES = 0x0001
_OVERWRITES = 0x0008
_HEADER_BYTES = 24
_ZEROES = "zeroes"
_NO_LINK = "a record does not link to the one before it"

MAGICS = {0xD110: 15, 0xD113: 16, 0xD116: 17, 0xD118: 18}
"""XLOG_PAGE_MAGIC of each major version."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What a segment leaves to the next: the start of the record before (for the prev-link; None if
    unknown), and the record that is not finished, with its bytes so far (None if there is none).
    """

    previous: int | None
    lsn: int | None = None
    begun: Bytes | None = None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Payload in which record follows record. `starts` are the byte positions of whole records.

    `lsns` and `ends` are their LSNs; an end is where the next record would be, page headers not counted.
    """

    buffer: Bytes
    starts: Ints
    lsns: Ints
    ends: Ints


@dataclass(frozen=True, slots=True)
class SegmentRecords:
    """The records that END in a segment: one that began in an earlier segment and ends here belongs here.

    Valid from `start` (the first record's LSN; that of a record before the segment where its beginning
    was at hand) up to `end` (where the first record that does not end here begins, or the segment's end).
    `broken` says why the WAL stops being valid at `end`; `zeroes` that nothing more was written from there
    on. The padding after a switch of segments belongs to the switch. `tail` is None where it is not known.
    """

    stretches: tuple[Stretch, ...]
    start: int
    end: int
    tail: Tail | None
    major: int | None
    broken: str | None = None
    zeroes: bool = False


def read_segment(raw: Bytes, segment: WalSegment, before: Tail | None) -> SegmentRecords:
    """Find the records of a segment's bytes. `before` is what the segment before it left, if it was read.

    A partial segment comes filled with zeroes. Nothing is raised: damage is told by `broken`. The links of
    the records (lengths and prev-links) are checked, their checksums are not: the archive's own checksum
    has shown that these are the bytes that were archived.
    """
    reader = _Reader(raw, segment, before)
    return reader.read()


@dataclass(frozen=True, slots=True)
class _Found:
    """What some pages hold: valid from `start` to `end`, where it is `broken` if that is not None."""

    stretch: Stretch | None
    tail: Tail | None
    start: int
    end: int
    broken: str | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """A buffer, its first byte's position in the segment's payload, and the LSN of its first record."""

    buffer: Bytes
    shift: int
    lsn: int


class _Reader:
    def __init__(self, raw: Bytes, segment: WalSegment, before: Tail | None) -> None:
        self.segment = segment
        self.before = before
        self.base = segment.start.value
        pages = raw.reshape(-1, PAGE_BYTES)
        heads = pages[:, :SHORT_HEADER]
        self.magics = heads[:, 0:2].copy().view("<u2")[:, 0]
        self.infos = heads[:, 2:4].copy().view("<u2")[:, 0]
        self.remaining = heads[:, 16:20].copy().view("<u4")[:, 0]
        addresses = heads[:, 8:16].copy().view("<u8")[:, 0]
        expected = np.arange(len(pages), dtype=np.uint64) * np.uint64(PAGE_BYTES) + np.uint64(self.base)
        right = (addresses == expected) & (self.magics == self.magics[0])
        self.pages = len(pages) if right.all() else int(np.argmin(right))
        begun = before.begun if before is not None and before.begun is not None else raw[:0]
        # What was begun before goes in front: 16 MB are copied once, not twice.
        self.joined = np.empty(len(begun) + _size(self.pages), np.uint8)
        self.joined[: len(begun)] = begun
        self.payload = payload = self.joined[len(begun) :]
        if self.pages:
            payload[:_FIRST_PAYLOAD] = pages[0, LONG_HEADER:]
            payload[_FIRST_PAYLOAD:].reshape(-1, _PAYLOAD)[:] = pages[1 : self.pages, SHORT_HEADER:]
        self.cut = "" if self.pages == len(pages) else self._why_cut(raw)

    def _why_cut(self, raw: Bytes) -> str:
        rest = raw[self.pages * PAGE_BYTES :]
        return _ZEROES if not rest.any() else "a page that does not belong there"

    @property
    def major(self) -> int | None:
        return MAGICS.get(int(self.magics[0])) if self.pages else None

    def read(self) -> SegmentRecords:
        if self.major is None:
            reason = "the version that wrote this WAL is unknown" if self.pages else "it holds no WAL page"
            return SegmentRecords((), self.base, self.base, None, None, reason)
        found = [_Found(None, self.before, self.base, self.base)]
        tail = self.before
        for first, last in self._spans():
            found.append(self._span(first, last, tail))
            tail = found[-1].tail
            if found[-1].broken is not None:
                break
        start, last_one = found[1].start, found[-1]
        # Nothing lies between a segment's start and its first page's payload.
        start = self.base if start == self._lsn(0) else start
        stretches = tuple(one.stretch for one in found if one.stretch is not None)
        zeroes = last_one.broken == _ZEROES
        switched = zeroes and bool(stretches) and _is_switch(stretches[-1])
        return SegmentRecords(
            stretches=stretches,
            start=start,
            end=self.segment.end.value if switched else last_one.end,
            tail=last_one.tail,
            major=self.major,
            broken=None if zeroes else last_one.broken,
            zeroes=zeroes and not switched,
        )

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Page ranges; each but the first begins where a server overwrote what it had not finished."""
        marks = np.flatnonzero(self.infos[: self.pages] & _OVERWRITES)
        borders = [0, *(int(page) for page in marks if page), self.pages]
        yield from itertools.pairwise(borders)

    def _span(self, first: int, last: int, before: Tail | None) -> _Found:
        """The records of some pages."""
        low, high = _size(first), _size(last)
        payload = self.payload[low:high]
        continues = bool(self.infos[first] & _CONTINUES)
        remaining = int(self.remaining[first])
        at = self._lsn(low)
        if self.infos[first] & _OVERWRITES:
            # The link of the record that follows leads past the one that was given up: not compared.
            before = None
        if before is not None and before.begun is not None and before.lsn is not None:
            wanted = int(before.begun[:4].view("<u4")[0]) - len(before.begun)
            if not continues or remaining != wanted:
                return _Found(None, None, at, at, "a record that began before does not go on here")
            # Only the first span has anything before it: the others begin where something was given up.
            place = _Place(self.joined[: len(before.begun) + high], low - len(before.begun), before.lsn)
        else:
            if continues and before is not None:
                return _Found(None, None, at, at, "it goes on with a record that did not begin before")
            skip = min(-(-remaining // 8) * 8, len(payload)) if continues else 0
            if skip and skip == len(payload):
                # All of it is the middle of a record whose beginning is not at hand.
                end = self._end(low + skip)
                return _Found(None, None, end, end)
            place = _Place(payload[skip:], low + skip, self._lsn(low + skip))
        cut = self.cut if last == self.pages else ""
        firsts = self._firsts(first, last) - place.shift
        return self._records(place, firsts, before.previous if before is not None else None, cut)

    def _firsts(self, first: int, last: int) -> Ints:
        """Where in the payload the first record of each page begins, as the pages' headers say."""
        rest = np.where(self.infos[first:last] & _CONTINUES, self.remaining[first:last], 0).astype(np.int64)
        begins = np.arange(first, last, dtype=np.int64) * _PAYLOAD - (LONG_HEADER - SHORT_HEADER)
        found: Ints = np.maximum(begins, 0) + ((rest + 7) & -8)
        return found

    def _records(self, place: _Place, firsts: Ints, previous: int | None, cut: str) -> _Found:
        buffer = place.buffer
        starts, stop, length = _chain(buffer, firsts)
        lsns = self._lsns(starts + place.shift)
        lsns[:1] = place.lsn
        ends = self._ends(np.append(starts[1:], stop)[: len(starts)] + place.shift)
        whole = Stretch(buffer, starts, lsns, ends)
        wrong = _first_wrong_link(whole, previous)
        if wrong is not None:
            end = int(lsns[wrong])
            why = _ZEROES if _torn(buffer, int(starts[wrong])) else _NO_LINK
            return _Found(_cut(whole, wrong), None, place.lsn, end, why)
        stretch = whole if len(starts) else None
        last = int(lsns[-1]) if len(starts) else previous
        end = place.lsn if stop == 0 else self._lsn(stop + place.shift)
        if stop == len(buffer):
            return _Found(stretch, Tail(last), place.lsn, self._end(stop + place.shift), cut or None)
        rest = buffer[stop:]
        if length < _HEADER_BYTES and _torn(buffer, stop):
            if len(starts) and not sound(buffer[starts[-1] : stop]):
                # What was cut in the middle of it and filled with zeroes has its length and its link.
                return _Found(_cut(whole, len(starts) - 1), None, place.lsn, int(lsns[-1]), _ZEROES)
            return _Found(stretch, Tail(last), place.lsn, end, _ZEROES)
        if length < _HEADER_BYTES:
            return _Found(stretch, Tail(last), place.lsn, end, "a record is shorter than its header")
        if cut:
            # The end of a partial segment lies inside a record.
            return _Found(stretch, Tail(last), place.lsn, end, cut)
        if last is not None and len(rest) >= 16 and int(rest[8:16].view("<i8")[0]) != last:
            return _Found(stretch, Tail(last), place.lsn, end, _NO_LINK)
        return _Found(stretch, Tail(last, end, rest.copy()), place.lsn, end)

    # --- positions in the payload and in the WAL ----------------------------------------------------

    def _lsn(self, position: int) -> int:
        return int(self._lsns(np.array([position], np.int64))[0])

    def _end(self, position: int) -> int:
        return int(self._ends(np.array([position], np.int64))[0])

    def _lsns(self, positions: Ints) -> Ints:
        """Where bytes of the payload lie in the WAL."""
        # As if the first page's header were short, with what it has more as payload.
        moved = positions + (LONG_HEADER - SHORT_HEADER)
        page = moved // _PAYLOAD
        return moved + (page + 1) * SHORT_HEADER + self.base

    def _ends(self, positions: Ints) -> Ints:
        """The same for ends: at a page's end they lie before the next header."""
        return self._lsns(positions - 8) + 8


def sound(record: Bytes) -> bool:
    """Whether a record's checksum is right (CRC-32C over its data, then over its header's first 20 bytes)."""
    data = record.tobytes()
    length = int.from_bytes(data[:4], "little")
    value = 0xFFFFFFFF
    for byte in data[_HEADER_BYTES:length] + data[:20]:
        value = _CRC_TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF == int.from_bytes(data[20:24], "little")


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def _size(pages: int) -> int:
    return 0 if pages == 0 else _FIRST_PAYLOAD + (pages - 1) * _PAYLOAD


def _chain(buffer: Bytes, firsts: Ints) -> tuple[Ints, int, int]:
    """The starts of whole records, where the first that is not whole begins, and the length it says.

    `firsts` is where pages say that records begin. It saves time and is not trusted: only what the
    lengths lead to from the buffer's first byte on counts.
    """
    words: Words = buffer.view("<u4")
    count = len(words)
    sure = _linked(words, _from_each(words, firsts >> 2)) if count else np.zeros(1, np.int64)
    steps: memoryview[int] = memoryview(words.data)
    found: list[int] = []
    at, length = int(sure[-1]), 0
    # Where the pages say the truth, one step: whether the last record is whole.
    while at < count:
        length = steps[at]
        after = at + (((length + 7) >> 3) << 1)
        if after > count or length < _HEADER_BYTES:
            break
        found.append(at)
        at = after
    return np.append(sure[:-1], np.array(found, np.int64)) << 2, at << 2, length


def _from_each(words: Words, firsts: Ints) -> Ints:
    """Where records seem to begin, in order: all pages are followed side by side, one record a step."""
    at = np.unique(np.append(firsts[(firsts > 0) & (firsts < len(words))], 0))
    limit = np.append(at[1:], len(words))
    found: list[Ints] = []
    while len(at):
        found.append(at)
        length = words.take(at)
        at = at + _size_in_words(length)
        more = np.flatnonzero((at < limit) & (length >= _HEADER_BYTES))
        if len(more) < len(at):
            at, limit = at.take(more), limit.take(more)
    return np.sort(np.concatenate(found))


def _linked(words: Words, starts: Ints) -> Ints:
    """As many as follow each other without a gap, from the first on."""
    length = words.take(starts)
    wrong = np.flatnonzero(
        (starts[:-1] + _size_in_words(length[:-1]) != starts[1:]) | (length[:-1] < _HEADER_BYTES)
    )
    return starts[: int(wrong[0]) + 1] if len(wrong) else starts


def _size_in_words(length: Words) -> Ints:
    """Of records, which begin at multiples of 8 bytes."""
    return (length.astype(np.int64) + 7 >> 3) << 1


def _torn(buffer: Bytes, start: int) -> bool:
    """Whether a record was cut inside its header (its checksum comes last) and zeroes follow, if anything."""
    return not buffer[start + 20 :].any()


def _first_wrong_link(stretch: Stretch, previous: int | None) -> int | None:
    """The row of the first record whose prev-link is not the record before; None if all are right."""
    if not len(stretch.starts):
        return None
    links = stretch.buffer.view("<i8")[(stretch.starts >> 3) + 1]
    if previous is not None and int(links[0]) != previous:
        return 0
    wrong = np.flatnonzero(links[1:] != stretch.lsns[:-1])
    return int(wrong[0]) + 1 if len(wrong) else None


def _is_switch(stretch: Stretch) -> bool:
    if not len(stretch.starts):
        return False
    last = int(stretch.starts[-1])
    info, manager = int(stretch.buffer[last + 16]), int(stretch.buffer[last + 17])
    return info & 0xF0 == 0x40 and manager == 0


def _cut(stretch: Stretch, count: int) -> Stretch:
    return Stretch(stretch.buffer, stretch.starts[:count], stretch.lsns[:count], stretch.ends[:count])
