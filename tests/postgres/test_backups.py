"""Base backups of real servers: taken, restored, started; damage in the cluster and in the repository."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyrage
import pytest

from fix_archive import Archived
from fix_backup import KEEP_WAL, archiving, backed_up, repository_of, restored
from knockwood.errors import (
    BackupIncompleteError,
    DirectoryNotEmptyError,
    LockHeldError,
    ObjectDamagedError,
    ObjectMissingError,
    PostgresError,
    RefusedError,
    UnsupportedVersionError,
    WrongKeyError,
    WrongSystemError,
)
from knockwood.host import privileges, processes
from knockwood.model import Verdict
from knockwood.postgres.connection import connect
from knockwood.postgres.server import LocalServer
from knockwood.repository.backups.fetch import fetch_chain
from knockwood.repository.backups.listing import list_backups, read_index, relation_map
from knockwood.repository.backups.model import Backup, chain
from knockwood.repository.backups.partial import fetch_members, fetch_relations, read_block
from knockwood.repository.backups.take import Effort, take_backup
from knockwood.repository.leases import lease
from knockwood.repository.repository import Repository
from knockwood.repository.storage.local import LocalStorage

if TYPE_CHECKING:
    from fix_server import ServerFactory

ROWS = "select count(*), sum(a), sum(length(b)) from t"


@pytest.fixture
def folder(shared_folder: Path, request: pytest.FixtureRequest) -> Path:
    """An empty folder that the servers' account may enter."""
    path = shared_folder / f"backups-{abs(hash(request.node.nodeid)):x}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    privileges.give(path, privileges.server_account())
    return path


@pytest.fixture
def protected(new_server: ServerFactory, folder: Path) -> Callable[..., Archived]:
    """Make a server with a table `t` and an empty repository for it."""

    def make(major: int = 18, keys: dict[str, tuple[str, ...]] | None = None, **settings: str) -> Archived:
        server = new_server(major, segment_megabytes=1, **KEEP_WAL, **settings)
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


def test_a_full_backup_restores_to_a_cluster_that_starts_with_its_rows(
    protected: Callable[..., Archived], every_version: int, folder: Path
) -> None:
    made = protected(every_version)
    before = query(made.server, ROWS)
    backup = backed_up(made)
    assert list_backups(made.repository) == [backup]
    assert backup.health.verdict == Verdict.HELD
    assert backup.major == every_version
    assert int(backup.settings["max_wal_senders"]) == 10
    assert backup.raw_bytes > backup.stored_bytes > 0
    query(made.server, "drop table t")
    into = folder / "restored"

    def postgresqls_own_verifier_accepts(into: Path) -> None:
        program = made.server.programs.path("pg_verifybackup")
        done = processes.run([program, "--no-parse-wal", into], account=made.server.account)
        assert "successfully verified" in done.out

    with restored(
        made.repository,
        [backup],
        into,
        made.server.programs,
        before_start=postgresqls_own_verifier_accepts,
    ) as server:
        assert query(server, ROWS) == before
    assert into.stat().st_mode & 0o777 == 0o700
    assert (into / "global" / "pg_control").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("major", [17, 18])
def test_incremental_backups_restore_as_a_chain(
    protected: Callable[..., Archived], folder: Path, major: int
) -> None:
    made = protected(major, summarize_wal="on")
    full = backed_up(made)
    query(made.server, "update t set b = 'changed' where a <= 100")
    query(made.server, "create table later as select 1 as one")
    first = backed_up(made, incremental=True)
    query(made.server, "delete from t where a > 15000")
    query(made.server, "vacuum t")
    second = backed_up(made, incremental=True)
    before = query(made.server, ROWS)
    assert (first.kind, first.parent, second.parent) == ("incremental", full.id, first.id)
    assert second.health.verdict == Verdict.HELD
    assert second.raw_bytes < full.raw_bytes / 2
    links = chain(list_backups(made.repository), second.id)
    assert [link.id for link in links] == [full.id, first.id, second.id]
    into = folder / "restored"
    with restored(made.repository, links, into, made.server.programs) as server:
        assert query(server, ROWS) == before
        assert query(server, "select one from later") == [(1,)]
        server.stop()
        processes.run([server.programs.path("pg_checksums"), "-D", into], account=server.account)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_an_incremental_backup_needs_a_server_that_summarizes_wal(
    protected: Callable[..., Archived],
) -> None:
    made = protected(18)
    backed_up(made)
    with pytest.raises(PostgresError) as caught:
        backed_up(made, incremental=True)
    assert "summarize_wal" in (caught.value.hint or "")
    assert len(list_backups(made.repository)) == 1


