"""The damage catalogue: each row done for real, and where a finding must point for it to count.

An injector is a generator. Its parts run by turns with the server up and stopped, up first; while the
server is stopped, what it waits for gives it the data directory. It returns the damage that it did.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from damage_places import Damage, Place
from damage_site import SHOP, Site
from damage_targets import TARGETS, Target
from knockwood.drill import faults
from knockwood.host import privileges

Injection = Generator[None, Path, Damage]
Injector = Callable[[Site, Target], Injection]

_LEAF = 5
"""A page of each primary key's index that is a leaf (its third is the root)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the catalogue. `compare`: a restored clone is compared too, before anything else reads;
    `clone`: the heavy checks run on a clone, as a user would have them, not on the damaged server."""

    key: str
    title: str
    injectors: tuple[Injector, ...]
    compare: bool = False
    clone: bool = False


def inflict(site: Site, row: Row) -> list[Damage]:
    """Do the row's damage in every database; the server runs before and after."""
    waiting = [injector(site, target) for target in TARGETS for injector in row.injectors]
    done: list[Damage] = []
    running = True
    while waiting:
        with ExitStack() as stack:
            folder = site.server.data_directory
            if not running:
                stack.enter_context(faults.offline(site.server))
            again = []
            for injection in waiting:
                try:
                    if running:
                        next(injection)
                    else:
                        injection.send(folder)
                    again.append(injection)
                except StopIteration as end:
                    done.append(end.value)
        waiting, running = again, not running
    return done


def _heap(line: str, target: Target, path: str, block: int, **more: bool) -> Damage:
    """Damage to one page of the target's table."""
    place = Place(target.database, relation=target.heap, file=path, block=block)
    return Damage(line, target.database, (place,), frozenset({target.heap}), **more)


def _rows_on(site: Site, target: Target, block: int) -> list[int]:
    query = f"select {target.key} from {target.heap} where ctid >= '({block},0)' and ctid < '({block + 1},0)'"
    return [row[0] for row in site.sql(target.database, query)]


def _bit_flip(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.heap)
    folder = yield
    faults.bit_flip(folder, path, 5)
    return _heap("", target, path, 5, breaks_rules=True)


def _flip_before_checksum(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.heap)
    [(ctid, key)] = site.sql(
        target.database, f"select ctid::text, {target.key} from {target.heap} where ctid >= '(6,1)' limit 1"
    )
    needle, offset = target.flip(site, ctid)
    folder = yield
    page = faults.read_block(folder, path, 6)
    if page.count(needle) != 1:
        raise RuntimeError(f"{needle!r} is {page.count(needle)} times on the page of {ctid}")
    faults.flip_before_checksum(folder, path, 6, page.index(needle) + offset, bit=0)
    place = Place(target.database, relation=target.heap, block=6, key=f"{target.key}={key}")
    return Damage("", target.database, (place,), frozenset({target.heap}))


def _lost_write(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.heap)
    folder = yield
    image = faults.read_block(folder, path, 7)
    yield
    site.sql(target.database, target.touch, _rows_on(site, target, 7)[:2])
    folder = yield
    faults.stale_block(folder, path, 7, image)
    return _heap("", target, path, 7, breaks_rules=True)


def _stale_after_vacuum(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.heap)
    folder = yield
    image = faults.read_block(folder, path, 9)
    yield
    keys = _rows_on(site, target, 9)
    site.sql(target.database, target.delete, keys)
    site.sql(target.database, f"delete from {target.heap} where {target.key} = any(%s)", keys)
    site.sql(target.database, f"vacuum {target.heap}")
    folder = yield
    faults.stale_block(folder, path, 9, image)
    return _heap("", target, path, 9, breaks_rules=True)


def _stale_leaf(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.primary_key)
    folder = yield
    image = faults.read_block(folder, path, _LEAF)
    yield
    tids = site.sql(
        target.database,
        f"select htid::text from bt_page_items('{target.primary_key}', {_LEAF}) where not dead",
    )
    query = f"select {target.key} from {target.heap} where ctid = any(%s::tid[])"
    keys = [row[0] for row in site.sql(target.database, query, [tid for (tid,) in tids if tid])]
    # Not HOT: the page is full, so each new version gets entries of its own.
    site.sql(target.database, target.touch, keys[:40])
    folder = yield
    if faults.read_block(folder, path, _LEAF) == image:
        raise RuntimeError(f"no update reached block {_LEAF} of {target.primary_key}")
    faults.stale_block(folder, path, _LEAF, image)
    place = Place(target.database, target.heap, target.primary_key, path, _LEAF)
    return Damage("", target.database, (place,), frozenset({target.heap}))


