"""The replication protocol against real servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from knockwood.errors import (
    MissingPrivilegeError,
    PostgresError,
    ServerDownError,
    UnsupportedVersionError,
)
from knockwood.postgres.connection import connect, server_facts
from knockwood.postgres.replication import (
    ArchiveStarted,
    BackupEnded,
    BackupStarted,
    ManifestStarted,
    ReplicationConnection,
)

if TYPE_CHECKING:
    from fix_server import ServerFactory


def test_identity_and_slots(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    with connect(server.dsn()) as sql:
        facts = server_facts(sql)
    with ReplicationConnection(server.dsn()) as connection:
        identity = connection.identify_system()
        assert (identity.system_identifier, identity.timeline) == (facts.system_identifier, 1)
        assert connection.major == every_version
        assert connection.read_slot("kw") is None
        connection.create_physical_slot("kw")
        found = connection.read_slot("kw")
        assert found is not None
        assert found[0] is not None
        with pytest.raises(PostgresError, match="already exists"):
            connection.create_physical_slot("kw")
        connection.drop_slot("kw")
        assert connection.read_slot("kw") is None


def test_a_base_backup_is_a_stream_of_events(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    kinds = []
    size = 0
    with ReplicationConnection(server.dsn()) as connection:
        for event in connection.base_backup("it's a test"):
            if isinstance(event, memoryview):
                size += len(event)
            else:
                kinds.append(type(event))
        assert kinds == [BackupStarted, ArchiveStarted, ManifestStarted, BackupEnded]
        assert size > 1 << 20
        # The connection is in order for the next command.
        assert connection.identify_system().timeline == 1


def test_a_role_without_replication_is_told_what_it_lacks(new_server: ServerFactory) -> None:
    server = new_server(18)
    with connect(server.dsn()) as sql:
        sql.execute("create role weak login")
    with pytest.raises(PostgresError) as caught, ReplicationConnection(server.dsn(user="weak")) as connection:
        connection.identify_system()
    assert isinstance(caught.value, MissingPrivilegeError)
    assert caught.value.hint == "ALTER ROLE weak REPLICATION;"


def test_a_server_that_dies_in_the_middle_is_an_error(new_server: ServerFactory) -> None:
    server = new_server(18)
    with ReplicationConnection(server.dsn()) as connection:
        events = connection.base_backup("x")
        assert isinstance(next(events), BackupStarted)
        server.stop("immediate")
        with pytest.raises((ServerDownError, PostgresError)):
            for _ in events:
                pass


def test_nobody_there(new_server: ServerFactory) -> None:
    server = new_server(18)
    dsn = server.dsn()
    server.stop()
    with pytest.raises(ServerDownError):
        ReplicationConnection(dsn)


def test_old_servers_have_no_incremental_backups(new_server: ServerFactory) -> None:
    server = new_server(15)
    with ReplicationConnection(server.dsn()) as connection:
        with pytest.raises(UnsupportedVersionError):
            connection.upload_manifest([b"{}"])
        with pytest.raises(UnsupportedVersionError):
            next(connection.base_backup("x", incremental=True))


def test_a_manifest_that_is_none_is_refused_and_the_connection_lives(new_server: ServerFactory) -> None:
    server = new_server(18, summarize_wal="on")
    with ReplicationConnection(server.dsn()) as connection, pytest.raises(PostgresError):
        connection.upload_manifest([b"not a manifest"])
