"""The stories of docs/bisect.md and docs/shadow.md, run as they are written."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

from fix_cli import CommandLine, Ended
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.postgres.connection import connect
from knockwood.settings import load

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```(toml|sql|console)( \w+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def tell(line: CommandLine, story: Path, statuses: dict[str, int]) -> tuple[int, list[tuple[str, Ended]]]:
    """Play a story; the culprit's transaction, and how each command ended. HOLD stands for the hold's name."""
    culprit, hold = 0, ""
    done: list[tuple[str, Ended]] = []
    for kind, mark, text in BLOCK.findall(story.read_text()):
        if kind == "toml":
            line.config.write_text(line.config.read_text() + "\n" + text)
        elif kind == "sql":
            with connect(line.server.dsn("postgres")) as connection, connection.transaction():
                connection.execute(text.encode())
                if mark == " culprit":
                    row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
                    assert row is not None
                    culprit = row[0]
        else:
            cluster = replace(Cluster.of(load(line.config), "shop"), state=line.state)
            # A receiver runs in the story; here the archive is brought up to date before each command.
            if "backup" not in text:
                bring_up_to_date(cluster, cluster.repository())
            for command in re.findall(r"^\$ knockwood (.*)$", text, re.MULTILINE):
                ended = line.run(*shlex.split(command.replace("HOLD", hold)))
                wanted = statuses.get(command, 1 if mark == " broken" else 0)
                assert ended.status == wanted, f"{command}\n{ended.out}\n{ended.err}"
                found = re.search(r"hold (\S+) at", ended.out)
                hold = found[1] if found else hold
                done.append((command, ended))
    return culprit, done


def test_the_story_of_bisect_is_true(line: CommandLine) -> None:
    by_rule = 'bisect --invariant "no account below its limit"'
    by_sql = 'bisect --sql "select id from account where balance < 0"'
    culprit, done = tell(line, DOCS / "bisect.md", {by_rule: 1, by_sql: 1})
    ended = dict(done)
    assert f"first bad: transaction {culprit} at" in ended[by_rule].out
    assert "public.account: 0 inserted, 4 updated, 0 deleted" in ended[by_rule].out
    assert "bad row: {'id': '50', 'balance': '-30'}" in ended[by_rule].out
    assert f"first bad: transaction {culprit} at" in ended[by_sql].out
    answer = line("bisect", "--sql", "select 1 where false", "--to", f"before-{culprit}")
    assert (answer["verdict"], answer["outcome"]) == ("held", "never_bad")
    error = line.fails(3, "KW100", "bisect")
    assert "one thing" in error["what"]
    line.assert_nothing_left()


def test_the_story_of_the_shadow_is_true(line: CommandLine) -> None:
    _, done = tell(line, DOCS / "shadow.md", {})
    said = [ended.out for command, ended in done if command == "shadow run --once"]
    assert [re.search(r"\d (made|advanced|rebuilt) at", out)[1] for out in said] == [  # type: ignore[index]
        "made", "advanced", "rebuilt", "advanced",
    ]  # fmt: skip
    assert 'invariant "no price below zero" is broken by 49 row(s)' in said[2]
    assert "held invariants" in dict(done)["shadow status"].out
    status = line("shadow", "status")
    assert (status["verdict"], status["stage"], status["holds"]) == ("held", "standing", [])
    made = line("shadow", "hold", "0/1", "--reason", "for a test")
    assert line("shadow", "status", status=1)["past_hold"]
    line("shadow", "release", made["hold"]["id"])
    line.fails(3, "KW100", "shadow", "hold", "nowhere")
    line.fails(2, "KW300", "shadow", "release", "unknown")
    assert line("shadow", "remove")["removed"]
    assert not line("shadow", "remove")["removed"] or not (line.state / "shop" / "shadow" / "clone").exists()
    line.assert_nothing_left()
