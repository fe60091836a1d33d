"""A release with a bug writes inconsistent rows for a while, mixed with good ones."""

from __future__ import annotations

from pathlib import Path

from knockwood.drill.sandbox import Sandbox, sandbox
from knockwood.drill.scenarios.base import Scale, Scenario, gate, protect_under_load, watch
from knockwood.drill.scenarios.live import Played, finish, take_back
from knockwood.drill.scorecard import Scorecard, Seconds
from knockwood.drill.story import Kind, Story
from knockwood.drill.workload import INVARIANTS
from knockwood.host import clock
from knockwood.model import Commit
from knockwood.operations.bisect import bisect
from knockwood.operations.bisect_question import question
from knockwood.operations.blame import blame
from knockwood.operations.blame_rows import Question

_INVARIANT = "order total equals its lines"
_BROKEN = f"order_id in (select id from ({INVARIANTS[_INVARIANT]}) broken)"


def play(story: Story, scale: Scale, seed: int, parent: Path | None = None) -> Scorecard:
    """Run the scenario in a sandbox of its own; returns its scorecard."""
    with sandbox(orders=scale.orders, clients=scale.clients, seed=seed, parent=parent, discounts=True) as box:
        healthy = protect_under_load(box, story, scale)
        struck = clock.monotonic()
        box.workload.deploy(buggy=True)
        story.say(Kind.FAULT, "a new release lowers prices and forgets the total of some orders")
        report, detect = watch(box, story, struck)
        clock.sleep(scale.aftermath / 2)
        box.workload.deploy(buggy=False)
        story.say(Kind.DONE, "the release is taken back; what it wrote stays")
        clock.sleep(scale.aftermath)
        first = _bisect(box, story)
        accused = _accuse(box, story)
        diagnosed = clock.monotonic() - struck
        reverted = take_back(box, story, accused)
        guilty = {entry.xid for entry in box.witness.notes("buggy")}
        found = first is not None and first.xid in guilty
        gates = (
            gate("the first bad commit found", found, f"{first.xid if first else 'none'}"),
            gate(
                "just the guilty accused",
                set(accused) == guilty,
                f"{len(accused)} accused, {len(guilty)} guilty",
            ),
        )
        played = Played(healthy, report, found, gates, reverted)
        seconds = Seconds(detect, diagnosed, clock.monotonic() - struck)
        return finish(box, story, BAD_RELEASE, seed, struck, played, seconds)


def _bisect(box: Sandbox, story: Story) -> Commit | None:
    """Since when is it wrong? As `knockwood bisect --invariant` finds it."""
    found = bisect(box.cluster, question(box.cluster, invariant=_INVARIANT))
    first = found.first_bad
    story.say(
        Kind.FOUND if first else Kind.FAILED,
        f"bisect: among {found.commits:,} commits the first bad one is xid {first.xid} of {first.time:%H:%M:%S.%f},"
        f" found with {len(found.probes)} probes"
        if first
        else f"bisect: {found.outcome}: {'; '.join(found.notes)}",
    )
    return first


def _accuse(box: Sandbox, story: Story) -> tuple[int, ...]:
    """All transactions that wrote broken rows, as `knockwood blame` names them."""
    blamed = blame(box.cluster, Question.of("order_lines", _BROKEN), shown=100_000)
    xids = tuple(sorted({row.xid for row in blamed.rows}))
    story.say(Kind.FOUND, f"blame: {len(blamed.rows)} broken rows, written by {len(xids)} transactions")
    return xids


BAD_RELEASE = Scenario(
    name="bad-release",
    title="A release writes inconsistent rows",
    about=(
        "For a while a bug spoils some of the orders that get a discount, among good ones. The first bad commit must"
        " be found, all of them named, and just these taken back while the shop goes on."
    ),
    play=play,
)
