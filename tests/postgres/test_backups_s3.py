"""A base backup in an object store: taken, expired leftovers, fetched whole and in part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_archive import Archived
from fix_backup import KEEP_WAL, backed_up, restored
from knockwood.errors import ObjectMissingError
from knockwood.host import privileges
from knockwood.postgres.connection import connect, server_facts
from knockwood.repository.backups.fetch import fetch_chain
from knockwood.repository.backups.listing import list_backups, relation_map
from knockwood.repository.backups.partial import fetch_relations
from knockwood.repository.repository import Repository

if TYPE_CHECKING:
    from fix_s3 import S3Server
    from fix_server import ServerFactory


def test_a_backup_in_an_object_store_restores_whole_and_in_part(
    new_server: ServerFactory, s3_server: S3Server, shared_folder: Path
) -> None:
    server = new_server(18, segment_megabytes=1, **KEEP_WAL)
    with connect(server.dsn()) as connection:
        facts = server_facts(connection)
        connection.execute("create table t as select a, md5(a::text) as b from generate_series(1, 30000) a")
        connection.execute("checkpoint")
    repository = Repository.create(
        s3_server.storage(), cluster="c", system_identifier=facts.system_identifier,
        segment_bytes=facts.segment_bytes,
    )  # fmt: skip
    repository.storage.put_new("backups/20200101T000000Z-full/pack-00000.tar.zst", [b"of a killed backup"])
    backup = backed_up(Archived(repository, shared_folder, server))
    assert list_backups(repository) == [backup]
    assert {info.name.split("/")[1] for info in repository.storage.list("backups/")} == {backup.id}
    folder = shared_folder / "s3-restored"
    folder.mkdir()
    privileges.give(folder, server.account)
    with (
        restored(repository, [backup], folder / "data", server.programs) as again,
        connect(again.dsn()) as connection,
    ):
        assert connection.execute("select count(*) from t").fetchone() == (30000,)
    relation = relation_map(repository, backup).find("postgres", "public", "t")
    assert relation is not None
    fetch_relations(repository, backup, [relation.path], folder / "part")
    live = server.data_directory / relation.path
    assert (folder / "part" / relation.path).read_bytes() == live.read_bytes()
    repository.storage.delete(backup.packs[0].name)
    with pytest.raises(ObjectMissingError):
        fetch_chain(
            repository,
            [backup],
            folder / "gone",
            account=server.account,
            programs=server.programs,
            sync=False,
        )
