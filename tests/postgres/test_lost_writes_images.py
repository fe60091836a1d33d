"""Old pages that were changed once more: page and WAL agree, and the image that the change logged tells."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_checks import SHOP, found, path_of, silent, sql
from fix_server import VERSIONS
from knockwood.drill import faults
from knockwood.host import processes
from knockwood.model import Lsn, Severity

if TYPE_CHECKING:
    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer

NAME = "lost_writes"
NEWEST_BY_DEFAULT = pytest.mark.parametrize(
    "every_version", [18, *(pytest.param(major, marks=pytest.mark.slow) for major in VERSIONS if major != 18)]
)
ON_THE_PAGE = "ctid >= '(3,0)' and ctid < '(4,0)'"


def shop(new_server: ServerFactory, major: int = 18, **settings: str) -> LocalServer:
    server = new_server(major, segment_megabytes=1, wal_keep_size="200MB", max_wal_size="1GB", **settings)
    sql(server, SHOP)
    sql(server, "alter table shop set (autovacuum_enabled = off)")
    return server


def lose_a_write(
    server: LocalServer, table: str, change: str = "update shop set amount = amount + 1"
) -> None:
    """Change rows of block 3 of the shop, and put the block back as it was before."""
    with faults.offline(server) as folder:
        old = faults.read_block(folder, table, 3)
    sql(server, f"{change} where {ON_THE_PAGE} and id % 2 = 1")
    with faults.offline(server) as folder:
        assert faults.read_block(folder, table, 3) != old
        faults.stale_block(folder, table, 3, old)


@pytest.mark.parametrize(
    ("every_version", "compression"),
    [
        (18, "off"),
        (18, "pglz"),
        (15, "lz4"),
        (15, "zstd"),
        *(
            pytest.param(major, method, marks=pytest.mark.slow)
            for major in (15, 17)
            for method in ("off", "pglz")
        ),
        *(pytest.param(17, method, marks=pytest.mark.slow) for method in ("lz4", "zstd")),
    ],
)
def test_an_old_page_that_was_changed_before_a_checkpoint_is_found(
    new_server: ServerFactory, every_version: int, compression: str
) -> None:
    server = shop(new_server, every_version, wal_compression=compression)
    table = path_of(server, "shop")
    silent(server, NAME)
    lose_a_write(server, table)
    before = Lsn.parse(sql(server, "select pg_current_wal_insert_lsn()::text"))
    sql(server, f"update shop set note = 'since' where {ON_THE_PAGE} and id % 2 = 0; checkpoint")
    sql(server, "update shop set note = 'later' where id > 4000; checkpoint")
    [finding] = found(server, NAME)
    assert (finding.location.file, finding.location.block) == (table, 3)
    assert (finding.evidence["kind"], finding.severity) == ("stale", Severity.CRITICAL)
    assert "changed again" in finding.summary
    page, record, image = (Lsn.parse(finding.evidence[key]) for key in ("page_lsn", "last_record", "image"))
    assert page <= record < before <= image
    # A message of another image is no answer, nor one of another prefix; the one of this is.
    said = finding.evidence["once_mended"]
    sql(server, said.replace(f" 3 {image}", f" 4 {image}"))
    sql(server, said.replace("'knockwood'", "'somebody'"))
    assert len(found(server, NAME)) == 1
    sql(server, said)
    silent(server, NAME)
    sql(server, "checkpoint")
    silent(server, NAME)


def test_an_old_page_that_was_read_is_found_as_well(new_server: ServerFactory) -> None:
    """What a reader logs is an image for hint bits, twice here, and the first of them tells."""
    server = shop(new_server)
    table = path_of(server, "shop")
    lose_a_write(server, table)
    for _ in range(2):
        sql(server, "select count(*) from shop; checkpoint")
        sql(server, f"update shop set note = 'since' where {ON_THE_PAGE} and id % 2 = 0; checkpoint")
    [finding] = found(server, NAME)
    assert (finding.location.block, finding.evidence["kind"]) == (3, "stale")


def test_what_was_lost_after_an_earlier_run_is_found(new_server: ServerFactory, tmp_path: Path) -> None:
    """The page was right when the WAL of its last change was read; the machine's cache had it, the disk had not."""
    server = shop(new_server)
    table = path_of(server, "shop")
    sql(server, "create extension pg_buffercache; checkpoint")
    old = faults.read_block(server.data_directory, table, 3)
    sql(server, f"update shop set amount = amount + 1 where {ON_THE_PAGE} and id % 2 = 1; checkpoint")
    silent(server, NAME, state=tmp_path)
    sql(server, "update other set body = 'y'; checkpoint")
    silent(server, NAME, state=tmp_path)
    sql(
        server,
        "select pg_buffercache_evict(bufferid) from pg_buffercache"
        " where relfilenode = pg_relation_filenode('shop')",
    )
    assert faults.read_block(server.data_directory, table, 3) != old
    faults.stale_block(server.data_directory, table, 3, old)
    sql(server, f"update shop set note = 'since' where {ON_THE_PAGE} and id % 2 = 0; checkpoint")
    for _ in range(2):
        [finding] = found(server, NAME, state=tmp_path)
        assert (finding.location.block, finding.evidence["kind"]) == (3, "stale")
        begin = str(finding.evidence["wal"]).partition("..")[0]
        assert Lsn.parse(finding.evidence["last_record"]) < Lsn.parse(begin)
    sql(server, finding.evidence["once_mended"])
    silent(server, NAME, state=tmp_path)


