"""A maintenance script ruins a table, and the newest backup is older than much good work."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from knockwood.drill.sandbox import Sandbox, sandbox
from knockwood.drill.scenarios.base import Scale, Scenario, gate, protect_under_load, watch
from knockwood.drill.scenarios.live import Played, finish, take_back
from knockwood.drill.scorecard import Scorecard, Seconds
from knockwood.drill.story import Kind, Story
from knockwood.drill.workload import INVARIANTS
from knockwood.host import clock
from knockwood.operations.blame import blame
from knockwood.operations.blame_rows import Question
from knockwood.postgres.connection import connect, translated

# The script was meant for one product; its WHERE clause was lost.
SCRIPT = "update order_lines set quantity = quantity + 1 where line = 1"

# Lines of the orders that break the invariant: who wrote them?
_BROKEN = f"order_id in (select id from ({INVARIANTS['order total equals its lines']}) broken)"


def play(story: Story, scale: Scale, seed: int, parent: Path | None = None) -> Scorecard:
    """Run the scenario in a sandbox of its own; returns its scorecard."""
    with sandbox(orders=scale.orders, clients=scale.clients, seed=seed, parent=parent) as box:
        healthy = protect_under_load(box, story, scale)
        guilty, rows = _run_script(box)
        struck = clock.monotonic()
        story.say(Kind.FAULT, f"a maintenance script without its WHERE clause changes {rows:,} order lines")
        report, detect = watch(box, story, struck)
        accused, share = _accuse(box)
        diagnosed = clock.monotonic() - struck
        story.say(Kind.FOUND, f"the broken rows were written by transaction {accused} ({share:.0%} of them)")
        clock.sleep(scale.aftermath)  # people read the page before they act; the shop goes on meanwhile
        reverted = take_back(box, story, (accused,))
        gates = (
            gate("the script was found", bool(report.findings), f"{len(report.findings)} findings"),
            gate("the right transaction accused", accused == guilty, f"accused {accused}, ran as {guilty}"),
        )
        played = Played(healthy, report, accused == guilty, gates, reverted)
        seconds = Seconds(detect, diagnosed, clock.monotonic() - struck)
        return finish(box, story, ROGUE_SCRIPT, seed, struck, played, seconds)


def _accuse(box: Sandbox) -> tuple[int, float]:
    """The transaction that wrote most of the broken rows, as `knockwood blame` names it, and its share."""
    blamed = blame(box.cluster, Question.of("order_lines", _BROKEN), shown=100_000)
    writers = Counter(row.xid for row in blamed.rows)
    if not writers:
        return 0, 0.0
    [(xid, count)] = writers.most_common(1)
    return xid, count / len(blamed.rows)


def _run_script(box: Sandbox) -> tuple[int, int]:
    """Run the script as an operator would; its xid (kept from the system under test) and the rows it changed."""
    with connect(box.dsn, autocommit=False) as connection, translated():
        # The writers of these rows would wait for each other in a circle: the script takes them first.
        connection.execute("lock table products, orders, order_lines in share row exclusive mode")
        rows = connection.execute(SCRIPT).rowcount
        row = connection.execute("select pg_catalog.pg_current_xact_id()::text::bigint").fetchone()
        connection.commit()
    assert row is not None
    return int(row[0]), rows


ROGUE_SCRIPT = Scenario(
    name="rogue-script",
    title="A maintenance script ruins a table",
    about=(
        "A script without its WHERE clause rewrites a table; the newest backup lacks the recent WAL. The broken rows"
        " must be noticed, their writer named, and just its work taken back in the running cluster."
    ),
    play=play,
)
