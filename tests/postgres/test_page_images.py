"""Good images of pages for which no clone is made: out of the backup, the WAL, and the shadow."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from fix_repair import WORK, Site, flipped, load, site_of
from knockwood.clone.shadow_server import Keeper
from knockwood.integrity.check import Budget
from knockwood.model import Lsn, Verdict
from knockwood.operations import shadow_steps
from knockwood.operations.check import check
from knockwood.operations.freshness import bring_up_to_date
from knockwood.operations.page_repair import PageRepairs
from knockwood.operations.protect import take
from knockwood.postgres.connection import connect
from knockwood.postgres.pages import bad_pages, decode_header
from knockwood.postgres.server import LocalServer
from knockwood.recover.pages_cold import cold_images
from knockwood.recover.pages_facts import NOTHING_KNOWN, flush_wal
from knockwood.recover.plan.page_masks import same
from knockwood.repository.backups.listing import list_backups

if TYPE_CHECKING:
    from fix_server import ServerFactory


def cold(
    site: Site, name: str, blocks: list[int], beyond: Mapping[int, Lsn] = NOTHING_KNOWN
) -> Mapping[int, bytes]:
    subject = site.cluster.subject(Budget(), repository=site.repository)
    chain = list_backups(site.repository)
    good, wal = cold_images(subject, site.repository, chain, site.target(name), blocks, beyond)
    assert all(each.known for each in wal.values())
    return good.images if good else {}


def test_pages_that_nobody_has_changed(new_server: ServerFactory) -> None:
    """They come from the backup, unless the WAL names them or has cut the table short."""
    server = new_server(18, summarize_wal="on")
    with site_of(server) as site:
        path = site.target("other").path
        site.settle()
        pages = {block: site.page(path, block) for block in (1, 3, 5)}
        site.sql("update other set body = 'new' where ctid = '(3,1)'")
        # Once more after its image: only a clone has that page.
        site.sql("update other set body = 'newer' where ctid = '(3,2)'")
        assert cold(site, "other", [1, 3, 5, 9999]) == {1: pages[1], 5: pages[5]}
        assert images_of(site, [1, 2], "other")[2]
        assert not images_of(site, [1, 3], "other")[2]
        with PageRepairs(site.cluster, site.repository) as repairs:
            backup, future = list_backups(site.repository)[-1].id, {3: Lsn(1 << 40)}
            found = repairs.images([backup])(site.target("other"), [1, 3], None, future)
        assert [sorted(good.images) for good in found] == [[1], []]
        assert "known to have changed" in found[-1].doubts[3]
        assert cold(site, "other", [1, 3, 5], {5: decode_header(pages[5]).lsn}) == {1: pages[1]}
        # Of an incremental backup what changed comes from it, all else from the full one.
        take(site.cluster, site.repository, incremental=True)
        site.settle()
        assert cold(site, "other", [1, 3, 5]) == pages | {3: site.page(path, 3)}
        site.sql("delete from other where ctid >= '(20,0)'")
        site.sql("vacuum (truncate on) other")
        assert cold(site, "other", [1, 3, 5]) == {}


@pytest.mark.parametrize(
    ("version", "compression"),
    [
        (18, "off"),
        (18, "pglz"),
        (15, "lz4"),
        (15, "zstd"),
        *(pytest.param(17, method, marks=pytest.mark.slow) for method in ("off", "pglz", "lz4", "zstd")),
    ],
)
def test_pages_that_their_last_record_brings_whole(
    new_server: ServerFactory, version: int, compression: str
) -> None:
    """Each as the server has it; those changed once more after their image are left to a clone."""
    server = new_server(version, wal_compression=compression)
    with site_of(server) as site:
        path = site.target("orders").path
        blocks = list(range(int(site.sql("select pg_relation_size('orders') / 8192"))))
        site.sql("delete from orders where id % 11 = 0")
        site.sql("checkpoint")
        site.sql("update orders set note = 'a longer note than before ' || id where id % 97 = 0")
        site.sql("checkpoint")
        site.sql("insert into orders select i, 1, 'more' from generate_series(5001, 5050) i")
        site.sql("select id from orders for update")
        site.sql("checkpoint")
        site.sql("vacuum orders")
        site.sql("checkpoint")
        for number in range(1, 4000, 250):
            site.sql(f"set enable_seqscan = off; update orders set note = 'once' where id = {number}")
        site.sql("set enable_seqscan = off; update orders set note = 'twice' where id = 501")
        twice = site.sql(
            "set enable_seqscan = off; select (ctid::text::point)[0]::int from orders where id = 501"
        )
        found = cold(site, "orders", blocks)
        site.settle()
        assert len(found) > 10
        assert twice not in found
        for block, page in found.items():
            disk = site.page(path, block)
            assert bad_pages(page, block, True) == []
            assert same(page, disk), block
            assert decode_header(page).lsn == decode_header(disk).lsn, block


@contextmanager
def shadowed(server: LocalServer) -> Iterator[tuple[Site, Callable[..., None]]]:
    """A site with a shadow whose server runs, and what lets it go on."""
    with site_of(server, shadowed=True) as site:
        keeper = Keeper()

        def go_on(flushed: bool = False) -> None:
            flush_wal(site.cluster.subject(Budget(), repository=site.repository), "postgres")
            bring_up_to_date(site.cluster, site.repository)
            shadow_steps.step(site.cluster, site.repository, check=False, keeper=keeper)
            if flushed and keeper.server is not None:
                with connect(keeper.server.dsn()) as connection:
                    connection.execute("checkpoint")

        try:
            go_on()
            yield site, go_on
        finally:
            keeper.end()


def images_of(site: Site, blocks: list[int], name: str = "orders") -> tuple[Mapping[int, bytes], Lsn, bool]:
    """Images of pages that nobody can read, from where on WAL was read for them, and whether no clone was needed."""
    backup = list_backups(site.repository)[-1].id
    with PageRepairs(site.cluster, site.repository) as repairs:
        found = repairs.images([backup])(site.target(name), blocks, unread=True)
        assert not found[-1].doubts
        images = {block: image for good in found for block, image in good.images.items()}
        return images, max(good.since for good in found), not repairs._clones


@pytest.mark.parametrize("version", [15, pytest.param(17, marks=pytest.mark.slow), 18])
def test_pages_that_the_shadow_has(new_server: ServerFactory, version: int) -> None:
    """As the server had them; WAL that lost_writes has compared is not read again."""
    server = new_server(version)
    with shadowed(server) as (site, go_on):
        path = site.target("orders").path
        blocks = [2, 3, 5, 7]
        for note in ("once", "twice", "thrice"):
            site.sql(f"update orders set note = '{note}' where id % 3 = 0")
        site.settle()
        go_on()
        site.sql("update orders set note = 'last' where id % 5 = 0")
        site.settle()
        images, since, no_clone = images_of(site, blocks)
        assert no_clone
        assert since == list_backups(site.repository)[-1].start_lsn
        assert all(same(images[block], site.page(path, block)) for block in blocks)
        # Once its WAL was compared, only what the shadow may not have on its disk yet is read.
        assert check(site.cluster, ["lost_writes"]).verdict is Verdict.HELD
        site.sql("update orders set note = 'later' where ctid = '(3,1)'")
        go_on()
        images, since, no_clone = images_of(site, blocks)
        assert no_clone
        assert since > list_backups(site.repository)[-1].start_lsn
        site.settle()
        assert all(same(images[block], site.page(path, block)) for block in blocks)
        # A backup that is younger than what the shadow has on its disk tells nothing of that.
        site.sql("update orders set note = 'latest' where id % 3 = 1")
        take(site.cluster, site.repository)
        go_on()
        images, since, no_clone = images_of(site, blocks)
        assert no_clone
        assert since < list_backups(site.repository)[-1].start_lsn
        site.settle()
        assert all(same(images[block], site.page(path, block)) for block in blocks)


def test_a_page_that_was_mended_of_an_old_image_is_not_the_shadows(new_server: ServerFactory) -> None:
    """A reader of an old page logs its image; what the page is mended with is in no WAL: the shadow is wrong there."""
    server = new_server(18)
    with shadowed(server) as (site, go_on):
        orders = site.path("orders")
        site.sql("update orders set note = 'unread' where ctid >= '(6,0)' and ctid < '(7,0)' and id % 2 = 0")
        site.settle()
        old = site.page(orders, 6)
        site.sql("update orders set note = 'newer' where id between 1 and 4000 and id % 5 = 0")
        site.damage(orders, 6, old)
        site.sql("select count(*) from orders where length(note) > 0")
        plan = site.plan((orders, 6))
        assert "it was read, and nothing more" in str(plan.as_json())
        assert site.execute(plan).verdict is Verdict.HELD
        site.settle()
        assert check(site.cluster, ["lost_writes"]).verdict is Verdict.HELD
        take(site.cluster, site.repository)
        go_on(flushed=True)
        good = {block: site.page(orders, block) for block in (6, 8)}
        subject = site.cluster.subject(Budget(), repository=site.repository)
        with PageRepairs(site.cluster, site.repository) as repairs:
            backup = list_backups(site.repository)[-1].id
            warm = repairs._warm(backup, site.target("orders"), [6, 8], NOTHING_KNOWN)
        assert warm is not None
        assert set(warm.images) == {8}
        # The memory is what tells; without it all WAL since the shadow's backup does.
        shutil.rmtree(subject.state / "audited")  # type: ignore[operator]
        with PageRepairs(site.cluster, site.repository) as repairs:
            warm = repairs._warm(backup, site.target("orders"), [6, 8], NOTHING_KNOWN)
        assert warm is not None
        assert set(warm.images) == {8}
        images, _, _ = images_of(site, [6, 8])
        assert all(same(images[block], good[block]) for block in good)


def test_pages_are_mended_with_what_the_shadow_has(new_server: ServerFactory) -> None:
    """While others work; a page that somebody can read by then is judged by all of the WAL."""
    server = new_server(18)
    with shadowed(server) as (site, go_on):
        orders = site.path("orders")
        site.sql(
            "update orders set note = 'newer' where id % 3 = 0; update orders set note = 'twice' where id % 6 = 0"
        )
        site.settle()
        go_on()
        assert check(site.cluster, ["lost_writes"]).verdict is Verdict.HELD
        server.stop("fast")
        for block in (3, 8, 9):
            site.put(orders, block, flipped(site.page(orders, block)))
        server.start()
        plan = site.plan((orders, 3), (orders, 8), (orders, 9))
        assert [step.arguments["procedure"] for step in plan.steps] == ["write"]
        with load(site, statements=tuple(text for text in WORK if "orders" not in text)) as done:
            recovery = site.execute(plan)
            assert done[0]
        assert recovery.verdict is Verdict.HELD, recovery.as_json()
        assert recovery.results[0].values["mended"] == [3, 8, 9]
        assert site.sql("select count(*) from orders where note = 'twice'") == 4000 // 6