def _zero_page(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.heap)
    folder = yield
    faults.zero_block(folder, path, 11)
    return _heap("", target, path, 11, breaks_rules=True)


def _cut_tail(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.heap)
    length = site.one(target.database, f"select pg_relation_size('{target.heap}') / 8192")
    folder = yield
    faults.truncate_tail(folder, path, 2)
    return _heap("", target, path, length - 2, breaks_rules=True)


def _lost_segment(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.spare)
    folder = yield
    # Three segments, of which the added ones are holes: all-zero pages are legal.
    for name, size in ((path, 1 << 30), (f"{path}.1", 1 << 30), (f"{path}.2", faults.BLOCK)):
        (folder / name).touch()
        os.truncate(folder / name, size)
        privileges.give(folder / name, site.server.account)
    faults.remove_segment(folder, path, 1)
    place = Place(target.database, relation=target.spare, file=f"{path}.1")
    return Damage("", target.database, (place,), frozenset({target.spare}))


def _misdirected(site: Site, target: Target) -> Injection:
    path, source = site.path(target.database, target.heap), site.path(target.database, target.spare)
    folder = yield
    faults.misdirect(folder, source, 12, path)
    return _heap("", target, path, 12, breaks_rules=True)


def _misdirected_block(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.heap)
    folder = yield
    faults.misdirect(folder, path, 13, path, 14)
    return _heap("", target, path, 14, breaks_rules=True)


def _lost_file(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.spare)
    folder = yield
    faults.remove_file(folder, path)
    place = Place(target.database, relation=target.spare, file=path)
    return Damage("", target.database, (place,), frozenset({target.spare}))


def _xact_read(site: Site, target: Target) -> Injection:
    insert = f"insert into {target.spare} values (900001, 'read') returning pg_current_xact_id()::text::int"
    xid = site.one(target.database, insert)
    # Its end must be on disk before a reader may note it in the row.
    site.sql(target.database, "checkpoint")
    site.sql(target.database, f"select count(*) from {target.spare}")
    folder = yield
    faults.xact_flip(folder, xid)
    places = (
        Place(target.database, relation=target.spare, key=f"xid {xid}"),
        Place(key=f"xid {xid}", check="transaction_status"),
    )
    return Damage("rows read since", target.database, places, frozenset({target.spare}))


def _xact_unread(site: Site, target: Target) -> Injection:
    table = target.heap
    key = 900002
    values = f"({key}, 1, 10, 'unread')" if target.database == SHOP else f"({key}, 1, 0, '')"
    columns = "id, customer, total, note" if target.database == SHOP else "aid, bid, abalance, filler"
    query = f"insert into {table} ({columns}) values {values} returning pg_current_xact_id()::text::int"
    xid = site.one(target.database, query)
    folder = yield
    faults.xact_flip(folder, xid)
    places = (
        Place(target.database, relation=table, key=f"{target.key}={key}"),
        Place(key=f"xid {xid}", check="transaction_status"),
    )
    return Damage("rows not read yet", target.database, places, frozenset({table}), breaks_rules=True)


def _map_bits(site: Site, target: Target) -> Injection:
    path = site.path(target.database, target.heap)
    site.sql(target.database, target.touch, _rows_on(site, target, 15)[:1])
    folder = yield
    faults.vm_flip(folder, path, 15)
    place = Place(target.database, relation=target.heap, block=15, check="visibility_map")
    return Damage("", target.database, (place,), frozenset({target.heap}))


def _zero_toast(site: Site, target: Target) -> Injection:
    query = f"select reltoastrelid::regclass::text from pg_class where oid = '{target.toasted}'::regclass"
    toast = str(site.one(target.database, query))
    path = site.path(target.database, toast)
    folder = yield
    faults.zero_block(folder, path, 1)
    place = Place(target.database, relation=toast, file=path, block=1)
    return Damage("", target.database, (place,), frozenset({toast, target.toasted}))


def _index(method: str) -> Injector:
    def inject(site: Site, target: Target) -> Injection:
        index, block = target.indexes[method]
        path = site.path(target.database, index)
        folder = yield
        if method == "brin":
            faults.shrink_brin_range(folder, path, block, item=1)
        elif method == "spgist":
            # A scan never asks how many items a page has: the entry points at another row instead.
            page = faults.read_block(folder, path, block)
            pointer = int.from_bytes(page[24:28], "little") & 0x7FFF
            faults.flip_before_checksum(folder, path, block, pointer + 10, bit=0)
        else:
            faults.drop_entry(folder, path, block)
        place = Place(target.database, relation=target.indexed, index=index, file=path)
        return Damage(method, target.database, (place,), frozenset({target.indexed}))

    return inject


