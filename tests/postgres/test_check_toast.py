"""Values stored out of line that cannot be fetched are named by their row's block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fix_checks import SHOP, found, path_of, silent, sql
from knockwood.drill import faults

if TYPE_CHECKING:
    from fix_server import ServerFactory

NAME = "toast"


def test_a_zeroed_toast_page_is_seen_from_its_rows(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    sql(server, SHOP)
    toast = str(sql(server, "select reltoastrelid::regclass::text from pg_class where relname = 'shop'"))
    chunks = sql(server, f"select array_agg(distinct chunk_id) from {toast} where ctid::text like '(3,%'")
    query = "select array_agg((ctid::text::point)[0]::int order by ctid) from shop where id % 50 = 0"
    blocks = sql(server, query)
    path = path_of(server, toast)
    with faults.offline(server) as folder:
        faults.zero_block(folder, path, 3)
    findings = found(server, NAME)
    assert 1 <= len(findings) <= len(chunks)
    assert {f.location.relation for f in findings} == {"public.shop"}
    assert {f.location.block for f in findings} <= set(blocks)
    assert "chunk" in findings[0].summary


def test_healthy_clusters_are_silent(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    sql(server, SHOP)
    sql(server, "delete from shop where id % 100 = 0; update shop set note = note || 'x' where id < 500")
    silent(server, NAME)
