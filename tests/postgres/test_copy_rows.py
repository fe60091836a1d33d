"""COPY from one server into another, and what becomes of it where one of them fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

from knockwood.postgres.connection import connect
from knockwood.postgres.copying import copy_rows

if TYPE_CHECKING:
    from fix_server import ServerFactory

ROWS = 200_000


def test_rows_arrive_or_none_do(new_server: ServerFactory) -> None:
    server = new_server(18)
    with connect(server.dsn()) as source, connect(server.dsn()) as live:
        source.autocommit = live.autocommit = True
        source.execute(
            f"create table t as select i, repeat('x', i % 300) as b from generate_series(1, {ROWS}) i".encode()
        )
        live.execute("create table copy (like t, check (i <> 150000))")
        live.execute("create table whole (like t)")

        copy_rows(source, live, "t", "whole", "i, b")
        same = "select count(*), sum(hashtextextended(t::text, 0)) from {} t"
        [expected, arrived] = [live.execute(same.format(name).encode()).fetchone() for name in ("t", "whole")]
        assert arrived == expected

        for read_from, what in (
            ("(select i / (i - 120000) as i, b from t) q", psycopg.errors.DivisionByZero),
            ("t", psycopg.errors.CheckViolation),
            ("nowhere", psycopg.errors.UndefinedTable),
        ):
            with pytest.raises(what):
                copy_rows(source, live, read_from, "copy", "i, b")
            for connection in (source, live):
                assert connection.execute("select count(*) from copy").fetchone() == (0,)
