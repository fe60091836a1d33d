"""The story of docs/page-repair.md, run as it is written."""

from __future__ import annotations

import re
from pathlib import Path

from fix_cli import CommandLine
from knockwood.host.direct import read_block, write_block
from knockwood.postgres.connection import connect

STORY = Path(__file__).resolve().parents[2] / "docs" / "page-repair.md"
BLOCK = re.compile(r"^```(sql|console)( \w+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def flip(line: CommandLine, path: str, block: int) -> None:
    """One bit of a block changes on disk, and no buffer holds it."""
    line.execute("checkpoint")
    file = line.server.data_directory / path
    page = bytearray(read_block(file, block * 8192, 8192))
    page[8000] ^= 8
    write_block(file, block * 8192, bytes(page))
    with connect(line.server.dsn("postgres"), autocommit=False) as connection:
        connection.execute("create extension pg_buffercache")
        connection.execute(
            "select pg_buffercache_evict(bufferid) from pg_buffercache where relblocknumber < 50"
        )
        connection.rollback()


def test_the_story_is_true(line: CommandLine) -> None:
    printed: list[str] = []
    for kind, mark, text in BLOCK.findall(STORY.read_text()):
        if kind == "sql":
            with connect(line.server.dsn("postgres")) as connection:
                cursor = connection.execute(text.encode())
                if mark == " check":
                    assert cursor.fetchone() == (True,)
                if mark == " damage":
                    flip(line, *(cursor.fetchone() or ()))
            continue
        for command in re.findall(r"^\$ knockwood (.*)$", text, re.MULTILINE):
            ended = line.run(*command.split())
            assert ended.status == int(mark or 0), f"{command}\n{ended.out}\n{ended.err}"
            printed.append(" ".join(ended.out.split()))
    _, found, shown, applied, _ = printed
    assert "block 2" in found
    assert "write back the" in shown
    assert "SHARE UPDATE" in shown
    assert "a new full backup shortens the next recovery" in applied
    assert line("recover", "--check", "page_checksums")["plan"]["steps"] == []
    line.assert_nothing_left()
