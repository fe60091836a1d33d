"""All physical checks over one healthy server while sixteen writers change it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fix_checks import SHOP, check, sql, writers

if TYPE_CHECKING:
    from fix_server import ServerFactory

NAMES = (
    "amcheck_heap",
    "amcheck_index",
    "heap_index_counts",
    "index_against_heap",
    "lost_writes",
    "page_checksums",
    "segment_files",
    "toast",
    "transaction_status",
    "visibility_map",
)


@pytest.mark.slow
def test_sixteen_writers_and_ten_runs_give_no_finding(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version, shared_buffers="4MB", max_wal_size="256MB", autovacuum="on")
    for database in ("postgres", "template1"):
        for extension in ("amcheck", "pg_visibility"):
            sql(server, f"create extension {extension}", database=database)
    sql(server, SHOP)
    sql(server, "create index on shop using gin (tags); create index on shop using hash (amount)")
    with writers(server, 16):
        for _ in range(10):
            report = check(server, *NAMES)
            shown = [finding.as_json() for finding in report.findings]
            assert shown == [], shown
