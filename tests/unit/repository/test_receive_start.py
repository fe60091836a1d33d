"""Where the receiver goes on, and what it makes of pg_receivewal's last words."""

from __future__ import annotations

from pathlib import Path

import pytest

from knockwood.errors import NoSpaceError, PostgresError, ProgramFailedError, SlotLostError
from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalRange, WalSegment
from knockwood.repository.inventory import ArchiveInventory, Partial, partial_object
from knockwood.repository.receive_server import ServerPosition, StreamEnded, _without_password
from knockwood.repository.receive_start import archive_next, choose_start, missing_pieces
from knockwood.repository.spool import Spool

MB = 1 << 20
ONE, TWO, THREE = Timeline(1), Timeline(2), Timeline(3)


def segment(timeline: int, number: int) -> WalSegment:
    return WalSegment(Timeline(timeline), number, MB)


def server(*switches: tuple[Timeline, int], on: Timeline = ONE, flush: int = 100 * MB) -> ServerPosition:
    history = TimelineHistory(on, tuple((timeline, Lsn(lsn)) for timeline, lsn in switches))
    return ServerPosition(7, history, Lsn(flush))


def unknown(timeline: Timeline) -> TimelineHistory:
    return TimelineHistory(timeline)


def test_from_the_slot_where_nothing_was_received() -> None:
    start = choose_start(None, server(), Lsn(5 * MB + 40), MB, unknown)
    assert start.segment == segment(1, 5)
    # A slot made just after a promotion may reserve WAL of the timeline before.
    start = choose_start(None, server((ONE, 6 * MB), on=TWO), Lsn(5 * MB + 40), MB, unknown)
    assert start.segment == segment(1, 5)
    assert choose_start(None, server(), None, MB, unknown).segment == segment(1, 100)


def test_goes_on_with_what_it_has() -> None:
    assert choose_start(segment(1, 9), server(), Lsn(0), MB, unknown).segment == segment(1, 9)


@pytest.mark.parametrize("switch", [9 * MB, 9 * MB + 40, 12 * MB])
def test_goes_on_to_the_switch_on_the_old_timeline(switch: int) -> None:
    start = choose_start(segment(1, 9), server((ONE, switch), on=TWO), None, MB, unknown)
    assert start.segment == segment(1, 9)
    assert not start.forked


def test_begins_the_new_timeline_where_it_forked() -> None:
    start = choose_start(segment(1, 9), server((ONE, 7 * MB + 40), on=TWO), None, MB, unknown)
    assert start.segment == segment(2, 7)
    assert start.forked


def test_two_promotions_from_one_parent() -> None:
    """We followed timeline 2; the server is timeline 3, which left timeline 1 later."""
    ours = TimelineHistory(TWO, ((ONE, Lsn(5 * MB)),))
    start = choose_start(segment(2, 9), server((ONE, 7 * MB), on=THREE), None, MB, lambda _: ours)
    assert start.segment == segment(1, 5)
    assert start.forked


def test_a_server_behind_is_refused() -> None:
    ours = TimelineHistory(TWO, ((ONE, Lsn(5 * MB)),))
    with pytest.raises(PostgresError, match="timeline 1, the archive has gone on to timeline 2"):
        choose_start(segment(2, 9), server(), None, MB, lambda _: ours)


def test_what_the_archive_needs_next() -> None:
    assert archive_next(ArchiveInventory(MB)) is None
    assert archive_next(ArchiveInventory(MB, {ONE: (3, 4), TWO: (4,)})) == segment(2, 5)
    part = segment(2, 5)
    partial = Partial(part, part.start + 8, partial_object(part, part.start + 8))
    assert archive_next(ArchiveInventory(MB, {ONE: (3, 4)}, (partial,))) == part


def test_missing_pieces_are_cut_at_the_switch() -> None:
    pieces = missing_pieces(server((ONE, 7 * MB), on=TWO), Lsn(5 * MB), segment(2, 9))
    assert pieces == [
        WalRange(ONE, Lsn(5 * MB), Lsn(7 * MB)),
        WalRange(TWO, Lsn(7 * MB), Lsn(9 * MB)),
    ]
    assert missing_pieces(server(), Lsn(5 * MB), segment(1, 5)) == []


TERMINATED = "pg_receivewal: error: unexpected termination of replication stream: "
ENDINGS = {
    f"{TERMINATED}ERROR:  requested WAL segment 000000010000000000000002 has already been removed": True,
    f"{TERMINATED}FEHLER:  das angeforderte WAL-Segment 000000010000000000000002 wurde entfernt": True,
    'could not write 512 bytes to file "00000001000000000000002A.partial": No space left on device': None,
    'could not open write-ahead log file "/spool/000000010000000000000002": Is a directory': False,
    'could not send replication command: ERROR:  replication slot "x" is active for PID 12': False,
    "": False,
}


@pytest.mark.parametrize("text", ENDINGS)
def test_why_the_stream_ended(text: str) -> None:
    ended = StreamEnded.of(1, text)
    kind = {True: SlotLostError, False: ProgramFailedError, None: NoSpaceError}[ENDINGS[text]]
    assert type(ended.error) is kind
    assert ended.removed == ("000000010000000000000002" if ENDINGS[text] else None)


def test_a_password_is_not_on_the_command_line() -> None:
    words, environment = _without_password("host=db user=backup password='se cret' dbname=shop")
    assert environment["PGPASSWORD"] == "se cret"
    assert "se cret" not in str(words)
    assert words["host"] == "db"
    words, environment = _without_password("postgresql://backup:hush@db/shop")
    assert environment["PGPASSWORD"] == "hush"
    assert "hush" not in str(words)


def test_a_spool_with_half_made_files_is_mended(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MB)
    (tmp_path / "000000010000000000000002").write_bytes(b"\1" * MB)
    (tmp_path / "000000010000000000000003.partial").write_bytes(bytes(8192))
    (tmp_path / "000000010000000000000001").write_bytes(b"\1" * 5)
    (tmp_path / "notes.txt").write_text("not ours")
    assert len(spool.mend()) == 2
    assert spool.mend() == []
    left = [(file.segment.number, file.partial) for file in spool.files()]
    assert left == [(2, False), (3, True)]
    # What was no WAL of ours is kept beside.
    assert [p.read_bytes() for p in tmp_path.glob("*.aside-*")] == [b"\1" * 5]
