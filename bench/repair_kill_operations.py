"""The repairs that are killed while the server runs: pages, lost writes, transactions taken back, tables."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from kill_checks import answer
from kill_site import DATABASE, Site
from knockwood.host.direct import read_block, write_block
from knockwood.postgres.pages import checksums
from page_damage import evict
from repair_kill_base import READER, Repair, ask, swallowed, write_json

PAGE = 8192
_BOOK = (
    "create table book (id int primary key, n int not null, body text not null) with (fillfactor = 80)",
    "alter table book set (autovacuum_enabled = off)",
    "create index book_n on book (n)",
    "insert into book select i, i % 50, repeat(md5(i::text), 4) from generate_series(1, 3000) i",
)
_TRUTH = "select count(*), sum(hashtextextended(b::text, 0)) from book b"
_BY_INDEX = (
    "set enable_seqscan = off; set enable_bitmapscan = off;"
    " select count(*), sum(hashtextextended(b::text, 0)) from book b where n between -1 and 1000000"
)


class Pages(Repair):
    """Pages of a table that readers use, and of its index; `kinds` are the damages of one run."""

    def __init__(self, name: str, checks: tuple[str, ...], kinds: tuple[tuple[str, ...], ...]) -> None:
        super().__init__(name)
        self.checks = checks
        self.kinds = kinds
        self.truth: list[tuple[Any, ...]] = []
        self.bad: dict[tuple[str, int], tuple[bytes, int]] = {}
        self.findings = Path()

    def setup(self, site: Site) -> None:
        for statement in _BOOK:
            ask(site.dsn, statement)

    # --- damage -----------------------------------------------------------------------------------

    def damage(self, site: Site) -> None:
        chance, kinds = self.chance, self.kinds[self.runs % len(self.kinds)]
        ask(site.dsn, "checkpoint")
        # All of it: with every change the rows move on to later pages.
        path = _path(site, "book")
        blocks = (site.server.data_directory / path).stat().st_size // PAGE
        old = {block: _page(site, path, block) for block in range(blocks)}
        ask(site.dsn, "update book set n = n + 1 where id %% 7 = %s", chance.randrange(7))
        self.truth = ask(site.dsn, _TRUTH)
        self.bad = {}
        with psycopg.connect(site.dsn, application_name=READER) as held:
            held.execute("lock table book in access exclusive mode")
            ask(site.dsn, "checkpoint")
            for kind in kinds:
                self._inflict(site, kind, old)
        # Readers meet the damage.
        swallowed(site.dsn, f"select * from book where n = {chance.randrange(50)}")
        status, values = answer(site, ["check", *self.checks])
        found = [each for each in values.get("findings", []) if "book" in str(each["location"])]
        if not found:
            raise RuntimeError(f"the damage was not found: {status} {values}")
        self.findings = write_json(site.folder / "findings.json", found)

    def _inflict(self, site: Site, kind: str, old: dict[int, bytes]) -> None:
        path = _path(site, "book_n" if kind == "index" else "book")
        taken = {block for name, block in self.bad if name == path}
        # The first page of an index says where the others are.
        choices = [block for block in range(1, 5 if kind == "index" else len(old)) if block not in taken]
        if kind in ("stale", "zero"):
            # What the disk loses is what was just written: of that the check must tell.
            choices = [block for block in choices if _lsn(old[block]) < _lsn(_page(site, path, block))]
        block = self.chance.choice(choices)
        evict(lambda sql: ask(site.dsn, sql)[0][0], path, block)
        good = _page(site, path, block)
        bad = _damaged(kind, good, old.get(block, b""), self.chance)
        write_block(site.server.data_directory / path, block * PAGE, bad)
        self.bad[path, block] = (bad, _lsn(good))

    # --- what must hold ---------------------------------------------------------------------------

    def command(self, site: Site) -> list[str]:
        return ["recover", "--finding", str(self.findings), "--apply"]

    def state(self, site: Site) -> list[str]:
        """On the disk each page is the damaged one, or not acceptable, or as new as the good one."""
        wrong = []
        for (path, block), (bad, lsn) in self.bad.items():
            if not (site.server.data_directory / path).exists():
                continue  # an index that was made anew
            page = _page(site, path, block)
            if page in (bad, b"") or not _accepted(page, block) or _lsn(page) >= lsn:
                continue
            wrong.append(f"block {block} of {path} is neither the damaged page nor the good one")
        return wrong

    def healed(self, site: Site) -> bool:
        # Nothing may be hidden by the server's buffers.
        ask(site.dsn, "checkpoint")
        ask(
            site.dsn,
            "select pg_buffercache_evict_relation(oid) from pg_class where relname like 'book%'"
            " and relkind in ('r', 'i')",
        )
        try:
            if ask(site.dsn, _TRUTH) != self.truth or _last(site, _BY_INDEX) != self.truth:
                return False
            ask(site.dsn, "select bt_index_check(c.oid, true) from pg_class c where relname like 'book\\_%'")
        except Exception:
            return False
        return True

    def as_damaged(self, site: Site) -> bool:
        """A page that was mended is not damaged again: `state` has looked."""
        return True

    def verified(self, site: Site) -> list[str]:
        wrong = super().verified(site)
        for path, block in self.bad:
            if (site.server.data_directory / path).exists() and not _accepted(
                _page(site, path, block), block
            ):
                wrong.append(f"block {block} of {path} is bad after the repair")
        if wrong:
            self._start_over(site)
        return wrong

    def _start_over(self, site: Site) -> None:
        """The next kill starts from a table that is right."""
        ask(site.dsn, "drop table book")
        self.setup(site)
        self.runs = 0


class Revert(Repair):
    """A transaction that changed, removed and added rows; others edit other columns, and a counter, later."""

    goes_on = True

    def __init__(self) -> None:
        super().__init__("revert")
        self.before: list[tuple[Any, ...]] = []
        self.after: list[tuple[Any, ...]] = []
        self.truth: list[tuple[Any, ...]] = []
        self.xid = 0
        self.counted = False

    def setup(self, site: Site) -> None:
        ask(
            site.dsn,
            "create table credit (id int primary key, v int not null, n numeric not null, note text not null)",
        )
        ask(site.dsn, "create table used (id int primary key, credit int not null references credit)")
        ask(site.dsn, "insert into credit select i, i, 100, 'note ' || i from generate_series(1, 300) i")
        ask(site.dsn, "insert into used select i, i from generate_series(1, 50) i")

    def damage(self, site: Site) -> None:
        start = self.chance.randrange(60, 200)
        self.counted = self.runs % 2 == 0
        before = _rows(site)
        with psycopg.connect(site.dsn, application_name=READER) as culprit:
            culprit.execute(
                "update credit set v = -v - 1, n = n + 5 where id between %s and %s", [start, start + 40]
            )
            culprit.execute("update credit set v = v + 1 where id = %s", [start])
            culprit.execute("delete from credit where id > %s and id <= %s", [start + 60, start + 80])
            culprit.execute("insert into credit select i, i, 1, 'x' from generate_series(1001, 1010) i")
            row = culprit.execute("select pg_current_xact_id()::text::bigint").fetchone()
        assert row is not None
        self.xid = row[0]
        # What comes later is kept: another column, and where it counts, the same number.
        ask(site.dsn, "update credit set note = note || '+' where id between %s and %s", start, start + 20)
        if self.counted:
            ask(site.dsn, "update credit set n = n + 1 where id between %s and %s", start, start + 30)
        self.after = _rows(site)
        adjusted = range(start, start + 31) if self.counted else ()
        edited = range(start, start + 21)
        self.truth = [(id, v, n + (id in adjusted), note + "+" * (id in edited)) for id, v, n, note in before]

    def command(self, site: Site) -> list[str]:
        counter = ["--counter", "public.credit.n"] if self.counted else []
        return ["revert", str(self.xid), *counter, "--apply"]

    def state(self, site: Site) -> list[str]:
        now = _rows(site)
        return [] if now in (self.truth, self.after) else [_different("credit", now, self.truth)]

    def healed(self, site: Site) -> bool:
        return _rows(site) == self.truth

    def as_damaged(self, site: Site) -> bool:
        return _rows(site) == self.after

    def verified(self, site: Site) -> list[str]:
        now = _rows(site)
        return [] if now == self.truth else [_different("credit", now, self.truth)]


class Table(Repair):
    """A table that was emptied, dropped, or overwritten, brought back in its place."""

    def __init__(self) -> None:
        super().__init__("restore of a table")
        self.xid = 0
        self.truth: list[tuple[Any, ...]] = []
        self.gone: list[tuple[Any, ...]] | None = None
        self.mode: tuple[str, ...] = ()

    def setup(self, site: Site) -> None:
        ask(site.dsn, "create table credit (id int primary key, v int not null, n numeric, note text)")
        ask(site.dsn, "insert into credit select i, i, 100, repeat('n', 50) from generate_series(1, 5000) i")
        ask(site.dsn, "create view large as select * from credit where v > 100")

    def damage(self, site: Site) -> None:
        ask(site.dsn, "drop schema if exists knockwood_replaced cascade")
        ask(site.dsn, "update credit set v = v + 1 where id %% 10 = %s", self.runs % 10)
        self.truth = _rows(site)
        sql, self.mode = (
            ("truncate credit", ()),
            ("drop table credit cascade", ()),
            ("update credit set v = 0 where id %% 3 = 0", ("--keep-restored",)),
        )[self.runs % 3]
        with psycopg.connect(site.dsn, application_name=READER) as culprit:
            culprit.execute(sql.replace("%%", "%").encode())
            row = culprit.execute("select pg_current_xact_id()::text::bigint").fetchone()
        assert row is not None
        self.xid = row[0]
        self.gone = _rows_or_none(site)

    def command(self, site: Site) -> list[str]:
        target = f"before-{self.xid}"
        words = ["restore", "--table", f"{DATABASE}.public.credit", "--to", target, "--in-place"]
        return [*words, *self.mode, "--apply"]

    def state(self, site: Site) -> list[str]:
        now = _rows_or_none(site)
        if now in (self.truth, self.gone):
            return []
        return [_different("credit", now or [], self.truth)]

    def healed(self, site: Site) -> bool:
        return _rows_or_none(site) == self.truth and bool(ask(site.dsn, "select to_regclass('large')")[0][0])

    def as_damaged(self, site: Site) -> bool:
        return _rows_or_none(site) == self.gone


def _rows(site: Site) -> list[tuple[Any, ...]]:
    return ask(site.dsn, "select id, v, n, note from credit order by id")


def _rows_or_none(site: Site) -> list[tuple[Any, ...]] | None:
    if ask(site.dsn, "select to_regclass('credit') is null")[0][0]:
        return None
    return _rows(site)


def _different(table: str, now: list[tuple[Any, ...]], then: list[tuple[Any, ...]]) -> str:
    more, less = sorted(set(now) - set(then)), sorted(set(then) - set(now))
    return f"{table} has {len(more)} rows it should not have ({more[:2]}), lacks {len(less)} ({less[:2]})"


def _last(site: Site, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(site.dsn, autocommit=True, application_name=READER) as connection:
        for statement in sql.split(";"):
            cursor = connection.execute(statement.encode())
        return cursor.fetchall()


def _path(site: Site, name: str) -> str:
    return str(ask(site.dsn, "select pg_relation_filepath(%s::regclass)", name)[0][0])


def _page(site: Site, path: str, block: int) -> bytes:
    return read_block(site.server.data_directory / path, block * PAGE, PAGE)


def _lsn(page: bytes) -> int:
    high, low = np.frombuffer(page[:8], "<u4")
    return (int(high) << 32) | int(low)


def _accepted(page: bytes, block: int) -> bool:
    """Whether a server would read it; a page of zeros it does."""
    if len(page) < PAGE:
        return False
    return not any(page) or int(checksums(page, block)[0]) == int.from_bytes(page[8:10], "little")


def _damaged(kind: str, good: bytes, old: bytes, chance: random.Random) -> bytes:
    if kind == "zero":
        return bytes(PAGE)
    if kind == "stale":
        return old
    if kind == "torn":
        return good[:4096] + chance.randbytes(4096)
    whole = bytearray(good)
    whole[chance.randrange(PAGE)] ^= 1 << chance.randrange(8)
    return bytes(whole)


@contextmanager
def readers(site: Site) -> Iterator[None]:
    """Somebody reads by index and as a whole all the while, and takes what comes."""
    stop = threading.Event()
    chance = random.Random(1)

    def work() -> None:
        while not stop.wait(0.1):
            table = chance.choice(("book", "credit"))
            swallowed(site.dsn, f"select * from {table} where id = {chance.randrange(3000)}")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
