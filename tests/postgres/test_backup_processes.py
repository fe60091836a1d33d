"""Full backups copied from the server's files by several processes: as good as the server's own stream."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyrage
import pytest

from fix_archive import Archived
from fix_backup import KEEP_WAL, archiving, backed_up, repository_of, restored
from knockwood.errors import BackupIncompleteError, RefusedError, WrongSystemError
from knockwood.host import privileges, processes
from knockwood.model import Verdict
from knockwood.operations import protect
from knockwood.operations.cluster import Cluster
from knockwood.postgres.connection import connect
from knockwood.postgres.server import LocalServer
from knockwood.repository.backups.listing import list_backups, read_index, read_object, relation_map
from knockwood.repository.backups.model import Backup, chain
from knockwood.repository.backups.partial import fetch_relations
from knockwood.repository.backups.take import Effort, take_backup, why_not
from knockwood.settings import ClusterSettings
from knockwood.settings.schema import BackupSettings

if TYPE_CHECKING:
    from fix_server import ServerFactory

MATRIX = [18, pytest.param(17, marks=pytest.mark.slow), pytest.param(15, marks=pytest.mark.slow)]
ROWS = "select count(*), sum(a), sum(length(b)) from t"


@pytest.fixture
def folder(shared_folder: Path, request: pytest.FixtureRequest) -> Path:
    """An empty folder that the servers' account may enter."""
    path = shared_folder / f"files-{abs(hash(request.node.nodeid)):x}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    privileges.give(path, privileges.server_account())
    return path


@pytest.fixture
def protected(new_server: ServerFactory, folder: Path) -> Callable[..., Archived]:
    """Make a server with a table `t` and an empty repository for it."""

    def make(major: int = 18, keys: dict[str, tuple[str, ...]] | None = None, **settings: str) -> Archived:
        server = new_server(major, segment_megabytes=1, **{**KEEP_WAL, **settings})
        query(server, "create table t as select a, repeat('x', 300) as b from generate_series(1, 20000) a")
        query(server, "create index t_a on t (a)")
        query(server, "checkpoint")
        return repository_of(server, folder / "repository", **(keys or {}))

    return make


def query(server: LocalServer, sql: str) -> list[tuple[object, ...]]:
    with connect(server.dsn()) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchall() if cursor.description else []


def path_of(server: LocalServer, name: str) -> str:
    return str(query(server, f"select pg_relation_filepath('{name}')")[0][0])


def copied(made: Archived, count: int = 2) -> Backup:
    return backed_up(made, processes=count, data_directory=made.server.data_directory)


def manifest_of(made: Archived, backup: Backup) -> str:
    return b"".join(read_object(made.repository, backup.manifest)).decode()


def verified_by_postgresql(made: Archived, *, but_maps: bool = False) -> Callable[[Path], None]:
    """PostgreSQL's own check of the files; `but_maps` leaves out visibility maps, which may have been emptied."""

    def check(into: Path) -> None:
        program = made.server.programs.path("pg_verifybackup")
        maps = [path.relative_to(into) for path in into.rglob("*_vm") if but_maps]
        ignored = [f"--ignore={path}" for path in maps]
        done = processes.run([program, "--no-parse-wal", *ignored, into], account=made.server.account)
        assert "successfully verified" in done.out

    return check


@contextmanager
def writing(server: LocalServer, writers: int = 2) -> Iterator[None]:
    """Clients that change `t`, and keep adding to `pair_a` and `pair_b` together, while the block runs."""
    query(server, "create table pair_a (n bigserial, w int); create table pair_b (n bigserial, w int)")
    loop = (
        "do $$ begin loop insert into pair_a (w) values ({w}); insert into pair_b (w) values ({w});"
        " update t set b = repeat(md5(random()::text), 9) where a % 50 = {w}; commit; end loop; end $$"
    )
    psql = server.programs.path("psql")
    children = [
        processes.start([psql, "-q", server.dsn(), "-c", loop.format(w=number)]) for number in range(writers)
    ]
    try:
        yield
    finally:
        for child in children:
            processes.stop(child)


