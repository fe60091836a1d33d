"""A maintenance script ruins a table, and the newest backup is older than much good work."""

from __future__ import annotations

from pathlib import Path

from knockwood.drill.sandbox import DATABASE, Sandbox, sandbox
from knockwood.drill.scenarios.base import (
    Scale,
    Scenario,
    check_restored,
    clean,
    gate,
    missing,
    protect_under_load,
    restore_beside,
    restored_server,
    watch,
)
from knockwood.drill.scorecard import Scorecard, Seconds
from knockwood.drill.story import Kind, Story
from knockwood.drill.workload import INVARIANTS
from knockwood.host import clock
from knockwood.postgres.connection import connect, translated
from knockwood.repository.targets import BeforeXid

# The script was meant for one product; its WHERE clause was lost.
SCRIPT = "update order_lines set quantity = quantity + 1 where line = 1"

# Who wrote the rows that break the invariant? The row versions themselves say (xmin).
_WRITERS = f"""
select l.xmin::text::bigint as xid, count(*)
from order_lines l
where l.order_id in (select id from ({INVARIANTS["order total equals its lines"]}) broken)
group by 1 order by 2 desc limit 3
"""


def play(story: Story, scale: Scale, seed: int, parent: Path | None = None) -> Scorecard:
    """Run the scenario in a sandbox of its own; returns its scorecard."""
    with sandbox(orders=scale.orders, clients=scale.clients, seed=seed, parent=parent) as box:
        healthy = protect_under_load(box, story, scale)
        script_began = clock.monotonic()
        guilty, rows = _run_script(box)
        struck = clock.monotonic()
        story.say(Kind.FAULT, f"a maintenance script without its WHERE clause changes {rows:,} order lines")
        report, detect = watch(box, story, struck)
        suspects = box.sql(_WRITERS)
        accused = int(str(suspects[0][0])) if suspects else 0
        diagnosed = clock.monotonic() - struck
        story.say(
            Kind.FOUND, f"the broken rows were written by transaction {accused} ({_share(suspects)} of them)"
        )
        clock.sleep(scale.aftermath)  # people read the page before they act; the shop goes on meanwhile
        restore_beside(box, story, BeforeXid(accused))
        restored = clock.monotonic() - struck
        box.workload.stop()
        with restored_server(box) as server:
            after = check_restored(box, server, story)
            promises = box.witness.promises()
            before = tuple(entry for entry in promises if entry.at < script_began)
            lost_before = missing(before, server.dsn(DATABASE))
            lost = missing(promises, server.dsn(DATABASE), box.dsn)
            later = missing(promises, server.dsn(DATABASE))
        verified = clock.monotonic() - struck
        _tell_loss(story, len(before), lost_before, later)
        counters = box.workload.counters
        return Scorecard(
            scenario=ROGUE_SCRIPT.name,
            title=ROGUE_SCRIPT.title,
            seed=seed,
            seconds=Seconds(detect, diagnosed, restored, verified),
            cause_first=accused == guilty,
            acknowledged_commits=len(promises),
            good_transactions_lost=lost + lost_before,
            later_work_kept=later,
            failed_requests=counters.failed,
            longest_stall=counters.longest_stall,
            findings=tuple(finding.summary for finding in report.findings),
            gates=(
                gate(
                    "silent while healthy",
                    not healthy.findings,
                    f"{len(healthy.findings)} findings before the fault",
                ),
                gate("the script was found", bool(report.findings), f"{len(report.findings)} findings"),
                gate(
                    "the right transaction accused", accused == guilty, f"accused {accused}, ran as {guilty}"
                ),
                gate(
                    "no acknowledged commit lost",
                    lost + lost_before == 0,
                    f"{lost + lost_before} of {len(promises)}",
                ),
                clean(after),
            ),
        )


def _tell_loss(story: Story, promised: int, lost: int, later: int) -> None:
    story.say(
        Kind.PROVED if lost == 0 else Kind.FAILED,
        f"the witness: {promised:,} commits promised before the script, {lost} missing in the restored shop",
    )
    story.say(Kind.PROVED, f"{later:,} later good transactions live on in production, which was not touched")


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


def _share(suspects: list[tuple[object, ...]]) -> str:
    counts = [int(str(count)) for _, count in suspects]
    return f"{counts[0] / sum(counts):.0%}" if counts else "none"


ROGUE_SCRIPT = Scenario(
    name="rogue-script",
    title="A maintenance script ruins a table",
    about=(
        "A script without its WHERE clause rewrites a table; the newest backup lacks the recent WAL. The broken rows"
        " must be noticed, their writer named, and the cluster restored beside production to just before it."
    ),
    play=play,
)
