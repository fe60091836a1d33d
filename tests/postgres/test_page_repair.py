"""Damaged pages of a running server, mended in place under load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fix_repair import WORK, Site, flipped, load, site_of
from knockwood.errors import PostgresError
from knockwood.model import Verdict
from knockwood.model.recovery import Outcome, Plan

if TYPE_CHECKING:
    from fix_server import ServerFactory

FINGERPRINT = "select count(*) || ' ' || coalesce(sum(hashtextextended(o::text, 0)), 0) from orders o"


def mend(site: Site, plan: Plan) -> str:
    assert plan.steps, plan.refused
    recovery = site.execute(plan)
    assert recovery.complete, recovery.as_json()
    assert recovery.verdict is Verdict.HELD, recovery.as_json()
    return " ".join(result.detail for result in recovery.results)


@pytest.mark.parametrize("version", [15, pytest.param(17, marks=pytest.mark.slow), 18])
def test_pages_that_nobody_can_read(new_server: ServerFactory, version: int) -> None:
    """A flipped bit, a torn page, one written to the wrong place, and one of TOAST; nobody waits."""
    server = new_server(version)
    with site_of(server) as site:
        orders, toast = site.path("orders"), site.path(site.toast())
        site.settle()
        old = site.page(orders, 8)
        site.sql("update orders set note = 'new' where id between 1 and 4000 and id % 7 = 0")
        server.stop("fast")
        site.put(orders, 3, flipped(site.page(orders, 3)))
        site.put(orders, 8, old[:4096] + site.page(orders, 8)[4096:])
        site.put(orders, 9, site.page(orders, 12))
        site.put(toast, 5, flipped(site.page(toast, 5), 5000, 1))
        server.start()
        plan = site.plan((orders, 3), (orders, 8), (orders, 9), (toast, 5), (orders, 4))
        assert len(plan.steps) == 2
        assert not plan.refused
        assert {step.arguments["procedure"] for step in plan.steps} == {"write"}
        assert "checksum of block 12" in str(plan.as_json())
        with load(site) as done:
            recovery = site.execute(plan)
            assert done[0]
        assert recovery.verdict is Verdict.HELD, recovery.as_json()
        assert site.failures
        assert all(result.blocked_seconds == 0 for result in recovery.results)
        damage = {k: v for result in recovery.results for k, v in result.values["damage"].items()}
        assert damage["3"] == "one bit differs, in byte 8000"
        assert damage["8"].startswith("torn")
        assert site.sql("select count(*) from pg_extension") == 1
        again = site.plan((orders, 3), (toast, 5))
        assert not again.steps
        assert not again.refused
        assert recovery.results[0].outcome is Outcome.DONE


def test_pages_that_can_be_read_but_are_wrong(new_server: ServerFactory) -> None:
    """Zeroes and an old page (lost write) in the table and in TOAST, with nothing in the buffers; then a page
    that is bad on disk and good in the buffers."""
    server = new_server(18)
    with site_of(server) as site:
        orders, toast = site.path("orders"), site.path(site.toast())
        site.settle()
        old = site.page(orders, 6)
        site.sql("update orders set note = 'newer' where id between 1 and 4000 and id % 5 = 0")
        expected = site.sql(FINGERPRINT)
        server.stop("fast")
        site.put(orders, 2, bytes(8192))
        site.put(orders, 6, old)
        site.put(toast, 3, bytes(8192))
        server.start()
        # The bad pages come into the buffers, and are looked at.
        assert site.sql("select count(*) from orders where length(note) > 0") < 4000
        with pytest.raises(PostgresError, match="missing chunk"):
            site.sql(FINGERPRINT)
        plan = site.plan((orders, 2), (orders, 6), (toast, 3))
        assert {step.arguments["procedure"] for step in plan.steps} == {"replace"}, plan.as_json()
        others = tuple(text for text in WORK if "orders" not in text)
        with load(site, statements=(*others, "select count(*) from orders where id < 100")):
            recovery = site.execute(plan)
        assert recovery.verdict is Verdict.HELD, recovery.as_json()
        assert site.sql(FINGERPRINT) == expected
        assert all(0 < result.blocked_seconds < 30 for result in recovery.results)
        site.settle()
        site.sql("select sum(length(note)) from orders")
        server_page = site.page(orders, 7)
        site.put(orders, 7, flipped(server_page))
        plan = site.plan((orders, 7))
        assert [step.arguments["procedure"] for step in plan.steps] == ["save buffer"], plan.as_json()
        mend(site, plan)
        assert site.page(orders, 7) == server_page
        assert site.sql(FINGERPRINT) == expected
