"""`diff` and `blame` on the command line, on one archive with a story in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from fix_cli import CommandLine
from fix_clones import Protected, protected
from fix_server import ServerFactory
from knockwood.postgres.connection import connect

_SCHEMA = """
create table "Line" (id int primary key, product text not null, amount int, note text);
insert into "Line" select i, 'product ' || i % 7, i % 5 + 1, null from generate_series(1, 200) i;
create table parts (id int, kind text, v int, primary key (id, kind)) partition by list (kind);
create table parts_a partition of parts for values in ('a');
create table parts_b partition of parts for values in ('b');
insert into parts select i, 'a', i from generate_series(1, 20) i;
create table loose (a int);
insert into loose values (1), (2);
"""

_STEPS = {
    "first": 'update "Line" set amount = 50 where id = 7',
    "second": "update \"Line\" set note = 'checked' where id in (7, 8)",
    "move": "update parts set kind = 'b', v = v + 100 where id in (1, 2)",
    "rogue": "delete from \"Line\" where product = 'product 3'",
    "later": "update \"Line\" set note = 'later' where id = 8",
    "born": "insert into \"Line\" values (900, 'new', 1)",
    "gone": 'delete from "Line" where id = 900',
    "key": 'update "Line" set id = 1008 where id = 8',
    "both": "update parts set v = 0 where id in (1, 3)",
    "loose": "update loose set a = 3 where a = 2",
    "emptied": "truncate loose",
}


@dataclass
class Story:
    made: Protected
    line: CommandLine
    xids: dict[str, int]


@pytest.fixture(scope="module")
def story(new_server_of_module: ServerFactory) -> Iterator[Story]:
    server = new_server_of_module(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw", partial_every=0.3) as made:
        made.execute(_SCHEMA)
        made.backup()
        xids = {}
        with connect(server.dsn()) as connection:
            for name, statement in _STEPS.items():
                with connection.transaction():
                    connection.execute(statement.encode())
                    row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
                    assert row is not None
                    xids[name] = int(row[0])
        made.flush()
        line = CommandLine(made.folder, server, in_process=True)
        line.config.write_text(
            f'[cluster.shop]\ndsn = "{server.dsn()}"\nrepository = "{made.folder / "repository"}"\n'
        )
        yield Story(made, line, xids)
        assert made.registry.records() == []


def rows_of(answer: dict[str, Any]) -> list[tuple[Any, int]]:
    return [(tuple(row["key"].values()), row["xid"]) for row in answer["rows"]]


def test_a_difference_column_by_column(story: Story) -> None:
    answer = story.line("diff", story.xids["second"])
    assert [(c["table"], c["kind"], c["key"], c["changed"]) for c in answer["changes"]] == [
        ("public.Line", "update", {"id": "8"}, ["note"]),
        ("public.Line", "update", {"id": "7"}, ["note"]),
    ]
    assert answer["changes"][1]["before"] == {"id": "7", "product": "product 0", "amount": "50", "note": None}
    assert answer["changes"][1]["after"] == {
        "id": "7",
        "product": "product 0",
        "amount": "50",
        "note": "checked",
    }
    assert answer["transactions"][0]["xid"] == story.xids["second"]
    assert "verdict" not in answer
    text = story.line.run("diff", story.xids["rogue"], "--limit", "2").out
    assert "- delete id=3" in text
    assert "and 27 more; see them with --limit 29" in text
    moved = story.line("diff", story.xids["move"], "--table", "parts")
    assert {(c["table"], c["moved_to"]) for c in moved["changes"]} == {("public.parts_a", "public.parts_b")}


def test_the_net_of_a_range(story: Story) -> None:
    first = story.line("diff", story.xids["first"])["transactions"][0]["commit_lsn"]
    last = story.line("diff", story.xids["key"])["transactions"][0]["commit_lsn"]
    answer = story.line("diff", f"{first}..{last}", "--table", "public.Line")
    by_key = {change["key"]["id"]: change for change in answer["changes"]}
    assert by_key["7"]["after"]["note"] == "checked"
    assert by_key["7"]["before"]["amount"] == "3"
    assert by_key["8"]["after"] == {"id": "1008", "product": "product 1", "amount": "4", "note": "later"}
    assert "900" not in by_key
    assert answer["counts"] == [
        {"table": "public.Line", "database": "postgres", "kind": "delete", "rows": 29},
        {"table": "public.Line", "database": "postgres", "kind": "update", "rows": 2},
    ]
    assert answer["left_out"] == 0
    story.line.fails(3, "KW100", "diff", f"{last}..{first}")
    story.line.fails(4, "KW200", "diff", "0/1..0/2")
    story.line.fails(2, "KW501", "diff", "4000000")
    story.line.fails(4, "KW200", "diff", story.xids["rogue"], "--max-rows", "5")


def test_who_wrote_a_row(story: Story) -> None:
    answer = story.line("blame", "Line", "--where", "note = 'checked'")
    assert rows_of(answer) == [(("7",), story.xids["second"])]
    assert answer["rows"][0]["commit_lsn"]
    assert answer["rows"][0]["commit_time"]
    assert answer["source"] == "the live server"
    answer = story.line("blame", "public.Line", "--where", "id = 1008", "--history")
    (row,) = answer["rows"]
    assert row["xid"] == story.xids["key"]
    names = {xid: name for name, xid in story.xids.items()}
    kinds = [(each["kind"], names.get(each["xid"])) for each in row["versions"]]
    assert kinds[:3] == [("update", "key"), ("update", "later"), ("update", "second")]
    assert kinds[3:] in ([], [("insert", None)])
    answer = story.line("blame", "parts", "--where", "id in (1, 2)", "--history")
    found = {row["key"]["id"]: [names.get(v["xid"]) for v in row["versions"]] for row in answer["rows"]}
    assert found["1"][:2] == ["both", "move"]
    assert found["2"][0] == "move"
    old = story.line("blame", "pg_catalog.pg_am", "--where", "amname = 'heap'", status=2)
    assert old["rows"][0]["commit_lsn"] is None
    assert old["rows"][0]["reason"].startswith("written before the archive begins")
    assert "written by" in story.line.run("blame", "Line", "--where", "id = 7").out
    assert story.line("blame", "Line", "--where", "false")["rows"] == []
    limited = story.line("blame", "Line", "--limit", "3")
    assert len(limited["rows"]) == 3
    assert "more than 3" in limited["left_out"]


def test_who_deleted_a_row(story: Story) -> None:
    answer = story.line("blame", "Line", "--deleted", "--where", "id in (3, 10, 900)")
    assert rows_of(answer) == [
        (("900",), story.xids["gone"]),
        (("3",), story.xids["rogue"]),
        (("10",), story.xids["rogue"]),
    ]
    few = story.line("blame", "Line", "--deleted", "--stops", "1", "--where", "id in (3, 900)", status=2)
    assert rows_of(few) == [(("900",), story.xids["gone"])]
    assert "29 older deletions were not looked at" in few["left_out"]
    assert "deleted by" in story.line.run("blame", "Line", "--deleted", "--where", "id = 3").out
    assert story.line("blame", "parts", "--deleted")["rows"] == []
    emptied = story.line("blame", "loose", "--deleted", status=2)
    assert emptied["rows"] == []
    assert emptied["left_out"].startswith(f"the rows that transaction {story.xids['emptied']} truncated")


def test_the_server_is_down(story: Story) -> None:
    """Then the newest state of the archive answers."""
    text = story.line.config.read_text()
    socket = str(story.made.server.socket_directory)
    story.line.edit(socket, "/nowhere")
    try:
        answer = story.line("blame", "Line", "--where", "id = 7")
        assert rows_of(answer) == [(("7",), story.xids["second"])]
        assert answer["source"].startswith("a clone at ")
        changes = story.line("diff", story.xids["loose"])["changes"]
        assert [(c["key"], c["before"], c["after"]) for c in changes] == [({}, {"a": "2"}, {"a": "3"})]
    finally:
        story.line.config.write_text(text)


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ('id = 7; drop table "Line"', "KW100"),
        ("true) or (true", "KW100x"),
        ("1 = 1) union select 1 --", "KW100"),
        ("id = ", "KW400"),
        ("nothing = 1", "KW400"),
        ("pg_sleep(5) is null", "KW400"),
        ("nextval('s') > 0", "KW400"),
    ],
)
def test_only_an_expression_that_reads(story: Story, where: str, code: str) -> None:
    if code.endswith("x"):
        story.line.fails(3, "KW100", "blame", "Line", "--where", where)
        return
    story.made.execute("create sequence if not exists s")
    words = ("blame", "Line", "--where", where, "--statement-timeout", "1s")
    story.line.fails(3 if code == "KW100" else 2, code, *words)
    story.line.fails(2, "KW501", "blame", "nowhere.at_all")
