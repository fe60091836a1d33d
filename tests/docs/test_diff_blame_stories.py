"""The stories of docs/diff.md and docs/blame.md, run as they are written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_cli import CommandLine, Ended, command_line
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.postgres.connection import connect
from knockwood.postgres.server import SUPERUSER
from knockwood.settings import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from knockwood.postgres.binaries import Programs

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```(sql|console)( culprit)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def line(
    shared_folder: Path, templates: Callable[[int, int], Path], installations: dict[int, Programs]
) -> Iterator[CommandLine]:
    with command_line(shared_folder, templates(18, 1), installations[18]) as made:
        made.in_process = True
        made.init()
        made.edit("user=knockwood", f"user={SUPERUSER}")
        yield made
        made.assert_nothing_left()


def tell(line: CommandLine, story: str) -> tuple[list[int], list[Ended]]:
    """Play a story: its transactions, the culprit last, and how each command ended."""
    xids: list[int] = []
    culprit = 0
    done: list[Ended] = []
    cluster = replace(Cluster.of(load(line.config), "shop"), state=line.state)
    for kind, mark, text in BLOCK.findall((DOCS / story).read_text()):
        if kind == "sql":
            with connect(line.server.dsn("postgres")) as connection, connection.transaction():
                connection.execute(text.encode())
                row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
                assert row is not None
                xids.append(int(row[0]))
                culprit = xids[-1] if mark else culprit
            # A receiver runs in the story; here the archive is brought up to date after each step.
            bring_up_to_date(cluster, cluster.repository())
        else:
            for command in re.findall(r"^\$ knockwood (.*)$", text, re.MULTILINE):
                ended = line.run(*shlex.split(command.replace("XID", str(culprit))))
                assert ended.status == 0, f"{command}\n{ended.out}\n{ended.err}"
                done.append(ended)
    return [*xids, culprit], done


def without_moments(text: str) -> list[str]:
    """Lines that are the same whenever the story is told."""
    return re.findall(r"^(?:postgres\.|  |public\.orders:).*$", text, re.MULTILINE)


def test_the_story_of_diff_is_true(line: CommandLine) -> None:
    xids, (_, shown, as_json) = tell(line, "diff.md")
    assert shown.out.startswith(f"transaction {xids[-1]}, committed ")
    printed = re.search(
        r"^```\n(transaction .*?)^```$", (DOCS / "diff.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert printed is not None
    assert without_moments(shown.out) == without_moments(printed[1])
    assert (len(as_json.json["changes"]), as_json.json["left_out"]) == (1, 2)


def test_the_story_of_blame_is_true(line: CommandLine) -> None:
    xids, (_, written, history, deleted) = tell(line, "blame.md")
    begun, _, culprit, later, _ = xids
    assert f"product=product 7: written by transaction {culprit}, " in written.out
    assert f"product=product 8: written by transaction {later}, " in written.out
    versions = re.findall(r"^    (\w+) +transaction (\d+),", history.out, re.MULTILINE)
    assert versions == [("update", str(later)), ("update", str(culprit)), ("insert", str(begun))]
    assert f"product=product 9: deleted by transaction {culprit}, " in deleted.out
