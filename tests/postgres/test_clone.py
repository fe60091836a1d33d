"""Clones of real servers stand exactly where they were asked to, and reach nothing of production."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_clones import one, protected, rows
from knockwood.clone import Clone, UnreadableError, spawn
from knockwood.errors import (
    DirectoryNotEmptyError,
    NoSpaceError,
    ObjectMissingError,
    RecoveryFailedError,
    RefusedError,
)
from knockwood.host import privileges
from knockwood.postgres.connection import connect
from knockwood.repository.backups.take import take_backup

if TYPE_CHECKING:
    from fix_server import ServerFactory


def is_paused(clone: Clone) -> bool:
    return bool(one(clone.dsn(), "select pg_is_in_recovery() and pg_get_wal_replay_pause_state() = 'paused'"))


def test_a_clone_stands_exactly_at_each_kind_of_target(
    new_server: ServerFactory, every_version: int, shared_folder: Path
) -> None:
    server = new_server(every_version, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.insert(1)
        backup = made.backup()
        end_of_backup = made.plan("latest", backup=backup.id)
        xids = {number: made.insert(number) for number in range(2, 6)}
        latest = made.plan("latest")
        # The last commits lie in a segment that is not finished: a partial one.
        assert latest.wal[-1].partial_name is not None
        with spawn(made.repository, latest, purpose="test", registry=made.registry) as clone:
            assert is_paused(clone)
            assert not clone.promoted
            assert rows(clone.dsn()) == [1, 2, 3, 4, 5]
            assert clone.plan.target_lsn is not None
            assert clone.reached_lsn > clone.plan.target_lsn
            folder, pid = clone.workspace.root, clone.server.pid
            assert pid is not None
        assert not folder.exists()
        assert made.registry.records() == []
        before = made.plan(f"before-{xids[4]}")
        with spawn(made.repository, before, purpose="test", registry=made.registry) as clone:
            assert is_paused(clone)
            assert rows(clone.dsn()) == [1, 2, 3]
            assert clone.advance(made.plan("latest")) == clone.reached_lsn
            assert is_paused(clone)
            assert rows(clone.dsn()) == [1, 2, 3, 4, 5]
            with pytest.raises(RefusedError, match="has replayed to"):
                clone.advance(before)
            clone.promote()
            with connect(clone.dsn()) as connection:
                connection.execute("set default_transaction_read_only = off")
                connection.execute("insert into t values (100)")
            with pytest.raises(RefusedError, match="promoted"):
                clone.advance(latest)
        with spawn(made.repository, end_of_backup, purpose="test", registry=made.registry) as clone:
            assert is_paused(clone)
            assert rows(clone.dsn()) == [1]


def test_a_clone_follows_a_promotion_to_the_next_timeline(
    new_server: ServerFactory, shared_folder: Path
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.insert(1)
        made.backup()
        made.insert(2)
        made.flush()
        sockets = server.socket_directory
        server.stop()
        assert sockets is not None
        sockets.mkdir()
        privileges.give(sockets, server.account)
        server.socket_directory = sockets
        (server.data_directory / "standby.signal").touch()
        server.start(until="standby")
        one(server.dsn(), "select pg_promote()::text")
        made.insert(3)
        plan = made.plan("latest")
        assert plan.timeline == 2
        with spawn(made.repository, plan, purpose="test", registry=made.registry) as clone:
            assert is_paused(clone)
            assert rows(clone.dsn()) == [1, 2, 3]


@pytest.mark.parametrize("version", [pytest.param(17, marks=pytest.mark.slow), 18])
def test_a_clone_of_an_incremental_chain_with_tablespaces(
    new_server: ServerFactory, version: int, shared_folder: Path
) -> None:
    server = new_server(version, segment_megabytes=1, summarize_wal="on")
    place = server.data_directory.parent / "space"
    place.mkdir()
    privileges.give(place, server.account)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(f"create tablespace space location '{place}'")
        made.execute("create table far (a int) tablespace space")
        made.execute("insert into far select generate_series(1, 5000)")
        made.backup()
        made.execute("insert into far select generate_series(5001, 6000)")
        made.insert(1)
        incremental = made.backup(incremental=True)
        made.execute("delete from far where a <= 10")
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
        plan = made.plan("latest", prefer_proved=False)
        with spawn(made.repository, plan, purpose="test", registry=made.registry) as clone:
            assert len(clone.plan.chain) == 2
            assert clone.plan.backup.id == incremental.id
            assert one(clone.dsn(), "select count(*) from far") == 5990
            where = Path(
                one(
                    clone.dsn(),
                    "select pg_tablespace_location(oid) from pg_tablespace where spcname = 'space'",
                )
            )
            assert clone.workspace.root in where.parents
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


@pytest.mark.parametrize("version", [17, 18])
def test_a_map_from_an_incremental_backup_calls_nothing_visible_that_is_not(
    new_server: ServerFactory, version: int, shared_folder: Path
) -> None:
    """PostgreSQL's summaries may not name a map's page that lost bits: such a map would hide the change."""
    server = new_server(version, segment_megabytes=1, summarize_wal="on", autovacuum="off")
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute("create extension pg_visibility")
        for name in ("changed", "quiet"):
            made.execute(f"create table {name} (a int primary key, b int)")
            made.execute(f"insert into {name} select i, i from generate_series(1, 20000) i")
            made.execute(f"vacuum (freeze) {name}")
        made.backup()
        made.execute("delete from changed where a % 50 = 0")
        made.execute("update changed set b = 0 where a % 70 = 1")
        made.backup(incremental=True)
        made.execute("delete from changed where a = 1")
        plan = made.plan("latest", prefer_proved=False)
        with spawn(made.repository, plan, purpose="test", registry=made.registry) as clone:
            dsn = clone.dsn()
            assert len(clone.plan.chain) == 2
            for ask in ("pg_check_visible", "pg_check_frozen"):
                assert one(dsn, f"select count(*) from {ask}('changed')") == 0
            # What nobody changed keeps its map.
            assert one(dsn, "select all_frozen from pg_visibility_map_summary('quiet')") > 0
            with connect(dsn) as connection:
                connection.execute("set enable_seqscan = off")
                connection.execute("set enable_bitmapscan = off")
                row = connection.execute("select count(a) from changed where a > 0").fetchone()
            assert row == (one(server.dsn(), "select count(*) from changed"),)


def test_wal_that_would_write_over_a_live_tablespace_is_refused(
    new_server: ServerFactory, shared_folder: Path
) -> None:
    server = new_server(18, segment_megabytes=1)
    place = server.data_directory.parent / "space"
    place.mkdir()
    privileges.give(place, server.account)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        made.execute(f"create tablespace space location '{place}'")
        made.insert(1)
        assert any(piece.makes_tablespace for piece in made.plan("latest").wal)
        with pytest.raises(RefusedError, match="created after the backup"):
            spawn(made.repository, made.plan("latest"), purpose="test", registry=made.registry)
        assert made.registry.records() == []
        assert {path.name for path in made.registry.folder.iterdir()} <= {"sweep.lock"}
        made.backup()
        made.insert(2)
        assert all(piece.makes_tablespace is False for piece in made.plan("latest").wal)
        with spawn(made.repository, made.plan("latest"), purpose="test", registry=made.registry) as clone:
            assert rows(clone.dsn()) == [1, 2]


def test_where_postgres_would_promote_in_silence_it_is_told(
    new_server: ServerFactory, every_version: int, shared_folder: Path
) -> None:
    server = new_server(every_version, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made, connect(server.dsn()) as busy:
        busy.execute("begin")
        busy.execute(
            "do $$ begin for i in 1..80 loop begin insert into t values (100000 + i);"
            " exception when others then null; end; end loop; end $$"
        )
        made.backup()
        made.insert(1)
        plan = made.plan("latest")
        with pytest.raises(UnreadableError, match="without a promotion"):
            spawn(made.repository, plan, purpose="test", registry=made.registry, unreadable="fail")
        with spawn(made.repository, plan, purpose="test", registry=made.registry) as clone:
            assert clone.promoted
            assert rows(clone.dsn()) == [1]
            with connect(clone.dsn()) as connection, pytest.raises(Exception, match="read-only"):
                connection.execute("insert into t values (2)")
            with pytest.raises(RefusedError):
                clone.advance(plan)


def test_nothing_of_production_leaks_into_a_clone(new_server: ServerFactory, shared_folder: Path) -> None:
    server = new_server(18, segment_megabytes=1, start=False)
    leak = server.data_directory.parent / "leak"
    leak.mkdir()
    privileges.give(leak, server.account)
    with (server.data_directory / "postgresql.conf").open("a") as file:
        file.write(
            f"archive_mode = on\narchive_command = 'touch {leak}/%f'\nmax_connections = 333\n"
            "max_prepared_transactions = 7\ncluster_name = 'production'\nrecovery_end_command = 'false'\n"
        )
    server.start()
    with protected(server, server.data_directory.parent / "kw") as made:
        with connect(server.dsn()) as connection:
            connection.execute("alter system set primary_conninfo = 'host=/nowhere'")
            connection.execute("alter system set listen_addresses = '127.0.0.1'")
            connection.execute("alter system set shared_preload_libraries = 'nowhere'")
            connection.execute("select pg_create_physical_replication_slot('standby', true)")
            connection.execute("create role root superuser login")
            connection.execute("alter role root set session_preload_libraries = 'nowhere'")
        hba = server.data_directory / "pg_hba.conf"
        trusting = hba.read_text()
        hba.write_text("local all all reject\n")
        made.backup()
        hba.write_text(trusting)
        made.insert(1)
        archived = set(leak.iterdir())
        with spawn(made.repository, made.plan("latest"), purpose="Prüfung", registry=made.registry) as clone:
            shown = {
                name: one(clone.dsn(), f"select current_setting('{name}')")
                for name in (
                    "listen_addresses", "archive_mode", "archive_command", "primary_conninfo", "cluster_name",
                    "max_connections", "max_prepared_transactions", "shared_preload_libraries", "autovacuum",
                    "recovery_end_command", "event_triggers", "config_file",
                )
            }  # fmt: skip
            assert shown == {
                "listen_addresses": "",
                "archive_mode": "off",
                "archive_command": "(disabled)",
                "primary_conninfo": "",
                "cluster_name": "knockwood Pr?fung",
                "max_connections": "333",
                "max_prepared_transactions": "7",
                "shared_preload_libraries": "",
                "autovacuum": "off",
                "recovery_end_command": "",
                "event_triggers": "off",
                "config_file": str(clone.workspace.config),
            }
            assert rows(clone.dsn(), "select slot_name::text from pg_replication_slots") == []
            clone.promote()
            with connect(clone.dsn()) as connection:
                connection.execute("set default_transaction_read_only = off")
                connection.execute("insert into t values (2)")
                connection.execute("select pg_switch_wal()")
                connection.execute("checkpoint")
        new = {path.name for path in set(leak.iterdir()) - archived}
        assert not [name for name in new if not name.startswith("00000001")]


def test_wal_that_needs_higher_settings_than_the_backup_had(
    new_server: ServerFactory, shared_folder: Path
) -> None:
    server = new_server(18, segment_megabytes=1, max_connections="20")
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        made.insert(1)
        made.flush()
        sockets = server.socket_directory
        server.stop()
        server.settings["max_connections"] = "60"
        assert sockets is not None
        sockets.mkdir()
        privileges.give(sockets, server.account)
        server.socket_directory = sockets
        server.start()
        made.insert(2)
        with spawn(made.repository, made.plan("latest"), purpose="test", registry=made.registry) as clone:
            assert is_paused(clone)
            assert rows(clone.dsn()) == [1, 2]
            assert one(clone.dsn(), "select current_setting('max_connections')") == "60"


def test_the_superuser_may_have_any_name(new_server: ServerFactory, shared_folder: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute('create role "Chief" superuser login replication')
        with connect(server.dsn("template1", "Chief")) as connection:
            connection.execute("alter role postgres rename to boss")
            connection.execute("alter role boss nologin")
        made.server.settings["x.y"] = ""
        backup_dsn = server.dsn(user="Chief")
        made.receiver.dsn = backup_dsn
        take_backup(made.repository, backup_dsn)
        with spawn(made.repository, made.plan("latest"), purpose="test", registry=made.registry) as clone:
            assert rows(clone.dsn(), "select current_user::text") == ["Chief"]


def test_wal_missing_from_the_spool_is_an_error_and_not_an_end(
    new_server: ServerFactory, shared_folder: Path
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        for number in range(4):
            made.insert(number)
            made.execute("select pg_switch_wal()")
        plan = made.plan("latest")
        lost = plan.wal[-2].segment
        (path,) = (made.folder / "repository").glob(f"wal/*/*/{lost.name}.zst")
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ObjectMissingError, match="archive"):
            spawn(made.repository, plan, purpose="test", registry=made.registry)
        path.write_bytes(content)
        assert made.registry.records() == []
        # And if it vanishes from the spool after that, recovery says so and does not promote.
        with spawn(made.repository, made.plan("latest"), purpose="test", registry=made.registry) as clone:
            late = clone.plan
            clone.stop()
            assert late.target_lsn is not None
        short = replace(late, wal=late.wal[:-2])
        with pytest.raises(RecoveryFailedError, match="the WAL ends before after the record at"):
            spawn(made.repository, short, purpose="test", registry=made.registry)
        assert {path.name for path in made.registry.folder.iterdir()} <= {"sweep.lock"}


def test_damaged_wal_is_told_as_damage(new_server: ServerFactory, shared_folder: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        for number in range(3):
            made.insert(number)
            made.execute("select pg_switch_wal()")
        clone = spawn(made.repository, made.plan("latest"), purpose="test", registry=made.registry)
        with clone:
            goal = clone.plan
            clone.stop()
            segment = clone.spool.folder / goal.wal[-1].segment.name
            data = bytearray(segment.read_bytes())
            assert goal.target_lsn is not None
            data[goal.target_lsn.value % len(data) + 24] ^= 0xFF
            segment.write_bytes(data)
            with pytest.raises(RecoveryFailedError, match=r"the WAL ends before .*data checksum"):
                clone.replay()


def test_a_folder_in_use_and_a_full_disk_are_refused_before_anything_is_written(
    new_server: ServerFactory, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        plan = made.plan("latest")
        mine = made.folder / "mine"
        mine.mkdir()
        (mine / "file").write_text("precious")
        with pytest.raises(DirectoryNotEmptyError):
            spawn(made.repository, plan, into=mine, purpose="test", registry=made.registry)
        assert (mine / "file").read_text() == "precious"
        huge = replace(plan, chain=(replace(plan.backup, raw_bytes=1 << 60),))
        with pytest.raises(NoSpaceError):
            spawn(made.repository, huge, into=made.folder / "new", purpose="test", registry=made.registry)
        assert not (made.folder / "new").exists()
        closed = made.folder / "closed"
        closed.mkdir(0o700)
        if privileges.is_root():
            with pytest.raises(RefusedError, match="cannot enter"):
                spawn(made.repository, plan, into=closed / "c", purpose="test", registry=made.registry)
            assert list(closed.iterdir()) == []
        kept = made.folder / "kept"
        with spawn(made.repository, plan, into=kept, purpose="test", registry=made.registry, keep=True):
            pass
        assert (kept / "data" / "PG_VERSION").exists()
        assert made.registry.sweep() == []
        assert kept.exists()
