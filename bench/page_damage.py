"""Damaged pages of every class at random places under load, each mended or rightly refused.

After each round the tables are compared, row by row, with a clone restored from the archive alone, and every
B-tree with its table (amcheck, heapallindexed). Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from knockwood.clone import Registry
from knockwood.clone.spawn import spawn
from knockwood.drill.sandbox import DATABASE, Sandbox, choose_programs, sandbox
from knockwood.host.direct import read_block, write_block
from knockwood.integrity.check import Budget
from knockwood.model import Verdict
from knockwood.model.recovery import Outcome, Recovery
from knockwood.operations.freshness import bring_up_to_date
from knockwood.operations.page_repair import PageRef, PageRepairs, plan_pages, verify_pages
from knockwood.operations.protect import take
from knockwood.postgres.connection import connect
from knockwood.recover.execute import execute
from knockwood.recover.indexes import verify_indexes
from knockwood.recover.pages_facts import target_named
from knockwood.recover.plan.pages import PAGE_BYTES
from knockwood.repository.targets import Latest, resolve

OUT = Path(__file__).parent / "out" / "pages.md"
SCHEMA = """
create table hot (id int primary key, n int not null default 0, body text);
alter table hot alter column body set storage external;
create index hot_n on hot (n);
insert into hot select i, i % 100, repeat(md5(i::text), case when i % 40 = 0 then 100 else 2 end)
  from generate_series(1, 20000) i;
