"""Kill -9 at any step of a page repair under load: the next run finishes it, and no page is ever wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fix_repair import Site, flipped, load, site_of

if TYPE_CHECKING:
    from fix_server import ServerFactory

CHILD = Path(__file__).resolve().parents[1] / "repair_child.py"
CASES = 20
STEPS = 18
OTHERS = (
    "update other set body = body || 'y' where id = 1 + {n} * 31 % 3000",
    "select count(*) from orders where customer = {n} % 50 and id < 0",
)


def run(site: Site, pages: list[tuple[str, int]], kill_at: int) -> dict[str, Any] | None:
    """What the repair told, or None if it was killed."""
    settings = site.cluster.settings
    words = {
        "dsn": settings.dsn,
        "repository": settings.repository,
        "data_directory": str(settings.data_directory),
        "programs": str(settings.programs),
        "folder": str(site.folder),
        "pages": pages,
        "kill_at": kill_at,
    }
    done = subprocess.run(
        [sys.executable, CHILD, json.dumps(words)], capture_output=True, text=True, check=False, timeout=240
    )
    if done.returncode == -9:
        return None
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills(new_server: ServerFactory) -> None:
    chance = random.Random(18)
    with site_of(new_server(18, wal_keep_size="2GB")) as site:
        orders = site.path("orders")
        site.sql("update orders set note = 'newer' where id % 3 = 0")
        killed = 0
        for _ in range(CASES):
            kind = chance.choice(["flip", "torn", "zero"])
            block = chance.randrange(2, 40)
            site.settle()
            expected = site.sql("select sum(hashtextextended(o::text, 0)) from orders o")
            good = site.page(orders, block)
            bad = {
                "flip": flipped(good, chance.randrange(8192), chance.randrange(8)),
                "torn": good[:4096] + bytes(chance.randbytes(4096)),
                "zero": bytes(8192),
            }[kind]
            site.damage(orders, block, bad)
            with load(site, statements=OTHERS):
                answer = run(site, [(orders, block)], chance.randrange(1, STEPS))
                killed += answer is None
                if answer is None:
                    answer = run(site, [(orders, block)], 0)
            assert answer is not None
            if answer["steps"]:
                assert answer["verdict"] == "held", json.dumps(answer, indent=1)
            assert site.sql("select sum(hashtextextended(o::text, 0)) from orders o") == expected, (
                kind,
                block,
            )
            assert site.sql("select count(*) from pg_extension") == 1
        assert killed >= CASES // 3
