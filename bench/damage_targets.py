"""The two databases that are damaged, under one set of names."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from damage_site import BENCH, SHOP, Site


@dataclass(frozen=True, slots=True)
class Target:
    """Where each kind of damage is done in one database. Names are qualified as findings qualify them.

    `heap` is a table of hundreds of pages with the unique column `key`; `spare` a small one that may be
    lost whole; `indexes` maps methods to an index and a page of it that holds entries; `flip` gives the
    bytes by which a row's page is searched, and where behind their begin a bit flips; `orphan` makes a
    row of `child` point nowhere, which `orphan_key` then names; `release` changes what it should not.
    """

    database: str
    heap: str
    key: str
    primary_key: str
    spare: str
    indexes: dict[str, tuple[str, int]]
    indexed: str
    toasted: str
    sorted_index: str
    sequence: tuple[str, str, str]
    orphan: str
    orphan_key: str
    child: str
    release: str
    release_key: str | None
    touch: str
    delete: str
    flip: Callable[[Site, str], tuple[bytes, int]]


def _note(site: Site, ctid: str) -> tuple[bytes, int]:
    return str(site.one(SHOP, "select note from orders where ctid = %s::tid", ctid)).encode(), 5


def _balance(site: Site, ctid: str) -> tuple[bytes, int]:
    [row] = site.sql(BENCH, "select aid, bid, abalance from pgbench_accounts where ctid = %s::tid", ctid)
    return struct.pack("<iii", *row), 8


_SHOP = Target(
    database=SHOP,
    heap="public.orders",
    key="id",
    primary_key="public.orders_pkey",
    spare="public.ledger",
    indexes={
        "hash": ("public.parcels_hash", 2),
        "gist": ("public.parcels_gist", 3),
        "spgist": ("public.parcels_spgist", 5),
        "gin": ("public.parcels_gin", 3),
        "brin": ("public.parcels_brin", 2),
    },
    indexed="public.parcels",
    toasted="public.parcels",
    sorted_index="public.parcels_title",
    sequence=("public.parcels_id_seq", "public.parcels", "id="),
    orphan="delete from orders where id = -500",
    orphan_key="-500",
    child="public.order_lines",
    # A script that was to change one customer's orders, and changed the totals of a thousand others.
    release="update orders set total = total + 1 where id between -1999 and -1000",
    release_key="id=-1",
    touch="update orders set note = 'touched ' || id where id = any(%s)",
    delete="delete from order_lines where order_id = any(%s)",
    flip=_note,
)

_BENCH = Target(
    database=BENCH,
    heap="public.pgbench_accounts",
    key="aid",
    primary_key="public.pgbench_accounts_pkey",
    spare="public.audit",
    indexes={
        "hash": ("public.accounts_hash", 2),
        "gist": ("public.accounts_gist", 3),
        "spgist": ("public.accounts_spgist", 5),
        "gin": ("public.accounts_gin", 3),
        "brin": ("public.accounts_brin", 2),
    },
    indexed="public.pgbench_accounts",
    toasted="public.pgbench_tellers",
    sorted_index="public.accounts_title",
    sequence=("public.pgbench_history_hid_seq", "public.pgbench_history", "hid="),
    orphan="insert into pgbench_history (tid, bid, aid, delta) values (1, 1, 99999999, 0)",
    orphan_key="99999999",
    child="public.pgbench_history",
    release="update pgbench_accounts set abalance = abalance + 1000 where aid between 1000 and 1999",
    release_key=None,
    touch="update pgbench_accounts set abalance = abalance + 1 where aid = any(%s)",
    delete="delete from pgbench_history where aid = any(%s)",
    flip=_balance,
)

TARGETS = (_SHOP, _BENCH)
