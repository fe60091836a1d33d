"""The story of docs/revert.md, run as it is written."""

from __future__ import annotations

import re
from pathlib import Path

from fix_cli import CommandLine
from knockwood.postgres.connection import connect

STORY = Path(__file__).resolve().parents[2] / "docs" / "revert.md"
BLOCK = re.compile(r"^```(sql|console)( \w+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_story_is_true(line: CommandLine) -> None:
    culprit = 0
    printed: list[str] = []
    for kind, mark, text in BLOCK.findall(STORY.read_text()):
        if kind == "sql":
            with connect(line.server.dsn("postgres")) as connection, connection.transaction():
                cursor = connection.execute(text.encode())
                if mark == " check":
                    assert cursor.fetchone() == (True,)
                if mark == " culprit":
                    row = connection.execute("select pg_current_xact_id()::text").fetchone()
                    assert row is not None
                    culprit = int(row[0])
            continue
        for command in re.findall(r"^\$ knockwood (.*)$", text, re.MULTILINE):
            ended = line.run(*command.replace("742", str(culprit)).split())
            assert ended.status == 0, f"{command}\n{ended.out}\n{ended.err}"
            printed.append(ended.out)
    backup, shown, applied = printed
    assert "public.customer: 50 set back, 1 deleted; public.orders: 10 put back" in " ".join(shown.split())
    assert "reads leave no trace" in shown
    assert "1 row(s), stays" in shown
    assert re.search(r"done: 61 row\(s\) written in transaction \d+", applied), applied
    assert "held rows of" in applied
    assert backup
    again = line("revert", culprit)
    assert again["plan"]["refused"] == ["nothing is left to be reverted"]
    own = line.run("revert", re.search(r"knockwood revert (\d+)", applied)[1], "--apply")  # type: ignore[index]
    assert own.status == 0, own.err
    assert line.execute("select count(*), max(credit), max(id) from customer") == [(51, 0, 51)]
    assert line.execute("select name from customer where id = 7") == [("Ada",)]
    line.assert_nothing_left()