@pytest.mark.parametrize("major", MATRIX)
def test_a_backup_copied_under_writers_restores_with_equal_rows(
    protected: Callable[..., Archived], folder: Path, major: int
) -> None:
    made = protected(major, shared_buffers="1MB", max_wal_size="200MB")
    query(made.server, "create unlogged table u as select generate_series(1, 1000) as a")
    # What PostgreSQL leaves in a data directory and no backup wants.
    for stray in ("base/pgsql_tmp/pgsql_tmp1.0", "backup_label", "pg_replslot/gone/state"):
        path = made.server.data_directory / stray
        path.parent.mkdir(exist_ok=True)
        path.write_text("not this")
    (made.server.data_directory / path_of(made.server, "t")).with_name("t9_99999").write_text("temporary")
    with writing(made.server):
        backup = copied(made)
    assert (backup.health.verdict, backup.health.bad_pages) == (Verdict.HELD, ())
    assert list_backups(made.repository) == [backup]
    unlogged = path_of(made.server, "u")
    held = read_index(made.repository, backup).members
    assert unlogged not in held
    assert f"{unlogged}_init" in held
    assert not [
        path for path in held if re.search(r"pgsql_tmp|t9_99999|postmaster|pg_replslot/|pg_internal", path)
    ]
    assert len({member.pack for member in held.values()}) >= 3  # both workers' and the parent's
    (made.server.data_directory / "backup_label").unlink()
    with restored(
        made.repository, [backup], folder / "a", made.server.programs,
        before_start=verified_by_postgresql(made),
    ) as server:  # fmt: skip
        assert query(server, "select count(*), sum(a) from t") == [(20000, 20000 * 20001 // 2)]
        assert query(server, "select (select count(*) from pair_a) = (select count(*) from pair_b)") == [
            (True,)
        ]
        assert query(server, "select count(*) from u") == [(0,)]
        query(server, "create extension amcheck")
        query(server, "select bt_index_check('t_a', true)")


@pytest.mark.parametrize("major", MATRIX)
def test_the_same_files_are_kept_as_in_the_servers_own_stream(
    protected: Callable[..., Archived], folder: Path, major: int
) -> None:
    made = protected(major)
    live = folder / "space"
    live.mkdir()
    privileges.give(live, made.server.account)
    query(made.server, f"create tablespace fast location '{live}'")
    query(made.server, "create table s tablespace fast as select generate_series(1, 5000) as a")
    query(made.server, "create unlogged table u (a int)")
    streamed = backed_up(made)
    mine = copied(made)
    assert mine.tablespaces == streamed.tablespaces
    assert (mine.timeline, mine.settings, mine.checksums) == (
        streamed.timeline, streamed.settings, streamed.checksums,
    )  # fmt: skip
    theirs = {(m.path, m.kind) for m in read_index(made.repository, streamed).members.values()}
    ours = {(m.path, m.kind) for m in read_index(made.repository, mine).members.values()}
    assert ours == theirs

    def shape(text: str) -> str:
        text = re.sub(r'"Files": \[.*?\n\]', "FILES", text, flags=re.DOTALL)
        return re.sub(r"[0-9A-F]+/[0-9A-F]+|[0-9a-f]{64}", "X", text)

    first, second = manifest_of(made, streamed), manifest_of(made, mine)
    assert shape(first) == shape(second)
    keys = [{(e["Path"], tuple(sorted(e))) for e in json.loads(text)["Files"]} for text in (first, second)]
    assert keys[0] == keys[1]
    with restored(
        made.repository, [mine], folder / "a", made.server.programs, tablespace_root=folder / "spaces"
    ) as server:
        assert query(server, "select sum(a) from s") == [(5000 * 5001 // 2,)]


@pytest.mark.parametrize("major", [18, pytest.param(17, marks=pytest.mark.slow)])
def test_an_incremental_backup_builds_on_copied_files(
    protected: Callable[..., Archived], folder: Path, major: int
) -> None:
    made = protected(major, summarize_wal="on")
    full = copied(made)
    query(made.server, "update t set b = 'changed' where a <= 100")
    second = backed_up(made, incremental=True, processes=2)
    before = query(made.server, ROWS)
    assert (second.kind, second.parent) == ("incremental", full.id)
    assert second.raw_bytes < full.raw_bytes / 2
    links = chain(list_backups(made.repository), second.id)
    verified = verified_by_postgresql(made, but_maps=True)
    programs = made.server.programs
    with restored(made.repository, links, folder / "a", programs, before_start=verified) as server:
        assert query(server, ROWS) == before


def damage(server: LocalServer, path: str, block: int, offset: int = 5000) -> None:
    with (server.data_directory / path).open("r+b") as file:
        file.seek(block * 8192 + offset)
        byte = file.read(1)
        file.seek(block * 8192 + offset)
        file.write(bytes([byte[0] ^ 0x10]))


def test_damage_is_listed_exactly_and_parts_are_fetched_decrypted(
    protected: Callable[..., Archived], folder: Path
) -> None:
    key = pyrage.x25519.Identity.generate()
    made = protected(18, {"recipients": (str(key.to_public()),), "identities": (str(key),)})
    table, index = path_of(made.server, "t"), path_of(made.server, "t_a")
    blocks = [1, 2, 3, 77, 400, 700]
    for block in blocks:
        damage(made.server, table, block)
    damage(made.server, index, 5, offset=9)  # the checksum field itself
    backup = copied(made)
    assert backup.encrypted
    assert all(pack.name.endswith(".age") for pack in backup.packs)
    assert backup.health.verdict == Verdict.BROKEN
    expected = {(table, block) for block in blocks} | {(index, 5)}
    assert {(page.file, page.block) for page in backup.health.bad_pages} == expected
    assert backup.health.bad_page_count == 7
    relation = relation_map(made.repository, backup).find("postgres", "public", "t_a")
    assert relation is not None
    fetch_relations(made.repository, backup, [relation.path], folder / "part")
    live = made.server.data_directory / relation.path
    assert (folder / "part" / relation.path).read_bytes() == live.read_bytes()


def test_files_that_come_go_grow_and_shrink_meanwhile_are_no_error(
    protected: Callable[..., Archived], folder: Path
) -> None:
    made = protected(18, shared_buffers="1MB", autovacuum="off")
    query(made.server, "create table steady as select generate_series(1, 50000) as a")
    ended = threading.Event()

    def churn() -> None:
        with connect(made.server.dsn()) as connection:
            while not ended.is_set():
                for number in range(20):
                    connection.execute(f"create table c{number} as select generate_series(1, 3000) as a")
                connection.execute("checkpoint")
                connection.execute("create database other template template0 strategy file_copy")
                for number in range(20):
                    connection.execute(f"truncate c{number}")
                    connection.execute(f"drop table c{number}")
                connection.execute("drop database other")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        backup = copied(made, 3)
    finally:
        ended.set()
        thread.join()
    assert backup.health.verdict == Verdict.HELD
    with restored(
        made.repository, [backup], folder / "a", made.server.programs,
        before_start=verified_by_postgresql(made),
    ) as server:  # fmt: skip
        assert query(server, "select count(*), sum(a) from steady") == [(50000, 50000 * 50001 // 2)]


def test_files_of_another_server_are_refused_and_nothing_is_left(
    protected: Callable[..., Archived], folder: Path, new_server: ServerFactory
) -> None:
    made = protected()
    query(made.server, "checkpoint")
    # A copy that runs beside it has the same identifier and timeline, and is in production too.
    copy = folder / "copy"
    shutil.copytree(made.server.data_directory, copy, symlinks=True)
    privileges.give_tree(copy, made.server.account)
    assert why_not(made.server.dsn(), made.server.data_directory) is None
    for other in (copy, new_server(18).data_directory):
        effort = Effort(processes=1, data_directory=other, wal_timeout=5)
        with archiving(made), pytest.raises(WrongSystemError, match="data directory is not that"):
            take_backup(made.repository, made.server.dsn(), effort=effort)
    assert "cannot be read" in (why_not(made.server.dsn(), folder / "none") or "")
    assert list(made.repository.storage.list("backups/")) == []


def test_the_role_needs_the_right_to_begin_a_backup(protected: Callable[..., Archived]) -> None:
    made = protected()
    query(made.server, "create role modest login replication; grant pg_monitor to modest")
    dsn = made.server.dsn(user="modest")
    assert why_not(dsn, made.server.data_directory) == "the role may not call pg_backup_start"
    query(
        made.server,
        "grant execute on function pg_backup_start(text, boolean), pg_backup_stop(boolean) to modest",
    )
    assert why_not(dsn, made.server.data_directory) is None
    with archiving(made):
        effort = Effort(processes=1, wal_timeout=30)  # the server says where its files are
        assert take_backup(made.repository, dsn, effort=effort).health.verdict == Verdict.HELD


def test_a_link_among_the_data_and_a_lost_server_end_the_backup(protected: Callable[..., Archived]) -> None:
    made = protected()
    link = made.server.data_directory / "base" / "4711"
    link.symlink_to("/nonexistent")
    with pytest.raises(RefusedError, match="symbolic link"):
        copied(made)
    link.unlink()

    def kill_sessions(_: object) -> None:
        query(
            made.server,
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'knockwood backup'",
        )

    effort = Effort(processes=1, data_directory=made.server.data_directory, wal_timeout=5)
    with archiving(made), pytest.raises(Exception, match=r"terminat|closed|lost"):
        take_backup(made.repository, made.server.dsn(), effort=effort, progress=kill_sessions)
    with pytest.raises(BackupIncompleteError, match="lacks the WAL"):
        take_backup(
            made.repository,
            made.server.dsn(),
            effort=Effort(processes=2, data_directory=made.server.data_directory, wal_timeout=0.2),
        )
    assert list(made.repository.storage.list("backups/")) == []
    assert os.listdir(made.server.data_directory / "pg_wal")


def test_two_workers_copy_where_the_files_can_be_read(
    protected: Callable[..., Archived], folder: Path
) -> None:
    made = protected()

    def manifest_algorithm(workers: int, data_directory: Path | None) -> str:
        settings = ClusterSettings(
            dsn=made.server.dsn(),
            repository=str(made.root),
            data_directory=data_directory,
            programs=made.server.programs.folder,
            backup=BackupSettings(workers=workers),
        )
        cluster = Cluster("shop", settings, folder / "state")
        backup = protect.take(cluster, made.repository, wal_timeout=60)
        (found,) = set(re.findall(r'"Checksum-Algorithm": "(\w+)"', manifest_of(made, backup)))
        return str(found)

    copied_by_processes, streamed = "SHA256", "CRC32C"
    assert manifest_algorithm(3, made.server.data_directory) == copied_by_processes
    assert manifest_algorithm(2, made.server.data_directory) == copied_by_processes
    assert manifest_algorithm(1, made.server.data_directory) == streamed
    assert manifest_algorithm(3, None) == streamed
    assert manifest_algorithm(3, folder) == streamed
