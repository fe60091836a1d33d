"""LSNs, segments, ranges and timelines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.model import Lsn, Timeline, TimelineHistory, Verdict, WalRange, WalSegment, worst

lsns = st.integers(0, 2**64 - 1).map(Lsn)
sizes = st.sampled_from([1 << n for n in range(20, 31)])


@given(lsns)
def test_an_lsn_reads_back_what_it_prints(lsn: Lsn) -> None:
    assert Lsn.parse(str(lsn)) == lsn


@pytest.mark.parametrize("text", ["", "0", "0/", "/0", "0/123456789", "g/0", "0/0 x", "-1/0"])
def test_nonsense_is_no_lsn(text: str) -> None:
    with pytest.raises(ValueError, match="not an LSN"):
        Lsn.parse(text)


@given(st.integers(1, 2**32 - 1), lsns, sizes)
def test_a_segment_reads_back_its_name_and_holds_its_lsn(timeline: int, lsn: Lsn, size: int) -> None:
    segment = WalSegment.containing(Timeline(timeline), lsn, size)
    assert WalSegment.parse(segment.name, size) == segment
    assert segment.start <= lsn < segment.end
    assert segment.next().start == segment.end


def test_names_are_postgresqls() -> None:
    assert WalSegment.containing(Timeline(1), Lsn.parse("0/3000028")).name == "000000010000000000000003"
    assert WalSegment.containing(Timeline(2), Lsn.parse("1/FF000000")).name == "0000000200000001000000FF"


@pytest.mark.parametrize("name", ["", "00000001000000000000000", "0000000100000000000001FF", "x" * 24])
def test_nonsense_is_no_segment(name: str) -> None:
    with pytest.raises(ValueError, match="not a WAL segment name"):
        WalSegment.parse(name)


@given(st.integers(0, 2**40), st.integers(0, 2**28), sizes)
def test_a_range_is_covered_by_its_segments_without_holes(start: int, length: int, size: int) -> None:
    span = WalRange(Timeline(1), Lsn(start), Lsn(start + length))
    segments = span.segments(size)
    if length == 0:
        assert segments == []
        return
    assert segments[0].start <= span.start < segments[0].end
    assert segments[-1].start < span.end <= segments[-1].end
    assert [s.number for s in segments] == list(range(segments[0].number, segments[-1].number + 1))


def test_a_range_cannot_run_backwards() -> None:
    with pytest.raises(ValueError, match="ends before"):
        WalRange(Timeline(1), Lsn(2), Lsn(1))


def test_a_history_is_a_path_of_timelines() -> None:
    text = "1\t0/3000000\tno recovery target specified\n\n# words\n2\t0/5000000\tbefore something\n"
    history = TimelineHistory.parse(Timeline(3), text)
    assert history.path() == [
        (1, Lsn(0), Lsn(0x3000000)),
        (2, Lsn(0x3000000), Lsn(0x5000000)),
        (3, Lsn(0x5000000), None),
    ]
    assert history.timeline_at(Lsn(0x2FFFFFF)) == 1
    assert history.timeline_at(Lsn(0x3000000)) == 2
    assert history.timeline_at(Lsn(0x9000000)) == 3


@pytest.mark.parametrize("text", ["x\t0/0", "1", "2\t0/1\n1\t0/2", "1\tzero"])
def test_a_damaged_history_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"history|LSN"):
        TimelineHistory.parse(Timeline(3), text)


@given(st.lists(st.sampled_from(list(Verdict))))
def test_the_worst_verdict_is_never_better_than_any(verdicts: list[Verdict]) -> None:
    order = [Verdict.BROKEN, Verdict.NOT_CHECKED, Verdict.HELD]
    assert order.index(worst(verdicts)) == min([order.index(v) for v in verdicts], default=1)
