"""One byte of one row changed in a clone's files, as memory or a disk would: the page's checksum is right again."""

from __future__ import annotations

import time
from dataclasses import dataclass

from knockwood.clone.spawn import Clone, control_data
from knockwood.model import Lsn
from knockwood.postgres import pages
from sandbox import query

_PAGE = pages.PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Case:
    """Which byte. `pick` is a query for the row's ctid on the clone; `number` the column's, from 1.

    `back` counts from the value's end (numeric: the low half of its last digit); `ahead`, if not None, from the
    first column's start. `breaks` are claims that are rightly broken too. `quiet`: nobody writes to the row, so
    that the primary still has this version when it is asked for the difference.
    """

    table: str
    column: str
    number: int
    pick: str
    key: tuple[str, ...] = ()
    back: int = 1
    ahead: int | None = None
    toasted: bool = False
    breaks: frozenset[str] = frozenset()
    quiet: bool = True


_SUMS = frozenset({"check invariants"})
_QUIET = "select ctid from {} where {} order by md5(ctid::text || '{}') limit 1"

CASES = (
    Case("public.orders", "note", 5, _QUIET.format("orders", "id < 0", "{seed}"), ("id",)),
    Case(
        "public.order_lines",
        "quantity",
        4,
        _QUIET.format("order_lines", "order_id < 0", "{seed}"),
        ("order_id", "line"),
        ahead=16,
        breaks=_SUMS,
    ),
    Case(
        "public.documents",
        "body",
        3,
        _QUIET.format("documents", "id <= 300", "{seed}"),
        ("id",),
        toasted=True,
    ),
    Case(
        "public.events_north",
        "payload",
        4,
        _QUIET.format("events_north", "id <= 2000", "{seed}"),
        ("region", "id"),
    ),
    Case("public.imports", "tag", 4, _QUIET.format("imports", "batch = 0", "{seed}")),
    # Written a moment ago, under load: among the row versions that are compared one by one.
    Case(
        "public.payments",
        "amount",
        3,
        "select ctid from payments order by ctid desc offset 400 limit 1",
        ("id",),
        back=2,
        breaks=_SUMS,
    ),
    # Rewritten by every order: the primary has thrown the version away before anybody can ask for it.
    Case(
        "public.products",
        "name",
        2,
        "select ctid from products where id = 1 + {seed} % 200",
        ("id",),
        quiet=False,
    ),
)


@dataclass(frozen=True, slots=True)
class Changed:
    """What was done: the row by its key as findings print it, and the two values as text."""

    case: Case
    ctid: str
    key: str
    before: str
    after: str


def change_a_byte(clone: Clone, database: str, case: Case, seed: int) -> Changed:
    """Change one byte of one row of a paused clone; RuntimeError if the server does not see it afterwards."""
    dsn = clone.dsn(database)
    ctid = _row(clone, dsn, case, case.pick.replace("{seed}", str(seed)))
    before = _value(dsn, case, ctid)
    relation, place, number = case.table, ctid, case.number
    if case.toasted:
        relation, place = _first_chunk(dsn, case, ctid)
        number = 3
    block = int(place[1:-1].split(",")[0])
    offset = _offset(dsn, case, relation, place, number)
    if clone.programs.major >= 17:
        _evict(dsn, relation, block)
        _write(clone, dsn, relation, block, offset)
    else:
        _while_stopped(clone, dsn, relation, block, offset)
        dsn = clone.dsn(database)
    after = _value(dsn, case, ctid)
    if after == before:
        raise RuntimeError(f"the byte in {relation} {place} was changed, and {case.column} was not")
    key = ", ".join(
        f"{name}={query(dsn, f'select {name} from {case.table} where ctid = {ctid!r}')[0][0]}"
        for name in case.key
    )
    return Changed(case, ctid, key or f"ctid={ctid}", before, after)


