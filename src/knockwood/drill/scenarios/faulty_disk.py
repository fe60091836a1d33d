"""A failing disk: flipped bits, torn, zeroed, lost and misdirected writes over several tables, under load."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from knockwood.drill import faults
from knockwood.drill.sandbox import Sandbox, sandbox
from knockwood.drill.scenarios.base import Scale, Scenario, gate, protect_under_load, watch
from knockwood.drill.scenarios.live import Played, finish, repair
from knockwood.drill.scorecard import Scorecard, Seconds
from knockwood.drill.story import Kind, Story
from knockwood.errors import PostgresError
from knockwood.host import clock
from knockwood.model import Finding
from knockwood.postgres.pages import decode_header

DETECTORS = ("page_checksums", "lost_writes", "heap_index_counts", "invariants")

# The seed orders at the start of these tables are read, and no longer written by anybody.
_COLD = ("orders", "order_lines")
_GROWING = "payments"
"""Rows are only added here: a page that is full is never written again."""

_ROW_BYTES = 128
"""More than one of its rows takes."""


@dataclass(frozen=True, slots=True)
class _Page:
    relation: str
    path: str
    block: int
    kind: str


def play(story: Story, scale: Scale, seed: int, parent: Path | None = None) -> Scorecard:
    """Run the scenario in a sandbox of its own; returns its scorecard."""
    chance = random.Random(seed)
    with sandbox(orders=scale.orders, clients=scale.clients, seed=seed, parent=parent) as box:
        healthy = protect_under_load(box, story, scale)
        stale = _remember(box, scale)
        struck = clock.monotonic()
        damaged = _strike(box, chance, stale)
        told = ", ".join(f"{page.kind} of {page.relation}" for page in damaged)
        story.say(Kind.FAULT, f"a failing disk: {told}")
        report, detect = watch(box, story, struck, names=DETECTORS)
        unnamed = _unnamed(damaged, report.findings)
        diagnosed = clock.monotonic() - struck
        story.say(
            Kind.FOUND if not unnamed else Kind.FAILED,
            "every page that was hit is named" if not unnamed else f"not named: {', '.join(unnamed)}",
        )
        clock.sleep(scale.aftermath)  # people read the page before they act; the shop goes on meanwhile
        repaired = repair(box, story, report.findings)
        named = gate("all damage named", not unnamed, f"{len(damaged)} pages, {len(unnamed)} not named")
        played = Played(healthy, report, not unnamed, (named,), repaired)
        seconds = Seconds(detect, diagnosed, clock.monotonic() - struck)
        return finish(box, story, FAULTY_DISK, seed, struck, played, seconds)


def _remember(box: Sandbox, scale: Scale) -> tuple[_Page, bytes]:
    """The image on disk of a page that is being filled; returns once it is full, and has been for a while."""
    limit = clock.monotonic() + 60
    found: tuple[_Page, bytes] | None = None
    while clock.monotonic() < limit:
        box.sql("checkpoint")
        found = found or _filling(box)
        if found is not None:
            page, _ = found
            if _free(faults.read_block(box.server.data_directory, page.path, page.block)) < _ROW_BYTES:
                clock.sleep(scale.warm_up / 4)
                return found
        clock.sleep(scale.warm_up / 4)
    raise PostgresError(f"no page of {_GROWING} was filled within a minute")


def _filling(box: Sandbox) -> tuple[_Page, bytes] | None:
    """A page with room for more rows. Many clients have one each, and empty ones are made in advance."""
    [(path, size)] = box.sql(
        f"select pg_relation_filepath('{_GROWING}'), pg_relation_size('{_GROWING}') / 8192"
    )
    for block in range(int(str(size)) - 1, 0, -1):
        image = faults.read_block(box.server.data_directory, str(path), block)
        if any(image) and 2048 < _free(image) < 7168:
            return _Page(_GROWING, str(path), block, "a lost write"), image
    return None


def _free(image: bytes) -> int:
    """Bytes of a page that no row takes."""
    header = decode_header(image)
    return header.upper - header.lower


def _strike(box: Sandbox, chance: random.Random, stale: tuple[_Page, bytes]) -> tuple[_Page, ...]:
    """Damage the pages on disk while the server writes on, and have it forget what it holds of them."""
    folder = box.server.data_directory
    paths = {name: _cold_blocks(box, name) for name in _COLD}
    picked = {name: chance.sample(range(1, blocks), 3) for name, (_, blocks) in paths.items()}
    kinds = {
        "orders": ("a flipped bit", "a torn page", "a zeroed page"),
        "order_lines": ("a flipped bit", "a misdirected write", "a zeroed page"),
    }
    pages = [
        _Page(name, paths[name][0], block, kind)
        for name in _COLD
        for block, kind in zip(picked[name], kinds[name], strict=True)
    ]
    box.sql("checkpoint")
    _forget(box)
    for page in pages:
        other = 1 + page.block % (paths[page.relation][1] - 1)
        if page.kind == "a flipped bit":
            faults.bit_flip(folder, page.path, page.block, offset=chance.randrange(3000, 8000))
        elif page.kind == "a torn page":
            faults.torn_block(folder, page.path, page.block, faults.read_block(folder, page.path, other))
        elif page.kind == "a zeroed page":
            faults.zero_block(folder, page.path, page.block)
        else:
            faults.misdirect(folder, page.path, other, page.path, page.block)
    faults.stale_block(folder, stale[0].path, stale[0].block, stale[1])
    _forget(box)
    return (*pages, stale[0])


def _cold_blocks(box: Sandbox, name: str) -> tuple[str, int]:
    [(path, size)] = box.sql(f"select pg_relation_filepath('{name}'), pg_relation_size('{name}') / 8192")
    return str(path), max(8, int(str(size)) // 3)


def _forget(box: Sandbox) -> None:
    names = ", ".join(f"pg_relation_filenode('{name}')" for name in (*_COLD, _GROWING))
    box.sql(
        f"select pg_buffercache_evict(bufferid) from pg_buffercache where relfilenode in ({names})"
        " and reldatabase = (select oid from pg_database where datname = current_database())"
    )


def _unnamed(pages: Iterable[_Page], findings: Iterable[Finding]) -> list[str]:
    """The damaged pages that no finding names by file and block."""
    named = {
        (finding.location.file, block)
        for finding in findings
        for block in (finding.location.block, *finding.evidence.get("blocks", ()))
        if block is not None
    }
    return [f"{p.kind} in block {p.block} of {p.relation}" for p in pages if (p.path, p.block) not in named]


FAULTY_DISK = Scenario(
    name="faulty-disk",
    title="A failing disk",
    about=(
        "A disk flips bits, tears, zeroes, loses and misdirects writes over several tables while clients write."
        " Every page must be named and mended in the running cluster, and no promised commit lost."
    ),
    play=play,
)
