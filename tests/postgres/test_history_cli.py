"""`knockwood log` and `mark`, and the story of docs/history.md as it is written there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fix_cli import CommandLine, command_line

if TYPE_CHECKING:
    from knockwood.postgres.binaries import Programs

STORY = Path(__file__).resolve().parents[2] / "docs" / "history.md"


@pytest.fixture
def line(
    shared_folder: Path, templates: Callable[[int, int], Path], installations: dict[int, Programs]
) -> Iterator[CommandLine]:
    with command_line(shared_folder, templates(18, 1), installations[18]) as made:
        made.in_process = True
        made.init("--apply")
        yield made


def tables(entry: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    return [(t["name"], t["inserted"], t["updated"], t["deleted"]) for t in entry["tables"]]


def test_the_story_of_the_documentation(line: CommandLine) -> None:
    text = STORY.read_text().split("## A worked story")[1].split("\n## ")[0]
    answers: list[dict[str, Any]] = []
    shown = ""
    for kind, block in re.findall(r"```(sql|sh)\n(.*?)```", text, flags=re.DOTALL):
        for words in block.strip().splitlines():
            if kind == "sql":
                line.execute(words)
            else:
                answers.append(line(*shlex.split(words)[1:]))
                ended = line.run(*shlex.split(words)[1:]) if " log " in words else None
                shown += ended.out if ended else ""
    _, mark, listed, largest = answers
    orders = "public.orders"
    assert [tables(one) for one in listed["transactions"]] == [
        [(orders, 1000, 0, 0)], [(orders, 0, 10, 0)], [(orders, 0, 990, 0)], [(orders, 1, 0, 0)],
    ]  # fmt: skip
    assert listed["verdict"] == "held"
    assert [one["text"] for one in listed["marks"]] == ["release 42 goes live"]
    assert mark["mark"]["xid"] is not None
    assert tables(largest["transactions"][0]) in ([(orders, 0, 990, 0)], [(orders, 1000, 0, 0)])
    # As people see it: the mark stands between what was before the release and what came after.
    order = [
        shown.index(words)
        for words in ("1,000 inserted", "release 42 goes live", "10 updated", "990 updated")
    ]
    assert order == sorted(order)


def test_ranges_marks_labels_and_a_server_that_is_down(line: CommandLine) -> None:
    line.execute("create table t (id int primary key)")
    line("backup")
    began = datetime.now(UTC)
    line.execute("insert into t values (1)")
    line.execute("insert into t values (2), (3)")
    line.execute(
        "with m as (select pg_logical_emit_message(true, 'knockwood', 'clean up')) delete from t using m"
    )
    all_of_t = line("log", "--table", "t")["transactions"]
    assert [tables(one) for one in all_of_t] == [
        [("public.t", 1, 0, 0)], [("public.t", 2, 0, 0)], [("public.t", 0, 0, 3)],
    ]  # fmt: skip
    one, two, three = all_of_t
    assert three["label"] == "clean up"
    assert [e["xid"] for e in line("log", "--table", "t", "--from", two["commit_lsn"])["transactions"]] == [
        two["xid"], three["xid"],
    ]  # fmt: skip
    found = line("log", "--table", "t", "--to", two["commit_lsn"])
    assert [e["xid"] for e in found["transactions"]] == [one["xid"]]
    found = line("log", "--table", "t", "--from", began.isoformat(), "--to", two["commit_time"])
    assert [e["xid"] for e in found["transactions"]] == [one["xid"], two["xid"]]
    assert line("log", "--xid", two["xid"])["transactions"] == [two]
    largest = line("log", "--largest", "--limit", "1", "--table", "t")
    assert largest["transactions"][0]["bytes"] == max(e["bytes"] for e in all_of_t)
    assert largest["more"]
    newest = line("log", "--limit", "1")
    assert newest["transactions"][0]["xid"] >= three["xid"]
    assert newest["more"]
    early = line("mark", "it began here", "--at", one["commit_lsn"])
    assert early["mark"]["lsn"] == one["commit_lsn"]
    line("mark", "someone called", "--at", (began - timedelta(hours=1)).isoformat())
    assert [m["text"] for m in line("log", "--from", began.isoformat())["marks"]] == ["it began here"]
    line.fails(3, "KW100", "log", "--table", "nothing.there")
    line.fails(3, "KW100", "log", "--from", "latest")
    line.fails(3, "KW100", "mark", " ")
    # Beyond the archive: named, and not green.
    late = line("log", "--to", "7F/0", status=2)
    assert late["verdict"] == "not_checked"
    assert "ends before it" in late["not_covered"][-1]["reason"]
    rebuilt = line("log", "--table", "t", "--rebuild")["transactions"]
    assert rebuilt == all_of_t

    line.server.stop("fast")
    down = line("log", "--table", "t", status=2)
    assert down["transactions"] == all_of_t
    assert not down["complete"]
    assert any("does not answer" in note for note in down["notes"])
    assert line("log", "--table", "t", "--to", two["commit_lsn"])["verdict"] == "held"
    made = line("mark", "the server is down")
    assert made["mark"]["xid"] is None
    assert "not in the WAL" in made["detail"]
    assert line("log", status=2)["marks"][-1]["text"] == "the server is down"


def test_gaps_are_named_and_expired_segments_leave_no_index(line: CommandLine) -> None:
    line.execute("create table t (id int primary key)")
    line("backup")
    for number in range(6):
        line.execute(f"insert into t values ({number})")
        line.execute("select pg_switch_wal()")
    whole = line("log", "--table", "t")
    assert len(whole["transactions"]) == 6
    third = whole["transactions"][2]
    segment = sorted(line.repository.glob("wal/0*/*/*"))
    heads = sorted(line.repository.glob("history/index/v1/*/*/*.head.zst"))
    assert len(heads) == len(segment)
    line("mark", "kept")
    lost = next(
        path
        for path in segment
        if path.name[16:24] == f"{int(third['commit_lsn'].split('/')[1], 16) >> 20:08X}"
    )
    lost.unlink()
    holed = line("log", "--table", "t", status=2)
    assert [one["xid"] for one in holed["transactions"]] == [
        one["xid"] for one in whole["transactions"] if one is not third
    ]
    [gap] = holed["not_covered"]
    assert lost.name[:24] in gap["reason"]
    assert gap["from"] <= third["commit_lsn"] < gap["to"]
    # What lies outside the gap can be told.
    last = whole["transactions"][-1]
    after = line("log", "--from", last["commit_lsn"], status=2)
    assert after["not_covered"] == []
    # It may have begun in the hole. A checkpoint lists what runs: whatever begins later is whole.
    assert not after["transactions"][0]["complete"]
    line.execute("checkpoint")
    line.execute("insert into t values (100)")
    found = line("log", "--from", last["commit_lsn"], "--limit", "1", status=0)
    assert found["transactions"][-1]["complete"]
    line("expire", "--apply")
    kept = {path.name[:24] for path in line.repository.glob("wal/0*/*/*")}
    assert lost.name[:24] not in kept