create table cold (id int primary key, n int not null default 0, body text);
create index cold_n on cold (n);
insert into cold select i, i % 100, repeat(md5(i::text), 3) from generate_series(1, 20000) i;
create unlogged table scratch as select i as id, repeat('x', 100) from generate_series(1, 2000) i;
"""
FINGERPRINT = "select count(*), sum(hashtextextended(t::text, 0)) from {} t"
KINDS = (
    "flip",
    "torn",
    "misdirected",
    "toast",
    "zero",
    "stale",
    "buffered",
    "index",
    "vm",
    "fsm",
    "unlogged",
)
ROUND = 6


@dataclass
class Tally:
    """What came of the cases by kind; `wrong` names every difference. Seconds are of whole rounds."""

    mended: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    reasons: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.mended.total() + self.refused.total()


@dataclass
class Round:
    site: Sandbox
    chance: random.Random
    old: dict[int, bytes]
    damaged: dict[str, list[PageRef]] = field(default_factory=dict)

    def sql(self, text: str) -> Any:
        with connect(self.site.dsn) as connection:
            row = connection.execute(text.encode()).fetchone()
        return row[0] if row else None

    def path(self, name: str) -> str:
        with connect(self.site.dsn) as connection:
            return target_named(connection, DATABASE, name).path

    def page(self, path: str, block: int) -> bytes:
        return read_block(self.site.server.data_directory / path, block * PAGE_BYTES, PAGE_BYTES)

    def inflict(self, kind: str) -> None:
        """Do one damage while nobody can touch the page, with no buffer holding it (but for `buffered`)."""
        name = {"toast": "(toast)", "index": "hot_n", "vm": "cold", "fsm": "hot", "unlogged": "scratch"}.get(
            kind
        )
        table = name or ("hot" if kind in ("flip", "torn", "misdirected") else "cold")
        if kind == "toast":
            table = str(self.sql("select reltoastrelid::regclass::text from pg_class where relname = 'hot'"))
        path = self.path(table) + (f"_{kind}" if kind in ("vm", "fsm") else "")
        owner = "hot" if kind in ("toast", "index") else table
        with psycopg.connect(self.site.dsn) as connection:
            connection.execute(f"lock table {owner} in access exclusive mode".encode())
            self.site.sql("checkpoint")
            blocks = (self.site.server.data_directory / path).stat().st_size // PAGE_BYTES
            taken = {ref.block for refs in self.damaged.values() for ref in refs if ref.file == path}
            free = [b for b in range(1 if blocks > 1 else 0, min(blocks, 300)) if b not in taken]
            if kind == "stale":
                free = [b for b in self.old if b not in taken and self.old[b] != self.page(path, b)]
            if not free:
                return
            block = self.chance.choice(free)
            if kind != "buffered":
                evict(self.sql, path, block)
            else:
                connection.execute(f"select count(n) from {table}".encode())
            good = self.page(path, block)
            write_block(
                self.site.server.data_directory / path, block * PAGE_BYTES, self._bad(kind, good, path, block)
            )
        self.damaged.setdefault(kind, []).append(PageRef(path, block))

    def _bad(self, kind: str, good: bytes, path: str, block: int) -> bytes:
        if kind == "zero":
            return bytes(PAGE_BYTES)
        if kind == "torn":
            return good[:4096] + self.chance.randbytes(4096)
        if kind == "misdirected":
            return self.page(path, block + 1) or self.chance.randbytes(PAGE_BYTES)
        if kind == "stale":
            return self.old[block]
        whole = bytearray(good)
        whole[self.chance.randrange(PAGE_BYTES)] ^= 1 << self.chance.randrange(8)
        return bytes(whole)


def evict(sql: Callable[[str], Any], path: str, block: int) -> None:
    """Until no buffer holds the page; `sql` asks the server for one value."""
    node = path.rpartition("/")[2].partition("_")[0]
    fork = {"fsm": 1, "vm": 2}.get(path.rpartition("_")[2], 0)
    while sql(
        f"select count((select pg_buffercache_evict(bufferid)))::int from pg_buffercache"
        f" where relfilenode = {node} and relblocknumber = {block} and relforknumber = {fork}"
    ):
        time.sleep(0.01)


@contextmanager
def load(site: Sandbox, seed: int) -> Iterator[Callable[[], None]]:
    """Four clients on `hot` (written) and `cold` (read); yields what stops them."""
    stop = threading.Event()

    def work(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        with psycopg.connect(site.dsn, autocommit=True) as connection:
            while not stop.is_set():
                place = chance.randrange(1, 20001)
                text = chance.choice(
                    (
                        f"update hot set n = n + 1 where id = {place}",
                        f"update hot set body = repeat(md5(random()::text), 100) where id = {place}",
                        f"insert into hot values ({chance.randrange(1 << 30) + 20001}, 1, 'new')",
                        f"select count(*) from hot where n = {place % 100}",
                        "select 1",
                    )
                )
                try:
                    connection.execute(text.encode())
                except (
                    psycopg.errors.DataCorrupted,
                    psycopg.errors.IndexCorrupted,
                    psycopg.errors.UniqueViolation,
                ):
                    pass
                stop.wait(0.002)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()

    def end() -> None:
        stop.set()
        for thread in threads:
            thread.join()

    try:
        yield end
    finally:
        end()


def play(site: Sandbox, number: int, kinds: list[str], tally: Tally) -> None:
    """Damage, mend under load, compare."""
    chance = random.Random(number)
    cold = Round(site, chance, {})
    site.sql("checkpoint")
    path = cold.path("cold")
    cold.old = {block: cold.page(path, block) for block in range(1, 60)}
    site.sql(f"update cold set n = n + 1 where id % 7 = {number % 7}")
    site.sql("checkpoint")
    with load(site, number) as end:
        for kind in kinds:
            cold.inflict(kind)
        refs = [ref for each in cold.damaged.values() for ref in each]
        began = time.monotonic()
        recovery: Recovery | None = None
        # A page that was read meanwhile may be of another class than planned: then the plan is made again.
        for _ in range(3):
            plan = plan_pages(site.cluster, site.repository, refs)
            if not plan.steps:
                break
            with PageRepairs(site.cluster, site.repository) as repairs:
                recovery = execute(
                    plan, repairs.handlers, site.folder / "journal", approve=plan.id,
                    verify=lambda plan=plan: verify_pages(site.cluster, site.repository, plan),
                )  # fmt: skip
            if recovery.complete:
                break
        tally.seconds.append(time.monotonic() - began)
        end()
    _judge(cold, plan.refused, recovery, tally)
    tally.wrong += [f"round {number}: {text}" for text in compare(site)]


def _judge(made: Round, refused: tuple[str, ...], recovery: Recovery | None, tally: Tally) -> None:
    for kind, refs in made.damaged.items():
        (tally.refused if kind == "unlogged" else tally.mended)[kind] += len(refs)
    tally.reasons.update(refused)
    if any("unlogged" not in text for text in refused):
        tally.wrong.append(f"refused: {refused}")
    if recovery is None:
        return
    tally.blocked += [result.blocked_seconds for result in recovery.results]
    if not recovery.complete or recovery.verdict is Verdict.BROKEN:
        failed = [r.detail for r in recovery.results if r.outcome not in (Outcome.DONE, Outcome.ALREADY_DONE)]
        broken = [f"{c.name}: {c.detail}" for c in recovery.claims if c.verdict is Verdict.BROKEN]
        tally.wrong.append(f"not mended: {failed} {broken}")


def compare(site: Sandbox) -> list[str]:
    """What differs between the live tables and a clone of the archive's newest state."""
    wrong: list[str] = []
    bring_up_to_date(site.cluster, site.repository)
    plan = resolve(site.repository, Latest(), programs_for=site.cluster.programs)
    subject = site.cluster.subject(Budget(), repository=site.repository)
    clones = Registry(site.folder / "compared")
    with spawn(
        site.repository, plan, programs=site.server.programs, purpose="compare", registry=clones
    ) as clone:
        for table in ("hot", "cold"):
            query = FINGERPRINT.format(table).encode()
            with connect(clone.dsn(DATABASE)) as there, connect(site.dsn) as here:
                if there.execute(query).fetchone() != here.execute(query).fetchone():
                    wrong.append(f"{table} differs from the clone")
                target = target_named(here, DATABASE, table)
            wrong += [
                f"{each.index.name}: {each.detail}"
                for each in verify_indexes(subject, DATABASE, target.oid)
                if each.verdict is not Verdict.HELD
            ]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--postgres", type=int, default=18, choices=(17, 18))
    parser.add_argument("--seed", type=int, default=1)
    words = parser.parse_args()
    tally = Tally()
    settings = {"autovacuum": "on", "wal_level": "replica"}
    with sandbox(
        orders=10, clients=1, seed=words.seed, programs=choose_programs(words.postgres), settings=settings
    ) as site:
        with psycopg.connect(site.dsn, autocommit=True) as connection:
            for statement in SCHEMA.strip().split(";\n"):
                connection.execute(statement.encode())
            connection.execute("vacuum hot")
            connection.execute("vacuum cold")
        take(site.cluster, site.repository)
        number = words.seed
        while tally.cases < words.cases:
            number += 1
            kinds = [KINDS[(number * ROUND + turn) % len(KINDS)] for turn in range(ROUND)]
            play(site, number, kinds, tally)
            print(
                f"{tally.cases} cases, {len(tally.wrong)} wrong, round {tally.seconds[-1]:.1f} s", flush=True
            )
            for text in tally.wrong:
                print(f"  {text}", flush=True)
    report(tally, words.postgres)
    return 1 if tally.wrong else 0


def report(tally: Tally, major: int) -> None:
    blocked = sorted(tally.blocked) or [0.0]
    rounds = sorted(tally.seconds)
    summary = (
        f"A round of up to {ROUND} damages took {rounds[len(rounds) // 2]:.1f} s (median), plan, clones and"
        f" verification included. Writers waited {blocked[-1]:.2f} s at most for a step,"
        f" {blocked[len(blocked) // 2]:.2f} s in the median."
    )
    lines = [
        "# Damaged pages, mended under load",
        "",
        f"PostgreSQL {major}: {tally.cases} cases, {len(tally.wrong)} wrong.",
        "",
        "| damage | mended | rightly refused |",
        "|---|---|---|",
        *(f"| {kind} | {tally.mended[kind]} | {tally.refused[kind]} |" for kind in KINDS),
        "",
        summary,
        "",
        *(f"- wrong: {text}" for text in tally.wrong),
    ]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join(lines) + "\n")
    print(OUT.read_text())


if __name__ == "__main__":
    sys.exit(main())
