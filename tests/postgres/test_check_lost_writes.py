"""The page-LSN audit: each kind of write that did not arrive is named, and truncation is no damage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fix_checks import SHOP, check, found, path_of, silent, sql, writers
from fix_server import VERSIONS
from knockwood.drill import faults
from knockwood.host import privileges, processes
from knockwood.model import Severity, Verdict

if TYPE_CHECKING:
    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer

NAME = "lost_writes"
NEWEST_BY_DEFAULT = pytest.mark.parametrize(
    "every_version", [18, *(pytest.param(major, marks=pytest.mark.slow) for major in VERSIONS if major != 18)]
)
BIG_WAL = {"min_wal_size": "1GB", "max_wal_size": "4GB"}


def shop(new_server: ServerFactory, major: int = 18, **settings: str) -> LocalServer:
    server = new_server(major, **(BIG_WAL | settings))
    sql(server, SHOP)
    return server


@NEWEST_BY_DEFAULT
def test_each_kind_is_named(new_server: ServerFactory, every_version: int) -> None:
    server = shop(new_server, every_version)
    table, other, index = (path_of(server, n) for n in ("shop", "other", "shop_customer"))
    with faults.offline(server) as folder:
        old = {block: faults.read_block(folder, table, block) for block in (3, 4)}
        old_leaf = faults.read_block(folder, index, 1)
    sql(server, "delete from shop where id % 3 = 0")
    sql(server, "vacuum shop")
    length = int(sql(server, "select pg_relation_size('other') / 8192"))
    with faults.offline(server) as folder:
        for block, image in old.items():
            faults.stale_block(folder, table, block, image)
        faults.stale_block(folder, index, 1, old_leaf)
        faults.zero_block(folder, table, 7)
        faults.misdirect(folder, other, 12, table, 12)
        faults.truncate_tail(folder, other, 2)
    findings = {
        (f.location.relation, f.location.index, f.location.file, f.location.block): f
        for f in found(server, NAME)
    }
    kinds = {key: finding.evidence["kind"] for key, finding in findings.items()}
    assert kinds.pop(("public.shop", None, table, 12)) in ("stale", "foreign")
    assert kinds == {
        ("public.shop", None, table, 3): "stale",
        ("public.shop", None, table, 4): "stale",
        ("public.shop", "public.shop_customer", index, 1): "stale",
        ("public.shop", None, table, 7): "zeroed",
        ("public.other", None, other, length - 2): "missing",
        ("public.other", None, other, length - 1): "missing",
    }
    assert findings["public.shop", None, table, 3].severity is Severity.CRITICAL


def test_a_younger_page_of_another_relation_is_foreign(new_server: ServerFactory) -> None:
    server = shop(new_server)
    table, other = path_of(server, "shop"), path_of(server, "other")
    sql(server, "update other set body = 'y'")
    with faults.offline(server) as folder:
        faults.misdirect(folder, other, 12, table, 12)
    [finding] = found(server, NAME)
    assert (finding.location.relation, finding.location.block) == ("public.shop", 12)
    assert finding.evidence["kind"] == "foreign"


def test_a_page_from_the_future_is_named(new_server: ServerFactory) -> None:
    server = shop(new_server)
    table = path_of(server, "shop")
    with faults.offline(server) as folder:
        page = bytearray(faults.read_block(folder, table, 5))
        page[0:4] = (9).to_bytes(4, "little")
        faults.stale_block(folder, table, 5, faults.sealed(page, 5))
    [finding] = found(server, NAME)
    assert (finding.location.block, finding.evidence["kind"]) == (5, "future")


def test_without_wal_nothing_is_green(new_server: ServerFactory) -> None:
    server = shop(new_server)
    report = check(server, NAME, local=False)
    assert report.verdict is Verdict.NOT_CHECKED
    assert "no WAL" in report.not_checked[0].reason


@pytest.mark.slow
def test_many_blocks_are_judged_in_parts(new_server: ServerFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knockwood.integrity.block_audit._MOST_BLOCKS", 20)
    server = shop(new_server)
    table = path_of(server, "shop")
    with faults.offline(server) as folder:
        old = faults.read_block(folder, table, 3)
    sql(server, "update shop set amount = 2 where id < 500")
    with faults.offline(server) as folder:
        faults.stale_block(folder, table, 3, old)
    assert {f.location.block for f in found(server, NAME)} == {3}


WORK = """
create index shop_tags on shop using gin (tags);
create index shop_place on shop using gist (place);
create index shop_spgist on shop using spgist (place);
create index shop_hash on shop using hash (customer);
create index shop_brin on shop using brin (id);
insert into shop select i, i % 97, 1, repeat('z', 3000), array[i, i + 1], point(i, -i)
from generate_series(5001, 9000) i;
update shop set customer = customer + 1, place = point(1, id) where id % 3 = 0;
delete from shop where id % 2 = 0 or id > 8000;
create sequence numbers; select nextval('numbers');
create table going as select i from generate_series(1, 5000) i; truncate going; drop table going;
"""


@pytest.mark.parametrize(
    ("every_version", "checksums"),
    [(18, True)]
    + [
        pytest.param(major, checksums, marks=pytest.mark.slow)
        for major in VERSIONS
        for checksums in (True, False)
        if (major, checksums) != (18, True)
    ],
)
def test_healthy_work_of_every_kind_is_silent(
    new_server: ServerFactory, every_version: int, checksums: bool
) -> None:
    server = shop(new_server, every_version)
    if not checksums:
        server.stop()
        program = server.programs.path("pg_checksums")
        processes.run([program, "--disable", "-D", server.data_directory], account=server.account)
        server.start()
    sql(server, WORK)
    sql(server, "checkpoint")
    sql(server, "vacuum")
    silent(server, NAME)
    sql(server, "insert into shop select i, i % 97, 1 from generate_series(10001, 14000) i")
    sql(
        server,
        "delete from shop where id > 9000; update other set body = 'z'; delete from other where id > 9",
    )
    sql(server, "vacuum")
    silent(server, NAME)
    sql(server, "vacuum full shop")
    sql(server, "reindex table other; checkpoint; select txid_current(); checkpoint")
    silent(server, NAME)
    server.kill()
    server.start()
    silent(server, NAME)


@pytest.mark.slow
def test_a_new_tablespace_and_database_are_silent(new_server: ServerFactory) -> None:
    server = shop(new_server)
    folder = server.data_directory.parent / "space"
    folder.mkdir()
    privileges.give(folder, server.account)
    sql(server, f"create tablespace space location '{folder}'")
    sql(server, "create database second template template1")
    sql(server, "create database third strategy file_copy")
    sql(server, "alter table shop set tablespace space")
    sql(server, "alter database third set tablespace space")
    sql(server, "drop database second")
    sql(server, "checkpoint")
    silent(server, NAME)
    table = path_of(server, "shop")
    with faults.offline(server) as data:
        faults.zero_block(data, table, 3)
    # A moved table's pages are whole images, and those may be of new pages: not this audit's to say.
    silent(server, NAME)
    sql(server, "update shop set amount = 3 where id > 4000; checkpoint")
    last = int(sql(server, "select pg_relation_size('shop') / 8192")) - 1
    with faults.offline(server) as data:
        faults.zero_block(data, table, last)
    assert [f.location.block for f in found(server, NAME)] == [last]


@NEWEST_BY_DEFAULT
def test_tables_under_writers_are_silent(new_server: ServerFactory, every_version: int) -> None:
    server = shop(new_server, every_version, shared_buffers="1MB")
    sql(server, "create index shop_hash on shop using hash (customer)")
    with writers(server):
        for _ in range(6):
            report = check(server, NAME)
            assert [f.as_json() for f in report.findings] == []
