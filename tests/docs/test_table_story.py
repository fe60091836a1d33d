"""The story of docs/restore.md, run as it is written."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

from fix_cli import CommandLine
from fix_clones import one, rows
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.postgres.connection import connect
from knockwood.settings import load

STORY = Path(__file__).resolve().parents[2] / "docs" / "restore.md"
BLOCK = re.compile(r"^```(sql|console)( culprit)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_story_is_true(line: CommandLine) -> None:
    dsn = line.server.dsn("postgres")
    xid = 0
    said: list[str] = []
    for kind, culprit, text in BLOCK.findall(STORY.read_text()):
        if kind == "sql":
            with connect(dsn) as connection, connection.transaction():
                connection.execute(text.encode())
                row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
            assert row is not None
            xid = row[0] if culprit else xid
            continue
        cluster = replace(Cluster.of(load(line.config), "shop"), state=line.state)
        # A receiver runs in the story; here the archive is brought up to date before each command.
        if "backup" not in text:
            bring_up_to_date(cluster, cluster.repository())
        for command in re.findall(r"^\$ knockwood (.*)$", text, re.MULTILINE):
            ended = line.run(*shlex.split(command.replace("XID", str(xid))))
            assert ended.status == 0, f"{command}\n{ended.out}\n{ended.err}"
            said.append(ended.out)
    assert "100 rows are missing, 0 have changed since, 2 are newer, 0 are the same" in said[1]
    assert "carry it out with --apply" in said[1]
    assert "done 102 rows are there" in said[2]
    assert "done 102 rows are there; views made again: public.large" in said[3]
    assert one(dsn, "select count(*) from large") == 10
    assert rows(dsn, "select id from orders where total in (7, 8) order by id")[-2:] == [201, 202]
    assert one(dsn, "select nextval('orders_id_seq')") in range(203, 236)
    answer = line(
        "restore", "--table", "postgres.public.orders", "--to", f"before-{xid}", "--in-place", status=4
    )
    assert answer["comparison"] == {"same": 102, "missing": 0, "changed": 0, "newer": 0, "examples": []}
    line.fails(3, "KW100", "restore", "--table", "postgres.public.orders", "--keep-current")
    line.fails(3, "KW100", "restore", "--into", "/nowhere", "--in-place")
    both = ("--in-place", "--keep-current", "--keep-restored")
    line.fails(3, "KW100", "restore", "--table", "postgres.public.orders", *both)
    line.assert_nothing_left()