def _row(clone: Clone, dsn: str, case: Case, pick: str) -> str:
    """The row picked; where the server must be stopped meanwhile, the first on a page that replay leaves alone."""
    if clone.programs.major >= 17:
        return str(query(dsn, pick)[0][0])
    redo = control_data(clone.programs, clone.data_directory)["Latest checkpoint's REDO location"]
    relation = case.table
    for (ctid,) in query(dsn, pick.replace("limit 1", "limit 500")):
        place = ctid
        if case.toasted:
            relation, place = _first_chunk(dsn, case, ctid)
        block = int(place[1:-1].split(",")[0])
        [(lsn,)] = query(dsn, f"select lsn from page_header(get_raw_page('{relation}', {block}))")
        if Lsn.parse(str(lsn)) < Lsn.parse(redo):
            return str(ctid)
    raise RuntimeError(f"every page of {case.table} would be replayed again")


def _value(dsn: str, case: Case, ctid: str) -> str:
    [(text,)] = query(dsn, f"select {case.column}::text from {case.table} where ctid = '{ctid}'")
    return str(text)


def _first_chunk(dsn: str, case: Case, ctid: str) -> tuple[str, str]:
    """The TOAST table and the place of the value's first chunk."""
    pointer = _attribute(dsn, case.table, ctid, case.number)
    # varattrib_1b_e: two bytes, then raw size, external size, value, TOAST relation
    value = int.from_bytes(pointer[10:14], "little")
    [(toast,)] = query(
        dsn, f"select reltoastrelid::regclass::text from pg_class where oid = '{case.table}'::regclass"
    )
    [(place,)] = query(dsn, f"select ctid from {toast} where chunk_id = {value} and chunk_seq = 0")
    return str(toast), str(place)


def _attribute(dsn: str, relation: str, place: str, number: int) -> bytes:
    block, item = (int(part) for part in place[1:-1].split(","))
    [(raw,)] = query(
        dsn,
        f"select t_attrs[{number}] from heap_page_item_attrs(get_raw_page('{relation}', {block}),"
        f" '{relation}'::regclass) where lp = {item}",
    )
    return bytes(raw)


def _offset(dsn: str, case: Case, relation: str, place: str, number: int) -> int:
    """The byte's offset in its page."""
    block, item = (int(part) for part in place[1:-1].split(","))
    [(page, start, length, header)] = query(
        dsn,
        f"select p, lp_off, lp_len, t_hoff from get_raw_page('{relation}', {block}) p, heap_page_items(p)"
        f" where lp = {item}",
    )
    if case.ahead is not None:
        return int(start) + int(header) + case.ahead
    raw = _attribute(dsn, relation, place, number)
    data = bytes(page)[start : start + length]
    if data.count(raw) != 1:
        raise RuntimeError(f"the value of {case.column} is not alone in its row")
    return int(start) + data.index(raw) + len(raw) - case.back


def _evict(dsn: str, relation: str, block: int) -> None:
    """Make the server write the page and forget it, so that it reads it from the file again."""
    cached = (
        f"from pg_buffercache where relfilenode = pg_relation_filenode('{relation}') and relforknumber = 0"
        f" and relblocknumber = {block}"
        " and reldatabase = (select oid from pg_database where datname = current_database())"
    )
    for _ in range(100):
        query(dsn, f"select pg_buffercache_evict(bufferid) {cached}")
        if query(dsn, f"select count(*) {cached}")[0][0] == 0:
            return
        time.sleep(0.05)
    raise RuntimeError(f"block {block} of {relation} could not be evicted")


def _write(clone: Clone, dsn: str, relation: str, block: int, offset: int) -> None:
    [(path,)] = query(dsn, f"select pg_relation_filepath('{relation}')")
    _flip(clone, str(path), block, offset)


def _while_stopped(clone: Clone, dsn: str, relation: str, block: int, offset: int) -> None:
    """Without eviction (before 17): stop, change, start."""
    [(path,)] = query(dsn, f"select pg_relation_filepath('{relation}')")
    clone.server.stop("fast")
    _flip(clone, str(path), block, offset)
    clone.replay()


def _flip(clone: Clone, path: str, block: int, offset: int) -> None:
    with (clone.data_directory / path).open("r+b") as file:
        file.seek(block * _PAGE)
        page = bytearray(file.read(_PAGE))
        page[offset] ^= 1
        stored = int.from_bytes(page[8:10], "little")
        if stored:
            page[8:10] = int(pages.checksums(bytes(page), block)[0]).to_bytes(2, "little")
        file.seek(block * _PAGE)
        file.write(page)
