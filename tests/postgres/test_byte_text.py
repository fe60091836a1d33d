"""Databases whose encoding is not UTF-8: SQL_ASCII, which is none and holds any bytes, and LATIN1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fix_cli import CommandLine, command_line
from knockwood.postgres.connection import connect
from knockwood.postgres.server import SUPERUSER

if TYPE_CHECKING:
    from knockwood.postgres.binaries import Programs

WORDS = {"SQL_ASCII": "caf\udce9", "LATIN1": "café"}
"""The same byte, 0xE9, in both: in SQL_ASCII nobody knows which letter it is."""

TABLE = (
    "create table menu (id int primary key, name text, tags text[], short varchar(20), fixed char(6), price int);"
    "create index on menu (name)"
)


@pytest.fixture(params=["SQL_ASCII", pytest.param("LATIN1", marks=pytest.mark.slow)])
def line(
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
    request: pytest.FixtureRequest,
) -> Iterator[CommandLine]:
    encoding = request.param
    with command_line(shared_folder, templates(18, 1), installations[18]) as made:
        made.in_process = True
        made.execute(f"create database legacy encoding '{encoding}' locale 'C' template template0")
        made.execute(TABLE, "legacy")
        with connect(made.server.dsn("legacy")) as connection:
            for number in range(1, 41):
                word = f"{WORDS[encoding]} {number}"
                connection.execute(
                    "insert into menu values (%s, %s, array[%s, 'plain'], %s, %s, 10)",
                    [number, word, word, word, word[:6]],
                )
        made.init(dsn=made.server.dsn("legacy"))
        made.edit("user=knockwood", f"user={SUPERUSER}")
        made("backup")
        yield made


def rows(line: CommandLine, table: str = "menu") -> list[tuple[Any, ...]]:
    return line.execute(
        f"select id, name::bytea, tags::text::bytea, short::bytea, fixed::text::bytea, price from {table} order by id",
        "legacy",
    )


def encoding_of(line: CommandLine) -> str:
    return str(line.execute("show server_encoding", "legacy")[0][0])


def test_every_byte_comes_back(line: CommandLine) -> None:
    word = WORDS[encoding_of(line)]
    before = rows(line)
    with connect(line.server.dsn("legacy")) as connection, connection.transaction():
        connection.execute(
            "update menu set name = 'gone', tags = '{}', short = %s where id <= 10", [word.upper()]
        )
        connection.execute("delete from menu where id > 35")
        connection.execute("insert into menu values (99, %s, null, null, null, 1)", [word])
        [(xid,)] = connection.execute("select pg_current_xact_id()::text::bigint").fetchall()
    damaged = rows(line)
    line.execute("update menu set price = 11 where id = 3", "legacy")
    changes = line("diff", xid)["changes"]
    changed = next(one for one in changes if one["key"] == {"id": "4"})
    assert changed["before"]["name"] == f"{word} 4"
    found = line("blame", "legacy.public.menu", "--where", f"name = '{word} 20'")["rows"]
    assert [one["key"] for one in found] == [{"id": "20"}]
    done = line("revert", xid, "--apply")
    [own] = [step["values"]["xid"] for step in done["recovery"]["results"]]
    assert rows(line) == [(*row[:5], 11) if row[0] == 3 else row for row in before]
    line("revert", own, "--apply")
    assert rows(line) == [(*row[:5], 11) if row[0] == 3 else row for row in damaged]
    brought = line("restore", "--table", "legacy.public.menu", "--to", f"before-{xid}", "--apply")
    assert rows(line, brought["destination"]) == before
    line.execute("drop table menu", "legacy")
    line("restore", "--table", "legacy.public.menu", "--to", f"before-{xid}", "--in-place", "--apply")
    assert rows(line) == before


def test_such_databases_are_checked_and_proved(line: CommandLine) -> None:
    word = WORDS[encoding_of(line)]
    line.execute("create table twice (name text)", "legacy")
    with connect(line.server.dsn("legacy")) as connection:
        connection.execute("insert into twice values (%s), (%s)", [word, word])
    assert line("doctor", status=1)["checks"]
    proof = line("prove")
    equal = next(claim for claim in proof["claims"] if claim["name"] == "tables equal to the primary")
    assert equal["verdict"] == "held", proof
    broken = [claim for claim in proof["claims"] if claim["verdict"] == "broken"]
    assert broken == []
    line.edit(
        "[cluster.shop.objectives]",
        '[[cluster.shop.invariant]]\nname = "names are unique"\n'
        'sql = "select name from twice group by name having count(*) > 1"\n\n[cluster.shop.objectives]',
    )
    [finding] = line("check", "invariants", status=1)["findings"]
    # What is no text cannot be shown as it is.
    assert word.replace("\udce9", "\ufffd") in str(finding)


def test_a_name_that_is_no_text_is_told(line: CommandLine) -> None:
    """Only SQL_ASCII has such names: whatever needs one in a statement says so, and is no defect."""
    if encoding_of(line) != "SQL_ASCII":
        pytest.skip("every name is text in LATIN1")
    with connect(line.server.dsn("legacy")) as connection:
        statement = 'create table "caf\udce9" (id int primary key)'
        connection.execute(statement.encode("utf-8", "surrogateescape"))
    line.in_process = False
    error = line.fails(
        4, "KW200", "restore", "--table", 'legacy.public."caf\udce9"', "--to", "latest", "--apply"
    )
    assert "no UTF-8" in error["what"]
    # A definition comes back with its bytes.
    with connect(line.server.dsn("legacy")) as connection:
        statement = "create table odd (id int primary key, note text default 'caf\udce9')"
        connection.execute(statement.encode("utf-8", "surrogateescape"))
        [(xid,)] = connection.execute("select txid_current()").fetchall()
        connection.execute("drop table odd")
    line("restore", "--table", "legacy.public.odd", "--to", f"before-{xid}", "--in-place", "--apply")
    line.execute("insert into odd values (1)", "legacy")
    assert line.execute("select note::bytea from odd", "legacy") == [(b"caf\xe9",)]
    # Others go on.
    assert line("restore", "--table", "legacy.public.menu", "--to", "latest", "--apply")["rows"] == 40
