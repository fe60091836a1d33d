"""The receiver on real servers: every acknowledged commit is in the repository after a flush."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from fix_receive import commit, fetch_range, first_lsn, new_repository, start_again, waldump
from fix_server import ServerFactory
from knockwood.errors import LockHeldError, MissingPrivilegeError, WrongSystemError
from knockwood.model.wal import Timeline, WalRange
from knockwood.repository.archive import WalArchive
from knockwood.repository.receive import EventKind, Receiver, ReceiverEvent, receiving
from knockwood.repository.spool import Spool

ONE = Timeline(1)


def test_commit_by_commit(every_version: int, new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(every_version, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    archive = WalArchive(repository)
    with receiving(Receiver(repository, server.dsn(), tmp_path / "spool")) as receiver:
        for number in range(8):
            lsn = commit(server, payload=1 + number * 60_000, switch=number % 3 == 2)
            assert receiver.flush() >= lsn
            assert archive.inventory().covers(WalRange(ONE, first_lsn(repository), lsn))
    stock = archive.inventory()
    assert stock.gaps() == ()
    assert len(stock.segments[ONE]) >= 2
    # Replaced partials are gone: at most the one being written is left.
    assert len(stock.partials) <= 1
    everything = WalRange(ONE, first_lsn(repository), lsn)
    fetch_range(repository, everything, tmp_path / "wal")
    assert waldump(server, tmp_path / "wal", everything).returncode == 0
    for segment in everything.segments(stock.segment_bytes):
        own = server.data_directory / "pg_wal" / segment.name
        if own.exists() and segment.number in stock.segments[ONE]:
            assert (tmp_path / "wal" / segment.name).read_bytes() == own.read_bytes()


def test_a_server_restart_is_followed(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    with receiving(Receiver(repository, server.dsn(), tmp_path / "spool")) as receiver:
        commit(server)
        server.kill()
        start_again(server)
        lsn = commit(server)
        assert receiver.flush() >= lsn
    assert WalArchive(repository).inventory().covers(WalRange(ONE, first_lsn(repository), lsn))


def test_who_is_in_a_hurry_need_not_wait_for_the_next_partial(
    new_server: ServerFactory, tmp_path: Path
) -> None:
    server = new_server(18, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    archive = WalArchive(repository)
    with receiving(Receiver(repository, server.dsn(), tmp_path / "spool", partial_every=3600)) as receiver:
        receiver.flush()
        tail = WalRange(ONE, first_lsn(repository), commit(server))
        spool = Spool(tmp_path / "spool", repository.header.segment_bytes)
        spool.hurry()
        deadline = time.monotonic() + 60
        while not archive.inventory().covers(tail):
            assert time.monotonic() < deadline
            spool.hurry()
            time.sleep(0.05)
        spool.calm()
        assert not spool.hurried()


def test_a_second_receiver_is_refused(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    with receiving(Receiver(repository, server.dsn(), tmp_path / "spool")):
        for spool in ("spool", "other"):
            with (
                pytest.raises(LockHeldError),
                receiving(Receiver(repository, server.dsn(), tmp_path / spool)),
            ):
                pass


def test_the_spool_of_an_earlier_version_is_taken_over_and_another_clusters_is_not(
    new_server: ServerFactory, tmp_path: Path
) -> None:
    server, other = new_server(18, segment_megabytes=1), new_server(17, segment_megabytes=1)
    older = tmp_path / "spool"
    repository = new_repository(server, tmp_path / "repository")
    with receiving(Receiver(repository, server.dsn(), older)) as receiver:
        commit(server)
        receiver.flush()
    own = _segments_in(older)
    assert own
    # Of another cluster that had the name, far ahead: shared, it would be what receiving goes on from.
    with psycopg.connect(other.dsn(), autocommit=True) as connection:
        for _ in range(5):
            connection.execute("create table if not exists t (a int)")
            connection.execute("insert into t values (1)")
            connection.execute("select pg_switch_wal()")
        name = connection.execute("select pg_walfile_name(pg_current_wal_lsn() - 1)").fetchone()
    assert name is not None
    theirs = older / str(name[0])
    assert theirs.name > max(own)
    theirs.write_bytes((other.data_directory / "pg_wal" / theirs.name).read_bytes())
    place = older / str(repository.header.system_identifier)
    with receiving(Receiver(repository, server.dsn(), place, older_spool=older)) as receiver:
        lsn = commit(server)
        assert receiver.flush() >= lsn
    assert _segments_in(older) == {theirs.name}
    assert WalArchive(repository).inventory().covers(WalRange(ONE, first_lsn(repository), lsn))


def _segments_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size >= 1 << 20}


def test_another_cluster_is_refused(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    other = new_server(17, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    with pytest.raises(WrongSystemError), receiving(Receiver(repository, other.dsn(), tmp_path / "spool")):
        pass


def test_a_spool_that_was_lost_is_no_loss(new_server: ServerFactory, tmp_path: Path) -> None:
    """Without local files it goes on after what the archive holds."""
    server = new_server(18, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    for spool in ("first", "second"):
        with receiving(Receiver(repository, server.dsn(), tmp_path / spool)) as receiver:
            for _ in range(3):
                lsn = commit(server, switch=True)
            receiver.flush()
        commit(server, switch=True)
    stock = WalArchive(repository).inventory()
    assert stock.gaps() == ()
    assert stock.covers(WalRange(ONE, first_lsn(repository), lsn))


def test_a_commit_waits_for_a_synchronous_receiver(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    commit(server)
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        with receiving(Receiver(repository, server.dsn(), tmp_path / "spool", synchronous=True)):
            connection.execute("alter system set synchronous_standby_names = 'knockwood'")
            connection.execute("select pg_reload_conf()")
            state = ""
            while state != "sync":
                row = connection.execute(
                    "select sync_state from pg_stat_replication where application_name = 'knockwood'"
                ).fetchone()
                state = row[0] if row else ""
            commit(server)
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(commit, server)
            waiting = None
            while waiting is None and not late.done():
                waiting = connection.execute(
                    "select pid from pg_stat_activity where wait_event = 'SyncRep'"
                ).fetchone()
            assert waiting is not None
            connection.execute("alter system reset synchronous_standby_names")
            connection.execute("select pg_reload_conf()")
            late.result()


def test_events_tell_what_happens(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    events: list[ReceiverEvent] = []
    with receiving(
        Receiver(repository, server.dsn(), tmp_path / "spool", on_event=events.append)
    ) as receiver:
        commit(server, switch=True)
        receiver.flush()
    kinds = [event.kind for event in events]
    assert kinds[0] == EventKind.STREAMING
    assert kinds[-1] == EventKind.STOPPED
    assert EventKind.ARCHIVED in kinds


def test_least_privilege(every_version: int, new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(every_version, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("create role knockwood login")
        connection.execute("grant pg_monitor to knockwood")
        dsn = server.dsn(user="knockwood")
        with (
            pytest.raises(MissingPrivilegeError) as refused,
            receiving(Receiver(repository, dsn, tmp_path / "spool")),
        ):
            pass
        assert refused.value.hint == "ALTER ROLE knockwood REPLICATION;"
        connection.execute("alter role knockwood replication")
    with receiving(Receiver(repository, dsn, tmp_path / "spool")) as receiver:
        lsn = commit(server, switch=True)
        assert receiver.flush() >= lsn
