"""Good images of pages for which no clone is made: out of the backup, and out of the WAL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

from fix_repair import Site, site_of
from knockwood.integrity.check import Budget
from knockwood.model import Lsn
from knockwood.operations.protect import take
from knockwood.postgres.pages import bad_pages, decode_header
from knockwood.recover.pages_cold import cold_images
from knockwood.recover.pages_facts import NOTHING_KNOWN
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
