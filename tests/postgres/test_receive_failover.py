"""The receiver where the server changes under it: promotion, and a slot that is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg

from fix_receive import commit, fetch_range, first_lsn, new_repository, waldump
from fix_server import ServerFactory
from fix_standby import caught_up, either, promote
from knockwood.model.wal import Timeline, WalRange
from knockwood.postgres.server import LocalServer
from knockwood.repository import gaps
from knockwood.repository.archive import WalArchive
from knockwood.repository.receive import EventKind, Receiver, ReceiverEvent, receiving

TWO = Timeline(2)


def test_a_promotion_is_followed(
    every_version: int,
    new_server: ServerFactory,
    standby_of: Callable[[LocalServer], LocalServer],
    tmp_path: Path,
) -> None:
    primary = new_server(every_version, segment_megabytes=1)
    standby = standby_of(primary)
    repository = new_repository(primary, tmp_path / "repository")
    dsn = either(primary, standby)
    with receiving(Receiver(repository, dsn, tmp_path / "spool")) as receiver:
        lsn = commit(primary, switch=True)
        lsn = commit(primary)
        receiver.flush()
        caught_up(standby, lsn)
        primary.kill()
        promote(standby)
        last = commit(standby, switch=True)
        last = commit(standby)
        assert receiver.flush() >= last
    stock = WalArchive(repository).inventory()
    assert stock.gaps() == ()
    assert stock.without_history == ()
    begin = first_lsn(repository)
    assert stock.covers(WalRange(TWO, begin, last))
    assert gaps.list_gaps(repository) == ()
    switch = stock.histories[TWO].switches[-1][1]
    for number, piece in enumerate((WalRange(Timeline(1), begin, switch), WalRange(TWO, switch, last))):
        fetch_range(repository, piece, tmp_path / f"wal{number}")
        assert waldump(primary, tmp_path / f"wal{number}", piece).returncode == 0


def test_a_promotion_behind_what_was_received(
    new_server: ServerFactory, standby_of: Callable[[LocalServer], LocalServer], tmp_path: Path
) -> None:
    """The old primary's last WAL stays in the archive; the new timeline begins where it forked."""
    primary = new_server(18, segment_megabytes=1)
    standby = standby_of(primary)
    repository = new_repository(primary, tmp_path / "repository")
    events: list[ReceiverEvent] = []
    receiver = Receiver(repository, either(primary, standby), tmp_path / "spool", on_event=events.append)
    with receiving(receiver):
        caught_up(standby, commit(primary))
        hosts = standby.socket_directory
        standby.kill()
        for _ in range(3):
            lost = commit(primary, switch=True)
        lost = commit(primary)
        receiver.flush()
        primary.kill()
        standby.settings["primary_conninfo"] = ""
        standby.start(until="standby")
        assert standby.socket_directory == hosts
        promote(standby)
        last = commit(standby)
        assert last < lost
        # The old timeline reached further: its end is not taken for the new one's.
        receiver.flush()
        stock = WalArchive(repository).inventory()
        assert stock.covers(WalRange(TWO, first_lsn(repository), last))
        for _ in range(5):
            last = commit(standby, switch=True)
        assert receiver.flush() >= last
    stock = WalArchive(repository).inventory()
    assert EventKind.FORKED in [event.kind for event in events]
    assert stock.covers(WalRange(Timeline(1), first_lsn(repository), lost))
    assert stock.covers(WalRange(TWO, first_lsn(repository), last))
    assert stock.gaps() == ()


def test_a_lost_slot_is_a_gap_at_once(every_version: int, new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(
        every_version,
        segment_megabytes=1,
        max_slot_wal_keep_size="2MB",
        max_wal_size="2MB",
        min_wal_size="2MB",
    )
    repository = new_repository(server, tmp_path / "repository")
    with receiving(Receiver(repository, server.dsn(), tmp_path / "spool")) as receiver:
        before = commit(server)
        receiver.flush()
    for _ in range(12):
        commit(server, switch=True)
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("checkpoint")
        commit(server, switch=True)
        connection.execute("checkpoint")
        status = "select wal_status from pg_replication_slots where slot_name = 'knockwood'"
        assert connection.execute(status).fetchone() == ("lost",)
    events: list[ReceiverEvent] = []
    with receiving(
        Receiver(repository, server.dsn(), tmp_path / "spool", on_event=events.append)
    ) as receiver:
        after = commit(server)
        assert receiver.flush() >= after
    kinds = [event.kind for event in events]
    assert EventKind.SLOT_LOST in kinds
    assert EventKind.GAP in kinds
    (gap,) = gaps.list_gaps(repository)
    assert before <= gap.range.start < gap.range.end <= after
    assert gap.detected_at is not None
    stock = WalArchive(repository).inventory()
    assert not stock.covers(WalRange(Timeline(1), before, after))
    assert stock.covers(WalRange(Timeline(1), gap.range.end, after))
    finding = gap.finding("shop")
    assert "base backup" in finding.remedy
    gaps.acknowledge(repository, gap.range, "ann", "old test data")
    (seen,) = gaps.list_gaps(repository)
    assert seen.acknowledged is not None
    assert seen.acknowledged.by == "ann"
