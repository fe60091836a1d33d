"""Kill -9 while a table comes back in its place: it has or it has not, and resuming finds out which."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_cli import CommandLine, command_line
from fix_clones import one
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.postgres.connection import connect
from knockwood.postgres.server import SUPERUSER
from knockwood.settings import load

if TYPE_CHECKING:
    from knockwood.postgres.binaries import Programs

_ROWS = 20_000
_SHOP = f"""
create table orders (id int primary key, note text);
insert into orders select i, 'order ' || i from generate_series(1, {_ROWS}) i;
"""


@pytest.fixture
def line(
    shared_folder: Path, templates: Callable[[int, int], Path], installations: dict[int, Programs]
) -> Iterator[CommandLine]:
    with command_line(shared_folder, templates(18, 1), installations[18]) as made:
        made.init()
        made.edit("user=knockwood", f"user={SUPERUSER}")
        yield made


def culprit(line: CommandLine, sql: str) -> int:
    with connect(line.server.dsn("postgres")) as connection, connection.transaction():
        connection.execute(sql.encode())
        row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
    assert row is not None
    return int(row[0])


def there(line: CommandLine) -> int | None:
    """How many orders there are; None without the table. Waits for what a killed run's backend still does."""
    dsn = line.server.dsn("postgres")
    if one(dsn, "select to_regclass('orders') is null"):
        return None
    return int(one(dsn, "select count(*) from orders"))


def wait_for(line: CommandLine, known: set[Path], words: str, alive: Callable[[], bool]) -> None:
    """Until a new journal holds the words, or the command has ended."""
    while alive():
        for path in (line.state / "recoveries").glob("*/journal.jsonl"):
            if path not in known and words in path.read_text():
                return
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("sql", ["truncate orders", "drop table orders"])
def test_killed_at_each_step_it_is_resumed(line: CommandLine, sql: str) -> None:
    with connect(line.server.dsn("postgres")) as connection:
        connection.execute(_SHOP.encode())
    line("backup")
    xid = culprit(line, sql)
    gone = None if sql.startswith("drop") else 0
    cluster = replace(Cluster.of(load(line.config), "shop"), state=line.state)
    bring_up_to_date(cluster, cluster.repository())
    words = ("restore", "--table", "postgres.public.orders", "--to", f"before-{xid}", "--in-place", "--apply")
    for point in ('"begun"', '"started"', '"name":"done"', '"name":"xid"', '"done"', '"verified"'):
        known = set((line.state / "recoveries").glob("*/journal.jsonl"))
        child = line.start(*words)
        wait_for(line, known, point, lambda child=child: child.poll() is None)  # type: ignore[misc]
        child.kill()
        child.communicate()
        left = there(line)
        assert left in (gone, _ROWS)
        (journal,) = set((line.state / "recoveries").glob("*/journal.jsonl")) - known
        if '"finished"' not in journal.read_text():
            ended = line.run("recover", "--resume")
            assert '"finished"' in journal.read_text(), f"{point}: {ended.out}\n{ended.err}"
        assert there(line) == _ROWS, point
        assert (
            one(line.server.dsn("postgres"), "select count(*) from orders where note = 'order ' || id")
            == _ROWS
        )
        with connect(line.server.dsn("postgres")) as connection:
            connection.execute(sql.encode())
    line.run(*words[:-1])  # the next clone removes what those of the dead left
    line.assert_nothing_left()
