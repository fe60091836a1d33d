"""Local servers of every version: started, used, stopped, killed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from knockwood.errors import AuthenticationError, PostgresError, ServerDownError, WrongSystemError
from knockwood.postgres.connection import connect, server_facts, with_words

if TYPE_CHECKING:
    from fix_server import ServerFactory


def test_a_server_of_every_version_starts_answers_and_stops(
    new_server: ServerFactory, every_version: int
) -> None:
    server = new_server(every_version)
    with connect(server.dsn()) as connection:
        facts = server_facts(connection)
    assert facts.major == every_version
    assert facts.checksums
    assert facts.data_directory == server.data_directory
    pid = server.pid
    server.stop()
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_server_starts_again(new_server: ServerFactory) -> None:
    server = new_server(18, fsync="on")
    with connect(server.dsn()) as connection:
        connection.execute("create table t as select 1 as a")
    server.kill()
    server.start()
    with connect(server.dsn()) as connection:
        assert connection.execute("select a from t").fetchone() == (1,)


def test_a_second_server_on_the_same_folder_is_refused(new_server: ServerFactory) -> None:
    server = new_server(18)
    second = type(server)(server.programs, server.data_directory, account=server.account)
    with pytest.raises(PostgresError, match="runs on this folder already"):
        second.start()
    second.stop()


def test_a_broken_setting_is_told_with_the_log(new_server: ServerFactory) -> None:
    with pytest.raises(PostgresError, match="no_such_setting"):
        new_server(18, no_such_setting="1")


def test_errors_of_connecting_say_what_is_wrong(new_server: ServerFactory) -> None:
    server = new_server(18)
    with pytest.raises(ServerDownError):
        connect(with_words(server.dsn(), port="1"))
    with pytest.raises(AuthenticationError):
        connect(server.dsn(user="nobody_here"))
    with connect(server.dsn()) as connection, pytest.raises(WrongSystemError):
        server_facts(connection, expected_system=1)
