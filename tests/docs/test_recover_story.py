"""The story of docs/recover.md, run as it is written."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from fix_cli import CommandLine
from knockwood.integrity.registry import all_checks
from knockwood.postgres.connection import connect

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recover.md"
BLOCK = re.compile(r"^```(sql|sh|console)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_story_is_true(line: CommandLine) -> None:
    printed: list[str] = []
    for kind, mark, text in BLOCK.findall(PAGE.read_text()):
        if kind == "sql":
            with connect(line.server.dsn("postgres")) as connection:
                answers = [connection.execute(part.encode()) for part in text.strip().split(";\n")]
                if mark == "check":
                    assert answers[-1].fetchone() == (True,)
        elif kind == "sh":
            path = line.execute("select pg_relation_filepath('orders')")[0][0]
            words = text.replace("$ORDERS", str(line.server.data_directory / path)).split()
            subprocess.run(words, check=True, capture_output=True)
        else:
            for command in re.findall(r"^\$ knockwood (.*)$", text, re.MULTILINE):
                ended = line.run(*command.split())
                assert ended.status == int(mark), f"{command}\n{ended.out}\n{ended.err}"
                printed.append(ended.out)
    _, shown, applied, _ = printed
    assert re.search(r"plan [0-9a-f]{16}: heal 2 of 2 findings", shown)
    assert "lost for good: nothing" in shown
    assert "restore the cluster beside this one" in shown
    assert re.search(r"--approve [0-9a-f]{16}\n", shown)
    assert "kept in the repository as recoveries/" in applied
    assert "a new full backup shortens the next recovery" in applied
    assert applied.rstrip().endswith("recovery: held")
    line.assert_nothing_left()


def test_every_check_is_in_the_table() -> None:
    text = PAGE.read_text()
    assert [check.name for check in all_checks() if f"`{check.name}`" not in text] == []
