"""A critical table's heap and index pages go bad on disk while the shop is busy."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from knockwood.drill import faults
from knockwood.drill.sandbox import Sandbox, sandbox
from knockwood.drill.scenarios.base import Scale, Scenario, blocks_named, gate, protect_under_load, watch
from knockwood.drill.scenarios.live import Played, finish, repair
from knockwood.drill.scorecard import Scorecard, Seconds
from knockwood.drill.story import Kind, Story
from knockwood.host import clock

_HEAP_PAGES = 5
_INDEX_PAGES = 2


@dataclass(frozen=True, slots=True)
class _Damage:
    relation: str
    path: str
    blocks: frozenset[int]


def play(story: Story, scale: Scale, seed: int, parent: Path | None = None) -> Scorecard:
    """Run the scenario in a sandbox of its own; returns its scorecard."""
    with sandbox(orders=scale.orders, clients=scale.clients, seed=seed, parent=parent) as box:
        healthy = protect_under_load(box, story, scale)
        struck = clock.monotonic()
        damages = _strike(box, random.Random(seed))
        told = ", ".join(f"{len(damage.blocks)} pages of {damage.relation}" for damage in damages)
        story.say(Kind.FAULT, f"a failing disk flips bits in {told}")
        report, detect = watch(box, story, struck)
        exact = all(blocks_named(report.findings, d.relation) == d.blocks for d in damages)
        diagnosed = clock.monotonic() - struck
        story.say(
            Kind.FOUND,
            "cause: damage on disk; every page that was hit is named" if exact else "not all named",
        )
        clock.sleep(scale.aftermath)  # people read the page before they act; the shop goes on meanwhile
        repaired = repair(box, story, report.findings)
        played = Played(
            healthy,
            report,
            bool(report.findings) and report.findings[0].check == "page_checksums",
            (gate("all damage named", exact, f"{len(report.findings)} findings"),),
            repaired,
        )
        seconds = Seconds(detect, diagnosed, clock.monotonic() - struck)
        return finish(box, story, CORRUPT_TABLE, seed, struck, played, seconds)


def _strike(box: Sandbox, chance: random.Random) -> tuple[_Damage, ...]:
    """Flip bits in cold pages on disk, and have the server forget its copies in memory."""
    damages = []
    for relation, count in (("orders", _HEAP_PAGES), ("orders_pkey", _INDEX_PAGES)):
        [(path, size)] = box.sql(
            f"select pg_relation_filepath('{relation}'), pg_relation_size('{relation}') / 8192"
        )
        # The first part of the table holds the oldest orders, which are read but no longer written:
        # a page in use would be written over from memory and heal itself.
        reach = range(1, max(count + 1, int(str(size)) // 3))
        damages.append(_Damage(relation, str(path), frozenset(chance.sample(reach, count))))
    box.sql("checkpoint")
    for _ in range(2):  # forget, damage, and forget what was read in between
        for damage in damages:
            _forget(box, damage.relation)
        if _ == 0:
            for damage in damages:
                for block in sorted(damage.blocks):
                    faults.bit_flip(
                        box.server.data_directory, damage.path, block, offset=chance.randrange(3000, 8000)
                    )
    return tuple(damages)


def _forget(box: Sandbox, relation: str) -> None:
    box.sql(
        "select pg_buffercache_evict(bufferid) from pg_buffercache"
        f" where relfilenode = pg_relation_filenode('{relation}')"
        " and reldatabase = (select oid from pg_database where datname = current_database())"
    )


CORRUPT_TABLE = Scenario(
    name="corrupt-table",
    title="A critical table corrupted on disk",
    about=(
        "A disk flips bits in heap and index pages of the orders table while clients write. Every damaged page"
        " must be named and mended in the running cluster, and no promised commit lost."
    ),
    play=play,
)
