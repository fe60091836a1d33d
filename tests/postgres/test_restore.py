"""Restores of whole clusters: complete and startable, or nothing that could be taken for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_clones import Protected, one, protected, rows
from knockwood.clone.spool import Spool
from knockwood.errors import (
    DirectoryNotEmptyError,
    LockHeldError,
    PostgresError,
    RefusedError,
    TargetUnreachableError,
)
from knockwood.host import privileges
from knockwood.model import Lsn, Timeline
from knockwood.operations import half_done
from knockwood.operations.half_done import WORK
from knockwood.operations.restore import SPOOL, restore
from knockwood.postgres.connection import connect
from knockwood.postgres.server import LocalServer
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository
from knockwood.repository.targets import BeforeXid, Latest, ToLsn, resolve
from knockwood.repository.walk import Kept

if TYPE_CHECKING:
    from fix_server import ServerFactory


def started(made: Protected, folder: Path, **settings: str) -> LocalServer:
    """The restored cluster, started as its user would: with its own configuration."""
    options = {"fsync": "off", **settings}
    server = LocalServer(made.server.programs, folder, account=made.server.account, settings=options)
    server.start()
    return server


def test_a_restored_cluster_starts_with_its_own_configuration_and_archives_nowhere(
    new_server: ServerFactory, every_version: int, shared_folder: Path
) -> None:
    server = new_server(every_version, segment_megabytes=1, start=False)
    leak = server.data_directory.parent / "leak"
    leak.mkdir()
    privileges.give(leak, server.account)
    with (server.data_directory / "postgresql.conf").open("a") as file:
        file.write(f"archive_mode = on\narchive_command = 'cp %p {leak}/%f'\nwork_mem = '7MB'\n")
    server.start()
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute("alter system set maintenance_work_mem = '99MB'")
        made.insert(1)
        made.backup()
        xids = {number: made.insert(number) for number in range(2, 5)}
        made.flush()
        into = made.folder / "restored"
        outcome = restore(made.repository, BeforeXid(xids[4]), into)
        assert outcome.last_commit is not None
        assert outcome.last_commit.xid == xids[3]
        assert outcome.plan.target_lsn is not None
        assert outcome.reached_lsn <= outcome.plan.target_lsn
        assert outcome.timeline == 2
        assert str(into) in outcome.how_to_start[0]
        assert not (into / WORK).exists()
        assert {path.name[:8] for path in (into / "pg_wal").iterdir() if len(path.name) == 24} == {"00000002"}
        restored = started(made, into)
        try:
            assert rows(restored.dsn()) == [1, 2, 3]
            assert one(restored.dsn(), "select current_setting('archive_mode')") == "off"
            assert one(restored.dsn(), "select current_setting('work_mem')") == "7MB"
            assert one(restored.dsn(), "select current_setting('maintenance_work_mem')") == "99MB"
            assert not one(restored.dsn(), "select pg_is_in_recovery()")
            with connect(restored.dsn()) as connection:
                connection.execute("insert into t values (4), (5)")
        finally:
            restored.stop()
        assert not [path.name for path in leak.iterdir() if path.name.startswith("00000002")]
        with pytest.raises(DirectoryNotEmptyError):
            restore(made.repository, Latest(), into, again=True)
        assert (into / "PG_VERSION").exists()


def test_a_restore_that_is_not_promoted_waits_at_its_target(
    new_server: ServerFactory, shared_folder: Path
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        made.insert(1)
        made.flush()
        into = made.folder / "restored"
        outcome = restore(made.repository, Latest(), into, promote=False)
        assert not outcome.promoted
        waiting = LocalServer(
            server.programs, into, account=server.account, settings={"max_wal_senders": "10"}
        )
        waiting.start(until="standby")
        try:
            assert rows(waiting.dsn()) == [1]
            assert one(waiting.dsn(), "select pg_is_in_recovery()")
            (into / SPOOL / "promote").touch()
            one(waiting.dsn(), "select pg_promote()")
            with connect(waiting.dsn()) as connection:
                connection.execute("insert into t values (2)")
        finally:
            waiting.stop()


def test_a_restore_with_tablespaces_and_without_configuration_files(
    new_server: ServerFactory, shared_folder: Path
) -> None:
    server = new_server(18, segment_megabytes=1)
    place = server.data_directory.parent / "space"
    place.mkdir()
    privileges.give(place, server.account)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(f"create tablespace space location '{place}'")
        made.execute("create table far tablespace space as select generate_series(1, 100) a")
        for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
            (server.data_directory / name).rename(server.data_directory.parent / name)
        made.backup()
        made.insert(1)
        made.flush()
        into = made.folder / "restored"
        outcome = restore(made.repository, Latest(), into)
        assert any("postgresql.conf" in warning for warning in outcome.warnings)
        hba = into / "pg_hba.conf"
        assert "peer" in hba.read_text()
        hba.write_text("local all all trust\n")
        restored = started(made, into)
        try:
            assert one(restored.dsn(), "select count(*) from far") == 100
            where = one(
                restored.dsn(),
                "select pg_tablespace_location(oid) from pg_tablespace where spcname = 'space'",
            )
            assert (made.folder / "restored-tablespaces").resolve() in Path(where).parents
        finally:
            restored.stop()


def test_a_restore_never_chooses_a_timeline_that_the_archive_knows(
    new_server: ServerFactory, shared_folder: Path
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        made.insert(1)
        made.flush()
        position = one(server.dsn(), "select pg_current_wal_flush_lsn()::text")
        WalArchive(made.repository).put_history(Timeline(2), f"1\t{position}\tno recovery target specified\n")
        xid = made.insert(2)
        made.flush()
        outcome = restore(made.repository, Latest(), made.folder / "restored", timeline=Timeline(1))
        assert outcome.last_commit is not None
        assert outcome.last_commit.xid == xid
        assert outcome.plan.timeline == 1
        assert outcome.timeline == 3


def test_what_cannot_be_restored_leaves_nothing(new_server: ServerFactory, shared_folder: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        for number in range(3):
            made.insert(number)
            made.execute("select pg_switch_wal()")
        made.flush()
        into = made.folder / "restored"
        with pytest.raises(RefusedError, match="inside the data directory"):
            restore(made.repository, Latest(), server.data_directory / "new")
        with pytest.raises(TargetUnreachableError):
            restore(made.repository, ToLsn(Lsn.parse("FF/0")), into)
        mine = made.folder / "mine"
        mine.mkdir()
        (mine / "file").touch()
        with pytest.raises(DirectoryNotEmptyError, match="never writes over"):
            restore(made.repository, Latest(), mine, again=True)
        broken = next((made.folder / "repository").glob("backups/*/*.tar.zst"), None) or max(
            (made.folder / "repository" / "backups").rglob("*.zst"), key=lambda path: path.stat().st_size
        )
        data = bytearray(broken.read_bytes())
        data[len(data) // 2] ^= 0xFF
        broken.write_bytes(data)
        with pytest.raises(Exception, match=r"\w"):
            restore(made.repository, Latest(), into)
        assert not into.exists()


@pytest.mark.parametrize("room", [1 << 30, 3 << 20, 0])
def test_wal_that_was_read_to_find_the_target_is_not_fetched_again(
    new_server: ServerFactory, shared_folder: Path, room: int
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        for number in range(3):
            made.execute(f"insert into t select g from generate_series({number}00000, {number}09999) g")
        made.flush()
        repository = Repository.open(made.repository.storage)
        folder = made.folder / "kept"
        folder.mkdir()
        kept = Kept(folder, room)
        plan = resolve(repository, Latest(), keep=kept)
        assert plan.wal[-1].partial_name is not None
        assert sum(path.stat().st_size for path in folder.iterdir()) == len(kept.sources) << 20 <= room
        spool, other = (Spool(made.folder / name, server.account) for name in ("spool", "other"))
        for one_of_them in (spool, other):
            one_of_them.folder.mkdir()
        spool.adopt(kept, plan.wal)
        assert not folder.exists()
        missing = {piece.segment.name for piece in spool.missing(plan.wal)}
        assert missing == {piece.segment.name for piece in plan.wal} - kept.sources.keys()
        assert not missing or room < 1 << 30
        for one_of_them in (spool, other):
            arrived = list(one_of_them.arriving(WalArchive(repository), plan.wal))
            assert arrived == [piece.segment for piece in plan.wal]
        for path in other.folder.iterdir():
            assert (spool.folder / path.name).read_bytes() == path.read_bytes()
            assert (spool.folder / path.name).stat().st_uid == path.stat().st_uid
            assert (spool.folder / path.name).stat().st_mode == path.stat().st_mode


def test_a_half_done_restore_says_what_it_is_and_again_starts_over(
    new_server: ServerFactory, shared_folder: Path
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        made.insert(1)
        made.flush()
        into = made.folder / "restored"
        work = half_done.begin(into, "latest", account=server.account, sockets=made.folder / "kw-x")
        marker = work / "restore.json"
        with pytest.raises(LockHeldError, match="is at work here"):
            restore(made.repository, Latest(), into)
        marker.write_text(marker.read_text().replace('"pid": ', '"pid": 9999'))
        with pytest.raises(DirectoryNotEmptyError, match="is not complete") as caught:
            restore(made.repository, Latest(), into)
        assert caught.value.hint is not None
        assert "--again" in caught.value.hint
        with pytest.raises(PostgresError):
            started(made, into)
        restore(made.repository, Latest(), into, again=True)
        restored = started(made, into)
        try:
            assert rows(restored.dsn()) == [1]
        finally:
            restored.stop()