def test_an_incremental_backup_is_refused_where_there_is_none_to_build_on(
    protected: Callable[..., Archived],
) -> None:
    made = protected(18, summarize_wal="on")
    with pytest.raises(RefusedError, match="to build on"):
        take_backup(made.repository, made.server.dsn(), incremental=True)


def test_an_incremental_backup_is_refused_before_17(protected: Callable[..., Archived]) -> None:
    made = protected(15)
    with pytest.raises(UnsupportedVersionError):
        take_backup(made.repository, made.server.dsn(), incremental=True)


def test_tablespaces_are_restored_elsewhere_and_never_over_the_live_ones(
    protected: Callable[..., Archived], every_version: int, folder: Path
) -> None:
    made = protected(every_version)
    live = folder / "space"
    live.mkdir()
    privileges.give(live, made.server.account)
    query(made.server, f"create tablespace fast location '{live}'")
    query(made.server, "create table s tablespace fast as select generate_series(1, 5000) as a")
    backup = backed_up(made)
    assert [space.location for space in backup.tablespaces] == [str(live)]
    assert backup.health.verdict == Verdict.HELD
    oid = backup.tablespaces[0].oid
    with pytest.raises(RefusedError, match="has a tablespace"):
        fetch_chain(made.repository, [backup], folder / "a", account=None, programs=made.server.programs)
    with pytest.raises(RefusedError, match="where the server has it"):
        fetch_chain(
            made.repository,
            [backup],
            folder / "a",
            account=None,
            programs=made.server.programs,
            tablespaces={oid: live},
        )
    with restored(
        made.repository, [backup], folder / "a", made.server.programs, tablespace_root=folder / "spaces"
    ) as server:
        assert query(server, "select sum(a) from s") == [(5000 * 5001 // 2,)]
        found = query(server, f"select pg_tablespace_location({oid})")
        assert found == [(str(folder / "spaces" / str(oid)),)]


@pytest.mark.parametrize("major", [17, 18])
def test_a_chain_with_a_tablespace_is_restored_elsewhere(
    protected: Callable[..., Archived], folder: Path, major: int
) -> None:
    made = protected(major, summarize_wal="on")
    live = folder / "space"
    live.mkdir()
    privileges.give(live, made.server.account)
    query(made.server, f"create tablespace fast location '{live}'")
    query(made.server, "create table s tablespace fast as select generate_series(1, 5000) as a")
    backed_up(made)
    query(made.server, "insert into s values (0)")
    second = backed_up(made, incremental=True)
    links = chain(list_backups(made.repository), second.id)
    with restored(
        made.repository, links, folder / "a", made.server.programs, tablespace_root=folder / "spaces"
    ) as server:
        assert query(server, "select count(*) from s") == [(5001,)]
        oid = str(second.tablespaces[0].oid)
        assert query(server, f"select pg_tablespace_location({oid})") == [(str(folder / "spaces" / oid),)]


@pytest.fixture
def keys() -> dict[str, tuple[str, ...]]:
    first, second = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    return {
        "recipients": (str(first.to_public()), str(second.to_public())),
        "identities": (str(second),),
    }


def test_an_encrypted_backup_opens_with_any_of_its_keys_and_no_other(
    protected: Callable[..., Archived], folder: Path, keys: dict[str, tuple[str, ...]]
) -> None:
    made = protected(18, keys)
    backup = backed_up(made)
    assert backup.encrypted
    assert all(pack.name.endswith(".zst.age") for pack in (*backup.packs, backup.relations))
    for path in made.root.glob("backups/*/pack*"):
        assert b"xxxxxxxxxxxxxxxx" not in path.read_bytes()
    with restored(made.repository, [backup], folder / "a", made.server.programs) as server:
        assert query(server, "select count(*) from t") == [(20000,)]
    relation = relation_map(made.repository, backup).find("postgres", "public", "t")
    assert relation is not None
    fetch_relations(made.repository, backup, [relation.path], folder / "part")
    assert (folder / "part" / relation.path).stat().st_size > 1 << 20
    other = Repository.open(made.repository.storage, identities=[str(pyrage.x25519.Identity.generate())])
    with pytest.raises(WrongKeyError):
        fetch_chain(other, [backup], folder / "b", account=None, programs=made.server.programs)
    assert not (folder / "b" / "global" / "pg_control").exists()


def damage(server: LocalServer, path: str, block: int, offset: int = 5000) -> None:
    with (server.data_directory / path).open("r+b") as file:
        file.seek(block * 8192 + offset)
        byte = file.read(1)
        file.seek(block * 8192 + offset)
        file.write(bytes([byte[0] ^ 0x10]))


def test_every_damaged_page_is_listed_and_nothing_else(
    protected: Callable[..., Archived], every_version: int
) -> None:
    made = protected(every_version)
    table, index = path_of(made.server, "t"), path_of(made.server, "t_a")
    blocks = [1, 2, 3, 77, 400, 700]
    for block in blocks:
        damage(made.server, table, block)
    damage(made.server, index, 5, offset=9)  # the checksum field itself
    backup = backed_up(made)
    assert backup.health.verdict == Verdict.BROKEN
    expected = {(table, block) for block in blocks} | {(index, 5)}
    assert {(page.file, page.block) for page in backup.health.bad_pages} == expected
    assert backup.health.bad_page_count == 7
    assert all("checksum" in page.reason for page in backup.health.bad_pages)
    assert [one.health for one in list_backups(made.repository)] == [backup.health]


def test_damage_in_an_incremental_backup_is_told_with_the_relations_own_block(
    protected: Callable[..., Archived],
) -> None:
    made = protected(18, summarize_wal="on")
    backed_up(made)
    query(made.server, "update t set b = repeat('y', 300) where a between 10000 and 10020")
    query(made.server, "checkpoint")
    table = path_of(made.server, "t")
    (ctid,) = query(made.server, "select max((ctid::text::point)[0]::int) from t where b like 'y%'")[0]
    query(made.server, "checkpoint")  # reading set hint bits: the page is written once more
    damage(made.server, table, int(str(ctid)))
    backup = backed_up(made, incremental=True)
    folder, _, name = table.rpartition("/")
    assert {(page.file, page.block) for page in backup.health.bad_pages} == {
        (f"{folder}/INCREMENTAL.{name}", int(str(ctid)))
    }


def test_a_page_whole_on_the_servers_disk_but_not_in_the_stream_is_a_bad_copy(
    protected: Callable[..., Archived],
) -> None:
    made = protected(18)
    table = path_of(made.server, "t")
    damage(made.server, table, 7)

    def mend_then_take(done: object) -> None:
        # The server's stream has passed the table once the last file was reported.
        nonlocal mended
        if not mended and getattr(done, "current", "") == "":
            mended = True
            damage(made.server, table, 7)

    mended = False
    with archiving(made):
        backup = take_backup(
            made.repository, made.server.dsn(), progress=mend_then_take, effort=Effort(wal_timeout=30)
        )
    assert mended
    (page,) = backup.health.bad_pages
    assert (page.file, page.block) == (table, 7)
    assert "copy in the backup is bad" in page.reason


def test_backups_under_heavy_writing_show_no_false_damage(
    protected: Callable[..., Archived], folder: Path
) -> None:
    made = protected(18, full_page_writes="on", shared_buffers="1MB", max_wal_size="200MB")
    children = [
        processes.start(
            [
                made.server.programs.path("psql"), "-q", made.server.dsn(), "-c",
                (
                    "do $$ begin loop update t set b = repeat(md5(random()::text), 9) "
                    f"where a % 8 = {number}; commit; end loop; end $$"
                ),
            ]
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        found = [backed_up(made).health for _ in range(2)]
    finally:
        for child in children:
            processes.stop(child)
    assert [(health.verdict, health.bad_pages) for health in found] == [(Verdict.HELD, ())] * 2


def test_without_data_checksums_health_is_not_checked(new_server: ServerFactory, folder: Path) -> None:
    server = new_server(18, segment_megabytes=1, start=False, **KEEP_WAL)
    processes.run(
        [server.programs.path("pg_checksums"), "--disable", "-D", server.data_directory],
        account=server.account,
    )
    server.start()
    backup = backed_up(repository_of(server, folder / "repository"))
    assert backup.health.verdict == Verdict.NOT_CHECKED
    assert "no data checksums" in backup.health.reason


def test_without_its_wal_a_backup_is_not_listed_and_leaves_nothing(
    protected: Callable[..., Archived],
) -> None:
    made = protected(18)
    with pytest.raises(BackupIncompleteError, match="lacks the WAL"):
        take_backup(made.repository, made.server.dsn(), effort=Effort(wal_timeout=0.2))
    assert list_backups(made.repository) == []
    assert list(made.repository.storage.list("backups/")) == []


def test_two_backups_at_once_are_refused(protected: Callable[..., Archived]) -> None:
    made = protected(18)
    with lease(made.repository, "backup", "another one"), pytest.raises(LockHeldError, match="another one"):
        take_backup(made.repository, made.server.dsn())


def test_another_clusters_server_is_refused(protected: Callable[..., Archived], folder: Path) -> None:
    made = protected(18)
    other = Repository.create(
        LocalStorage(folder / "other"),
        cluster="other",
        system_identifier=1,
        segment_bytes=1 << 20,
    )
    with pytest.raises(WrongSystemError):
        take_backup(other, made.server.dsn())


@pytest.fixture
def stored(protected: Callable[..., Archived]) -> tuple[Archived, Backup]:
    made = protected(18)
    return made, backed_up(made)


def test_damage_to_any_stored_object_is_named_and_nothing_can_start(
    stored: tuple[Archived, Backup], folder: Path
) -> None:
    made, backup = stored
    for number, pack in enumerate((backup.packs[-1], backup.members, backup.manifest)):
        path = made.root / pack.name
        good = path.read_bytes()
        middle = len(good) // 2
        for kind, content in (
            ("flipped", good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]),
            ("cut", good[: middle + 1]),
            ("longer", good + b"tail"),
        ):
            path.write_bytes(content)
            into = folder / f"{number}-{kind}"
            with pytest.raises(ObjectDamagedError) as caught:
                fetch_chain(
                    made.repository, [backup], into, account=None, programs=made.server.programs, sync=False
                )
            assert path.name in str(caught.value)
            assert not (into / "global" / "pg_control").exists()
        path.unlink()
        with pytest.raises(ObjectMissingError) as missing:
            fetch_chain(
                made.repository,
                [backup],
                folder / f"{number}-gone",
                account=None,
                programs=made.server.programs,
            )
        assert path.name in str(missing.value)
        path.write_bytes(good)


def test_a_restore_never_writes_into_a_folder_that_holds_something(
    stored: tuple[Archived, Backup], folder: Path
) -> None:
    made, backup = stored
    into = folder / "full"
    into.mkdir()
    (into / "precious").write_text("mine")
    with pytest.raises(DirectoryNotEmptyError):
        fetch_chain(made.repository, [backup], into, account=None, programs=made.server.programs)
    assert os.listdir(into) == ["precious"]


def test_one_relations_files_are_fetched_without_the_rest(
    stored: tuple[Archived, Backup], folder: Path
) -> None:
    made, backup = stored
    found = relation_map(made.repository, backup)
    relation = found.find("postgres", "public", "t_a")
    assert relation is not None
    assert found.not_recorded == {"template0": "the database takes no connections"}
    result = fetch_relations(made.repository, backup, [relation.path], folder / "part")
    written = (folder / "part" / relation.path).read_bytes()
    assert written == (made.server.data_directory / relation.path).read_bytes()
    assert result.read < backup.stored_bytes / 3
    table = found.find("postgres", "public", "t")
    assert table is not None
    assert {one.name for one in found.family(table)} >= {"t", "t_a"}
    names = {one.kind for one in found.family(table)}
    assert "t" in names  # its TOAST table
    with pytest.raises(ObjectMissingError, match="base/1/999999"):
        fetch_relations(made.repository, backup, ["base/1/999999"], folder / "none")


def test_a_single_block_is_read_from_a_backup(stored: tuple[Archived, Backup]) -> None:
    made, backup = stored
    path = path_of(made.server, "t")
    content = (made.server.data_directory / path).read_bytes()
    for block in (0, 511, len(content) // 8192 - 1):
        assert read_block(made.repository, backup, path, block) == content[block * 8192 : (block + 1) * 8192]
    with pytest.raises(ObjectMissingError):
        read_block(made.repository, backup, path, len(content) // 8192)


def test_members_chosen_by_a_rule_are_fetched(stored: tuple[Archived, Backup], folder: Path) -> None:
    made, backup = stored
    fetch_members(
        made.repository, backup, lambda member: member.path.split("/")[0] != "base", folder / "part"
    )
    assert (folder / "part" / "global" / "pg_control").exists()
    assert (folder / "part" / "PG_VERSION").read_text() == "18\n"
    assert not (folder / "part" / "base").exists()
    index = read_index(made.repository, backup)
    assert sum(pack.members for pack in index.packs.values()) == len(index.members)


def test_the_stored_packs_are_plain_tar_for_other_tools(
    stored: tuple[Archived, Backup], folder: Path
) -> None:
    made, backup = stored
    if shutil.which("zstd") is None:
        pytest.skip("the zstd program is not installed")
    out = folder / "out"
    out.mkdir()
    for pack in backup.packs:
        raw = processes.run(["zstd", "-dcq", made.root / pack.name, "-o", folder / "raw.tar", "-f"])
        assert raw.status == 0
        processes.run(["tar", "-xf", folder / "raw.tar", "-C", out])
    path = path_of(made.server, "t")
    assert (out / path).read_bytes() == (made.server.data_directory / path).read_bytes()
    assert (out / "backup_label").exists()
