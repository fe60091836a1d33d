"""Page checksums online: every bad page is named, and nothing healthy is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fix_checks import SHOP, check, found, path_of, silent, sql, subject_of, writers
from fix_standby import caught_up, either, promote
from knockwood.drill import faults
from knockwood.errors import HostError
from knockwood.host import processes
from knockwood.integrity.relation_files import data_files
from knockwood.model import Severity, Verdict
from knockwood.postgres.connection import connect, current_insert_lsn, with_words
from knockwood.postgres.server import LocalServer

if TYPE_CHECKING:
    from fix_server import ServerFactory

NAME = "page_checksums"


def test_every_bad_page_is_named(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    sql(server, SHOP)
    shop, index = path_of(server, "shop"), path_of(server, "shop_customer")
    with faults.offline(server) as folder:
        for block in range(3, 20, 2):
            faults.bit_flip(folder, shop, block)
        faults.bit_flip(folder, index, 2, offset=14)
        faults.misdirect(folder, shop, 30, shop, 31)
    findings = found(server, NAME)
    assert [
        (f.location.relation, f.location.file, f.location.block) for f in findings if not f.location.index
    ] == [
        *(("public.shop", shop, block) for block in range(3, 20, 2)),
        ("public.shop", shop, 31),
    ]
    [on_index] = [f for f in findings if f.location.index]
    assert (on_index.location.index, on_index.location.relation) == ("public.shop_customer", "public.shop")
    assert (on_index.location.block, on_index.severity) == (2, Severity.HIGH)
    assert findings[0].location.database == "postgres"


def test_without_local_reach_the_server_reads_its_own_files(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    path = path_of(server, "pg_toast." + sql(server, "select 'pg_toast_' || 'shop'::regclass::oid"))
    with faults.offline(server) as folder:
        faults.bit_flip(folder, path, 1)
    [finding] = found(server, NAME, local=False)
    assert (finding.location.file, finding.location.block, finding.severity) == (path, 1, Severity.CRITICAL)


def test_a_role_without_rights_has_not_checked(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, "create role plain login")
    report = check(server, NAME, local=False, user="plain")
    assert report.verdict is Verdict.NOT_CHECKED
    assert "pg_read_server_files" in report.not_checked[0].reason


def test_another_servers_folder_is_not_taken_for_this_one(new_server: ServerFactory) -> None:
    server, other = new_server(18), new_server(18)
    report = check(server, NAME, folder=other.data_directory)
    assert report.verdict is Verdict.NOT_CHECKED
    assert "another server" in report.not_checked[0].reason


def test_without_checksums_headers_are_checked_and_it_says_so(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    shop = path_of(server, "shop")
    server.stop()
    processes.run(
        [server.programs.path("pg_checksums"), "--disable", "-D", server.data_directory],
        account=server.account,
    )
    faults.bit_flip(server.data_directory, shop, 4)
    faults.bit_flip(server.data_directory, shop, 5, offset=18, bit=7)
    server.start()
    report = check(server, NAME)
    assert [f.location.block for f in report.findings] == [5]
    assert "data_checksums is off" in report.not_checked[0].reason


def test_healthy_clusters_are_silent(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    silent(server, NAME)
    sql(server, SHOP)
    sql(server, "delete from shop where id > 4000; update other set body = 'y'; truncate scratch")
    sql(server, "vacuum")
    sql(server, "reindex table shop; create temp table t as select 1; drop table other")
    silent(server, NAME)
    silent(server, NAME, local=False)


def test_a_table_under_writers_is_silent(new_server: ServerFactory) -> None:
    server = new_server(18, shared_buffers="1MB")
    sql(server, SHOP)
    with writers(server):
        for _ in range(10):
            silent(server, NAME)


def test_damage_in_an_unlogged_table_is_nobodys_business(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, SHOP)
    path = path_of(server, "scratch")
    with faults.offline(server) as folder:
        faults.bit_flip(folder, path, 0)
    silent(server, NAME)


@pytest.mark.slow
def test_many_bad_pages_of_one_file_become_one_finding(new_server: ServerFactory) -> None:
    server = new_server(18)
    sql(server, "create table big as select i, repeat('x', 1000) from generate_series(1, 3000) i")
    path = path_of(server, "big")
    with faults.offline(server) as folder:
        for block in range(300):
            faults.bit_flip(folder, path, block)
    [finding] = found(server, NAME)
    assert finding.evidence["blocks"] == list(range(300))


def test_files_of_a_primary_that_was_replaced_meanwhile_tell_nothing(
    new_server: ServerFactory, standby_of: Callable[[LocalServer], LocalServer]
) -> None:
    primary = new_server(18)
    standby = standby_of(primary)
    # The role may not see where the server's files lie, and both were started at about the same time.
    sql(primary, "create role plain login")
    with connect(primary.dsn()) as connection:
        caught_up(standby, current_insert_lsn(connection))
    subject = replace(subject_of(primary), dsn=with_words(either(primary, standby), user="plain"))

    def take_over() -> None:
        primary.kill()
        promote(standby)

    with pytest.raises(HostError, match="another server"), data_files(subject):
        take_over()
    with pytest.raises(HostError, match="another server"), data_files(subject):
        pass