def _sequence(site: Site, target: Target) -> Injection:
    name, table, key = target.sequence
    site.sql(target.database, f"select setval('{name}', 1)")
    place = Place(target.database, relation=table, key=key, check="sequences")
    yield
    return Damage("", target.database, (place,), frozenset({table}))


def _orphan(site: Site, target: Target) -> Injection:
    site.sql(target.database, f"set session_replication_role = replica; {target.orphan}")
    place = Place(target.database, relation=target.child, key=target.orphan_key, check="foreign_keys")
    yield
    return Damage("orphans", target.database, (place,), frozenset({target.child}))


def _triggers_off(site: Site, target: Target) -> Injection:
    site.sql(target.database, f"alter table {target.child} disable trigger all")
    place = Place(target.database, relation=target.child, check="constraints")
    yield
    return Damage("triggers off", target.database, (place,), frozenset({target.child}))


def _not_valid(site: Site, target: Target) -> Injection:
    site.sql(target.database, f"alter table {target.spare} add constraint late check (id < 10) not valid")
    place = Place(target.database, relation=target.spare, key="late", check="constraints")
    yield
    return Damage("NOT VALID", target.database, (place,), frozenset({target.spare}))


def _collation(site: Site, target: Target) -> Injection:
    site.sql(target.database, "update pg_collation set collversion = '0' where collname = 'shelf'")
    place = Place(target.database, check="collations")
    yield
    return Damage("its version", target.database, (place,), frozenset({target.indexed}))


def _collation_order(site: Site, target: Target) -> Injection:
    """What the new library leaves behind: an index in an order that is no longer its own."""
    path = site.path(target.database, target.sorted_index)
    folder = yield
    faults.swap_items(folder, path, 1)
    place = Place(target.database, target.indexed, target.sorted_index, path)
    return Damage("order of an index", target.database, (place,), frozenset({target.indexed}))


def _release(site: Site, target: Target) -> Injection:
    site.sql(target.database, target.release)
    key = target.release_key
    place = (
        Place(target.database, key=key, check="invariants")
        if key
        else Place(target.database, relation=target.heap)
    )
    yield
    note = "" if key else "no invariant is set for this database, and a restore repeats what was committed"
    return Damage("", target.database, (place,), note=note)


INDEXES = ("hash", "brin", "gist", "gin", "spgist")

ROWS: Sequence[Row] = (
    Row("bit-flip", "bit flip on disk", (_bit_flip,)),
    Row("bit-flip-unseen", "bit flip before the checksum was made", (_flip_before_checksum,), compare=True),
    Row("lost-write", "lost write (an old image, valid checksum)", (_lost_write,)),
    Row("stale-vacuumed", "stale page from before DELETE + VACUUM", (_stale_after_vacuum,)),
    Row("stale-leaf", "stale btree leaf", (_stale_leaf,)),
    Row("zeroed-page", "zeroed heap page", (_zero_page,)),
    Row("cut-tail", "heap tail truncated", (_cut_tail,)),
    Row("lost-segment", "missing middle 1 GB segment file", (_lost_segment,)),
    Row("misdirected", "misdirected write: other relation, same block number", (_misdirected,)),
    Row("misdirected-block", "misdirected write: other block number", (_misdirected_block,)),
    Row("lost-file", "missing relation file", (_lost_file,)),
    Row("pg-xact", "pg_xact bits flipped (committed to aborted)", (_xact_read, _xact_unread), compare=True),
    Row("visibility-map", "visibility-map bits wrong", (_map_bits,)),
    Row("zeroed-toast", "zeroed TOAST page", (_zero_toast,)),
    Row(
        "index-pages",
        "hash, BRIN, GiST (GIN, SP-GiST) index page damaged",
        tuple(_index(m) for m in INDEXES),
    ),
    Row("sequence", "sequence behind max(id)", (_sequence,)),
    Row(
        "orphans",
        "orphan rows, disabled triggers, NOT VALID",
        (_orphan, _triggers_off, _not_valid),
        clone=True,
    ),
    Row("collation", "collation library change", (_collation, _collation_order)),
    Row("bad-release", "bad release, rogue script", (_release,), clone=True),
)
