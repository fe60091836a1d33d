"""Between two steps the shadow's server stands, is fed without a restart, and is lent to other processes."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest

from fix_clones import one, protected, rows
from fix_shadow import BORROWER, LOOP, Shop, told
from knockwood.clone import spawn
from knockwood.clone.shadow import Lent
from knockwood.clone.shadow_server import Keeper
from knockwood.clone.shadow_state import write_record
from knockwood.history import gathering
from knockwood.history.index import ArchiveIndex
from knockwood.history.standing import Standing
from knockwood.model import Lsn, Timeline, WalSegment
from knockwood.operations import revert_changes, shadow, shadow_steps
from knockwood.operations.revert_changes import Gathered, changes_of
from knockwood.postgres.connection import connect
from knockwood.repository.archive import WalArchive

if TYPE_CHECKING:
    from fix_server import ServerFactory

_STARTED = "select pg_postmaster_start_time()::text"


def step(shop: Shop, keeper: Keeper) -> shadow_steps.Step:
    shop.made.flush()
    return shadow_steps.step(shop.cluster, shop.made.repository, check=True, keeper=keeper)


def contents(shop: Shop) -> list[int]:
    """What the server holds that runs, borrowed as another process would."""
    with shadow.open_shadow(shop.cluster, shop.made.repository) as held:
        assert held.lent is not None
        assert not held.lent.server.ours
        return rows(held.lent.dsn())


@pytest.mark.parametrize("version", [15, pytest.param(17, marks=pytest.mark.slow), 18])
def test_it_goes_on_without_a_restart_and_never_past_a_hold(new_server: ServerFactory, version: int) -> None:
    server = new_server(version, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop, keeper = Shop.of(made), Keeper()
        made.backup()
        try:
            assert step(shop, keeper).did == "made"
            assert keeper.server is not None
            started = one(keeper.server.dsn(), _STARTED)
            for number in range(1, 13):
                made.insert(number)
                if number % 4 == 0:
                    # Over the border of a segment, with a checkpoint that the shadow may restart from.
                    made.execute("select pg_logical_emit_message(false, 'x', repeat('y', 700000))")
                    made.execute("checkpoint; select pg_switch_wal()")
                assert step(shop, keeper).did == "advanced"
                assert contents(shop) == list(range(1, number + 1))
            assert step(shop, keeper).did == "stood"
            made.insert(-1)
            made.insert(100)
            hold = shadow.hold(shop.cluster, shop.record.stand.reached, "by hand")  # type: ignore[union-attr]
            assert step(shop, keeper).did == "held"
            assert shadow.warm_clone(shop.cluster, made.repository, made.plan("latest")) is None
            assert contents(shop) == list(range(1, 13))
            made.execute("delete from t where a < 0")
            shadow.release(shop.cluster, hold.id)
            assert step(shop, keeper).did == "advanced"
            assert contents(shop) == [*range(1, 13), 100]
            assert one(keeper.server.dsn(), _STARTED) == started
            spool = shadow.shadow_folder(shop.cluster) / "clone" / "spool"
            assert len(list(spool.glob("0*"))) < 6
        finally:
            keeper.end()
        assert shop.servers() == []


def test_another_process_borrows_it_moves_it_and_gives_it_back_running(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop = Shop.of(made)
        made.backup()
        made.insert(1)
        made.flush()
        with told(LOOP, shop.config) as loop:
            loop.until("stood")
            pid = shop.postmaster
            made.insert(2)
            made.flush()
            with told(BORROWER, shop.config) as borrower:
                assert borrower.says() == f"lent {pid}"
                assert borrower.asked("read") == "1 2"
                loop.until("error another process")
                made.insert(3)
                made.flush()
                assert borrower.asked("advance") == "1 2 3"
                assert borrower.asked("give back") == "gave back"
            loop.until("stood")
            made.insert(4)
            made.flush()
            loop.until("advanced")
            assert contents(shop) == [1, 2, 3, 4]
            assert shop.postmaster == pid
            loop.child.terminate()
            loop.until("ended")
            assert loop.child.wait() == 0
            assert shop.servers() == []
        with told(BORROWER, shop.config) as borrower:
            # Nobody keeps it: who starts it stops it.
            assert borrower.says().startswith("lent ")
            assert borrower.asked("read") == "1 2 3 4"
            assert borrower.asked("give back") == "gave back"
        assert shop.servers() == []


def test_borrowers_beside_steps_read_what_they_asked_for(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop = Shop.of(made)
        made.backup()
        made.insert(1)
        made.flush()
        lent = 0
        with told(LOOP, shop.config) as loop:
            loop.until("stood")
            pid = shop.postmaster
            for number in range(2, 30):
                made.insert(number)
                made.execute("select pg_logical_emit_message(false, 'x', repeat('y', 100000))")
                plan = made.plan("latest")
                clone = shadow.warm_clone(shop.cluster, made.repository, plan, wait=10)
                if clone is None:
                    continue  # the loop went past it first
                lent += 1
                with clone:
                    assert rows(clone.dsn()) == list(range(1, number + 1))
                    assert clone.server.pid == pid
            assert lent > 5
            assert not [line for line in loop.lines if line.startswith("rebuilt")]


def test_a_server_that_is_not_where_the_record_says_is_not_used(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop, keeper = Shop.of(made), Keeper()
        made.backup()
        made.insert(1)
        try:
            for spoil in ("boot", "parent", "started", "reached", "moving"):
                step(shop, keeper)
                pid, record = shop.postmaster, shop.record
                told_, stand = record.serving, record.stand
                assert told_ is not None
                assert stand is not None
                spoilt = {
                    "boot": replace(record, boot="another"),
                    "parent": replace(record, serving=replace(told_, parent=os.getppid())),
                    "started": replace(record, serving=replace(told_, started=told_.started - 1)),
                    "reached": replace(record, stand=replace(stand, reached=stand.reached + 8)),
                    "moving": replace(record, stage="moving", going_to=stand.lsn),
                }[spoil]
                write_record(shadow.shadow_folder(shop.cluster), spoilt)
                with shadow.open_shadow(shop.cluster, made.repository) as held:
                    assert held.lent is None
                assert shop.servers() == []
                write_record(shadow.shadow_folder(shop.cluster), record)
                step(shop, keeper)
                assert shop.postmaster != pid
                assert contents(shop) == [1]
        finally:
            keeper.end()


def test_what_a_dead_borrower_left_running_in_it_is_ended(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop, keeper = Shop.of(made), Keeper()
        made.backup()
        made.insert(1)
        try:
            step(shop, keeper)
            assert keeper.server is not None
            reader = connect(keeper.server.dsn(), autocommit=False)
            try:
                reader.execute("select * from t")
                # Replay could not take the lock while that transaction is open.
                made.execute("truncate t")
                made.insert(2)
                assert step(shop, keeper).did == "advanced"
                with pytest.raises(psycopg.OperationalError):
                    reader.execute("select * from t")
            finally:
                reader.close()
            assert contents(shop) == [2]
        finally:
            keeper.end()


def test_settings_that_the_primary_raised_are_a_restart(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop, keeper = Shop.of(made), Keeper()
        made.backup()
        made.insert(1)
        try:
            step(shop, keeper)
            pid = shop.postmaster
            made.execute("alter system set max_connections = 150")
            server.stop()
            server.start()
            made.insert(2)
            assert step(shop, keeper).did == "advanced"
            assert contents(shop) == [1, 2]
            assert shop.postmaster != pid
            assert keeper.server is not None
            assert one(keeper.server.dsn(), "show max_connections") == "150"
        finally:
            keeper.end()


def test_many_subtransactions_open_do_not_close_a_server_that_stands(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made, connect(server.dsn()) as busy:
        shop, keeper = Shop.of(made), Keeper()
        made.backup()
        try:
            step(shop, keeper)
            with busy.transaction():
                for number in range(70):
                    with busy.transaction():
                        busy.execute("insert into t values (%s)", [1000 + number])
                made.execute("checkpoint")
                made.insert(1)
                assert step(shop, keeper).did == "advanced"
                assert contents(shop) == [1]
        finally:
            keeper.end()


def test_a_step_that_has_nothing_to_do_starts_nothing(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop, keeper = Shop.of(made), Keeper()
        made.backup()
        made.insert(1)
        try:
            step(shop, keeper)
            assert keeper.server is not None
            assert keeper.server.pid is not None
            before = shop.record
            spent = psutil.Process(keeper.server.pid).cpu_times()
            done = shadow_steps.step(shop.cluster, made.repository, check=False, keeper=keeper)
            assert done.did == "stood"
            assert shop.record == before
            after = psutil.Process(keeper.server.pid).cpu_times()
            assert after.user + after.system - spent.user - spent.system < 0.1
        finally:
            keeper.end()


def read_changes(shop: Shop, *xids: int) -> dict[int, list[tuple[str, str | None, str | None]]]:
    """What transactions did to t, as a revert reads it."""
    shop.made.flush()
    gathered, repository = Gathered(), shop.cluster.repository()
    index = ArchiveIndex.open(repository, programs_for=shop.cluster.programs)
    registry = shop.made.registry
    changes_of(shop.cluster, repository, [index.transaction(xid) for xid in xids], gathered, registry)
    assert gathered.reasons == []
    assert registry.records() == []
    return {
        culprit.xid: [
            (
                change.kind,
                change.before["a"].text if change.before else None,
                change.after["a"].text if change.after else None,
            )
            for change in culprit.changes
        ]
        for culprit in gathered.culprits.values()
    }


def test_a_revert_reads_from_it_and_from_a_clone_where_it_cannot(
    new_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop, keeper = Shop.of(made), Keeper()
        made.backup()
        made.insert(1)
        try:
            step(shop, keeper)
            xids = [made.insert(number) for number in (2, 3)]
            xids.append(
                int(
                    made.execute("update t set a = 20 where a = 2 returning pg_current_xact_id()::text")[0][0]
                )
            )
            did = [[("insert", None, "2")], [("insert", None, "3")], [("update", "2", "20")]]
            pid = shop.postmaster
            with monkeypatch.context() as only_warm:
                only_warm.setattr(revert_changes, "clones_for", None)
                assert read_changes(shop, *xids) == dict(zip(xids, did, strict=True))
            assert shop.postmaster == pid
            assert contents(shop) == [1, 3, 20]
            # It stands past them now: a clone of its own is made.
            assert read_changes(shop, xids[0]) == {xids[0]: did[0]}
            # Before the commit it may stand, after it not.
            made.flush()
            bad = made.insert(5)
            made.flush()
            index = ArchiveIndex.open(made.repository, programs_for=shop.cluster.programs)
            shadow.hold(shop.cluster, index.transaction(bad).commit_lsn, "by hand")
            assert read_changes(shop, bad) == {bad: [("insert", None, "5")]}
            assert contents(shop) == [1, 3, 20]
            [hold] = shop_holds(shop)
            shadow.release(shop.cluster, hold)
            # Its server ends while it is read.
            later = made.insert(6)
            read = gathering.Gathering.read_before

            def killed(self: gathering.Gathering, clone: Standing, *rest: object) -> None:
                if isinstance(clone, Lent):
                    assert keeper.server is not None
                    keeper.server.kill()
                read(self, clone, *rest)  # type: ignore[arg-type]

            monkeypatch.setattr(gathering.Gathering, "read_before", killed)
            assert read_changes(shop, later) == {later: [("insert", None, "6")]}
            assert step(shop, keeper).did in ("advanced", "stood")
            assert contents(shop) == [1, 3, 5, 6, 20]
        finally:
            keeper.end()
        assert shop.servers() == []


def shop_holds(shop: Shop) -> list[str]:
    return [hold.id for hold in shadow.status(shop.cluster).holds if hold.active]


def test_after_a_promotion_it_follows_the_new_timeline(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop, keeper = Shop.of(made), Keeper()
        made.backup()
        made.insert(1)
        try:
            step(shop, keeper)
            pid = shop.postmaster
            made.insert(2)
            with spawn(
                made.repository, made.plan("latest"), purpose="failover", registry=made.registry
            ) as other:
                other.promote()
                with connect(other.dsn()) as connection:
                    connection.execute("set default_transaction_read_only = off")
                    connection.execute("insert into t values (7)")
                    connection.execute("select pg_switch_wal()")
                archive = WalArchive(made.repository)
                folder = other.data_directory / "pg_wal"
                archive.put_history(Timeline(2), (folder / "00000002.history").read_text())
                [flushed] = rows(other.dsn(), "select pg_current_wal_flush_lsn()::text")
                for path in sorted(folder.glob("00000002????????????????")):
                    segment = WalSegment.parse(path.name, archive.segment_bytes)
                    if segment.end <= Lsn.parse(flushed):
                        archive.put_segment(segment, path)
            done = shadow_steps.step(shop.cluster, made.repository, check=True, keeper=keeper)
            assert done.did == "advanced"
            assert done.record.timeline == 2
            assert contents(shop) == [1, 2, 7]
            assert shop.postmaster != pid
        finally:
            keeper.end()