def test_of_an_index_too_and_it_ends_with_a_new_file(new_server: ServerFactory) -> None:
    server = shop(new_server)
    index = path_of(server, "shop_customer")
    with faults.offline(server) as folder:
        old = faults.read_block(folder, index, 1)
    sql(server, "update shop set customer = 0 where id = 5")
    with faults.offline(server) as folder:
        faults.stale_block(folder, index, 1, old)
    sql(server, "update shop set customer = 0 where id = 6; checkpoint")
    [finding] = found(server, NAME)
    assert (finding.location.file, finding.location.block) == (index, 1)
    assert "REINDEX" in finding.remedy
    sql(server, "reindex index shop_customer; checkpoint")
    silent(server, NAME)


def test_a_table_that_was_emptied_since_is_silent(new_server: ServerFactory) -> None:
    server = shop(new_server)
    lose_a_write(server, path_of(server, "shop"), "delete from shop")
    sql(server, f"update shop set note = 'since' where {ON_THE_PAGE} and id % 2 = 0; checkpoint")
    assert found(server, NAME)
    sql(server, "delete from shop")
    sql(server, "vacuum (truncate on) shop")
    sql(server, "checkpoint")
    assert sql(server, "select pg_relation_size('shop')") == 0
    silent(server, NAME)


@NEWEST_BY_DEFAULT
def test_readers_who_set_hints_at_once_are_silent(new_server: ServerFactory, every_version: int) -> None:
    """Each of two logs an image of the page, and only the first sets its LSN."""
    server = shop(new_server, every_version, max_parallel_workers_per_gather="0")
    sql(server, "create table load (i int, b text) with (autovacuum_enabled = off)")
    sql(server, "insert into load select i, repeat('x', 400) from generate_series(1, 50000) i; checkpoint")
    scan = "select count(*) from load where b > ''"
    threads = [threading.Thread(target=sql, args=(server, scan)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sql(server, "checkpoint")
    silent(server, NAME)
    sql(server, "update load set i = i + 1; checkpoint")
    silent(server, NAME)


@NEWEST_BY_DEFAULT
def test_checksums_switched_on_are_silent(new_server: ServerFactory, every_version: int) -> None:
    """Pages that became all visible before that kept their LSN."""
    server = shop(new_server, every_version)
    server.stop()
    program = server.programs.path("pg_checksums")
    processes.run([program, "--disable", "-D", server.data_directory], account=server.account)
    server.start()
    sql(server, "update other set body = 'y'; checkpoint")
    sql(server, "vacuum other")
    sql(server, "checkpoint")
    silent(server, NAME)
    server.stop()
    processes.run([program, "--enable", "-D", server.data_directory], account=server.account)
    server.start()
    silent(server, NAME)
    sql(server, "update other set body = 'z' where id % 2 = 0; checkpoint")
    silent(server, NAME)
