"""Damaged pages of every class at random places under load, each mended or rightly refused.

After each round the tables are compared, row by row, with a clone restored from the archive alone and with a copy
made before the damage, and every B-tree with its table (amcheck, heapallindexed). Runs add up: each is kept in
bench/out/pages. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import psycopg

from knockwood.clone import Registry
from knockwood.clone.shadow_server import Keeper
from knockwood.clone.spawn import spawn
from knockwood.drill.sandbox import DATABASE, Sandbox, choose_programs, sandbox
from knockwood.host.direct import read_block, write_block
from knockwood.integrity.check import Budget
from knockwood.model import Verdict
from knockwood.model.recovery import Outcome, Recovery
from knockwood.operations import page_repair_shadow, shadow, shadow_steps
from knockwood.operations.check import check
from knockwood.operations.freshness import bring_up_to_date
from knockwood.operations.page_repair import PageRef, PageRepairs, plan_pages, verify_pages
from knockwood.operations.protect import take
from knockwood.postgres.connection import connect
from knockwood.recover.execute import execute
from knockwood.recover.indexes import verify_indexes
from knockwood.recover.pages_facts import target_named
from knockwood.recover.plan.page_wal import PAGE_BYTES
from knockwood.repository.targets import Latest, resolve
from knockwood.settings.schema import ShadowSettings
from machine import describe
from sandbox import OUT, end_cleanly
from tables import markdown

TABLE = OUT / "pages.md"
PIECES = OUT / "pages"
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
# Larger than the buffers.
FILLER = """create extension if not exists pg_prewarm; create table filler with (fillfactor = 10) as
 select i, repeat('x', 700) as body from generate_series(1, 4000) i"""
FINGERPRINT = "select count(*), sum(hashtextextended(t::text, 0)) from {} t"
KINDS = (
    "flip",
    "torn",
    "misdirected",
    "toast",
    "zero",
    "stale",
    "archived",
    "buffered",
    "index",
    "vm",
    "fsm",
    "unlogged",
)
TITLES = {
    "flip": "one bit flipped",
    "torn": "half a page of something else",
    "misdirected": "the page of another block",
    "toast": "one bit flipped in a TOAST table",
    "zero": "all zeros",
    "stale": "an old page (lost write)",
    "archived": "an old page, then changed again",
    "buffered": "one bit flipped, good in the buffers",
    "index": "one bit flipped in an index",
    "vm": "one bit flipped in a visibility map",
    "fsm": "one bit flipped in a free space map",
    "unlogged": "one bit flipped in an unlogged table",
}
ROUND = 5
BACKUP_EVERY = 6
"""Rounds at most; a repair says itself where a new full backup is due at once."""
_PLANS = 4
IN_BUFFERS = "cannot drop it"
"""What a refusal says before PostgreSQL 17, where a zero or old page has been read: then it is right to refuse."""


@dataclass
class Tally:
    """What came of the cases by kind; `wrong` names every difference. Seconds are of whole rounds.

    `waited`: rounds in which a page had to leave the buffers first, as its refusal said.
    """

    major: int = 0
    mended: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    waited: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.mended.total() + self.refused.total()

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Tally:
        counted = {name: Counter(stored[name]) for name in ("mended", "refused")}
        return cls(**{**stored, **counted})


@dataclass
class Round:
    site: Sandbox
    chance: random.Random
    number: int
    old: dict[int, bytes] = field(default_factory=dict)
    damaged: dict[str, list[PageRef]] = field(default_factory=dict)

    def sql(self, text: str) -> Any:
        with connect(self.site.dsn) as connection:
            cursor = connection.execute(text.encode())
            row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None

    def path(self, name: str) -> str:
        with connect(self.site.dsn) as connection:
            return target_named(connection, DATABASE, name).path

    def page(self, path: str, block: int) -> bytes:
        return read_block(self.site.server.data_directory / path, block * PAGE_BYTES, PAGE_BYTES)

    def begin(self) -> None:
        """Change every seventh row of `cold`, keep its pages from before as old ones, and its rows as the truth."""
        self.sql("checkpoint")
        path = self.path("cold")
        self.old = {block: self.page(path, block) for block in range(1, 60)}
        self.sql(f"update cold set n = n + 1 where id % 7 = {self.number % 7}")
        self.sql("drop table if exists truth")
        self.sql("create unlogged table truth as table cold")
        self.sql("checkpoint")

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
            free = self._free(kind, path)
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
        if kind == "archived":
            self._change_again(block)
        self.damaged.setdefault(kind, []).append(PageRef(path, block))

    def _free(self, kind: str, path: str) -> list[int]:
        """Blocks that are whole still, and for old pages such as have changed."""
        blocks = (self.site.server.data_directory / path).stat().st_size // PAGE_BYTES
        taken = {ref.block for refs in self.damaged.values() for ref in refs if ref.file == path}
        if kind in ("stale", "archived"):
            return [b for b in self.old if b not in taken and self.old[b] != self.page(path, b)]
        return [b for b in range(1 if blocks > 1 else 0, min(blocks, 300)) if b not in taken]

    def _change_again(self, block: int) -> None:
        """Change a row of the old page that it shows right: now the archive has that page's image too."""
        changed = self.sql(
            "with changed as (update cold set body = body || '!' where id = ("
            f" select id from cold where ctid >= '({block},1)' and ctid < '({block + 1},1)'"
            f" and id % 7 <> {self.number % 7} limit 1) returning id) select id from changed"
        )
        if changed is not None:
            self.sql(f"update truth set body = body || '!' where id = {changed}")

    def _bad(self, kind: str, good: bytes, path: str, block: int) -> bytes:
        if kind == "zero":
            return bytes(PAGE_BYTES)
        if kind == "torn":
            return good[:4096] + self.chance.randbytes(4096)
        if kind == "misdirected":
            return self.page(path, block + 1) or self.chance.randbytes(PAGE_BYTES)
        if kind in ("stale", "archived"):
            return self.old[block]
        whole = bytearray(good)
        whole[self.chance.randrange(PAGE_BYTES)] ^= 1 << self.chance.randrange(8)
        return bytes(whole)

    def push_out(self) -> None:
        """Until no buffer holds a damaged page of `cold`: what a refusal says to wait for."""
        path = self.path("cold")
        for refs in self.damaged.values():
            for ref in refs:
                if ref.file == path:
                    evict(self.sql, path, ref.block)


def evict(sql: Callable[[str], Any], path: str, block: int) -> None:
    """Until no buffer holds the page; `sql` asks the server for one value."""
    node = path.rpartition("/")[2].partition("_")[0]
    fork = {"fsm": 1, "vm": 2}.get(path.rpartition("_")[2], 0)
    place = f"relfilenode = {node} and relblocknumber = {block} and relforknumber = {fork}"
    if sql("select to_regproc('pg_buffercache_evict') is not null"):
        dropped = (
            f"select count((select pg_buffercache_evict(bufferid)))::int from pg_buffercache where {place}"
        )
        while sql(dropped):
            time.sleep(0.01)
        return
    # Before PostgreSQL 17 only other pages push one out.
    while sql(f"select count(*)::int from pg_buffercache where {place}"):
        sql("select pg_prewarm('filler')")


@contextmanager
def load(site: Sandbox, seed: int) -> Iterator[Callable[[], None]]:
    """Four clients on `hot` (written) and `cold` (read); yields what stops them."""
    stop = threading.Event()
    # Before PostgreSQL 17 pages that are read stay in the buffers, and a repair is refused.
    idle = (
        "select 1"
        if site.server.programs.major < 17
        else "select sum(n) from cold where id between {0} and {0} + 50"
    )

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
                        idle.format(place),
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


def play(site: Sandbox, number: int, kinds: list[str], tally: Tally) -> bool:
    """Damage, mend under load, compare; whether the repair asks for a new full backup."""
    made = Round(site, random.Random(number), number)
    made.begin()
    with load(site, number) as end:
        for kind in kinds:
            made.inflict(kind)
        began = time.monotonic()
        refused, recovery = _mend(made, tally)
        tally.seconds.append(time.monotonic() - began)
        end()
    _judge(made, refused, recovery, tally)
    tally.wrong += [f"round {number}: {text}" for text in compare(site)]
    results = recovery.results if recovery is not None else ()
    return any(result.values.get("new_full_backup_needed") for result in results)


def _mend(made: Round, tally: Tally) -> tuple[tuple[str, ...], Recovery | None]:
    """Plan and execute; a page that was read meanwhile may be of another class than planned: then once more."""
    site = made.site
    refs = [ref for each in made.damaged.values() for ref in each]
    refused: tuple[str, ...] = ()
    recovery: Recovery | None = None
    for _ in range(_PLANS):
        plan = plan_pages(site.cluster, site.repository, refs)
        refused, recovery = plan.refused, None
        if plan.steps:
            verify = partial(verify_pages, site.cluster, site.repository, plan)
            with PageRepairs(site.cluster, site.repository, plan=plan) as repairs:
                recovery = execute(
                    plan, repairs.handlers, site.folder / "journal", approve=plan.id, verify=verify
                )
            tally.blocked += [result.blocked_seconds for result in recovery.results]
        if tally.major < 17 and any(IN_BUFFERS in text for text in (*refused, *_details(recovery))):
            tally.waited += 1
            made.push_out()
        elif recovery is None or recovery.complete:
            break
        print(f"round {made.number}, once more: {refused} {_details(recovery)}", flush=True)
    return refused, recovery


def _details(recovery: Recovery | None) -> list[str]:
    """What the steps say that were not done."""
    done = (Outcome.DONE, Outcome.ALREADY_DONE)
    return [each.detail for each in recovery.results if each.outcome not in done] if recovery else []


def _judge(made: Round, refused: tuple[str, ...], recovery: Recovery | None, tally: Tally) -> None:
    for kind, refs in made.damaged.items():
        (tally.refused if kind == "unlogged" else tally.mended)[kind] += len(refs)
    if any("unlogged" not in text for text in refused):
        tally.wrong.append(f"round {made.number}: refused: {refused}")
    if recovery is None:
        return
    if not recovery.complete or recovery.verdict is Verdict.BROKEN:
        failed = _details(recovery)
        broken = [f"{c.name}: {c.detail}" for c in recovery.claims if c.verdict is Verdict.BROKEN]
        tally.wrong.append(f"round {made.number}: not mended: {failed} {broken}")


def compare(site: Sandbox) -> list[str]:
    """What differs between the live tables and a clone of the archive's newest state, and from the truth."""
    wrong: list[str] = []
    with connect(site.dsn) as here:
        rows = [here.execute(FINGERPRINT.format(name).encode()).fetchone() for name in ("cold", "truth")]
    if rows[0] != rows[1]:
        wrong.append("cold differs from its copy")
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
    parser.add_argument("--postgres", type=int, default=18, choices=(15, 17, 18))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--shadow", action="store_true", help="with a running shadow, and lost_writes kept up to date"
    )
    words = parser.parse_args()
    end_cleanly()
    tally = Tally(words.postgres)
    settings = {"autovacuum": "on", "wal_level": "replica"}
    PIECES.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        programs = choose_programs(words.postgres)
        site = stack.enter_context(
            sandbox(orders=10, clients=1, seed=words.seed, programs=programs, settings=settings)
        )
        prepare(site, words.postgres)
        number = words.seed
        follower = stack.enter_context(Shadow.of(site)) if words.shadow else None
        site = follower.site if follower is not None else site
        while tally.cases < words.cases:
            number += 1
            before = len(tally.wrong)
            if follower is not None:
                follower.go_on()
            kinds = [KINDS[(number * ROUND + turn) % len(KINDS)] for turn in range(ROUND)]
            asked = play(site, number, kinds, tally)
            if asked or len(tally.seconds) % BACKUP_EVERY == 0:
                take(site.cluster, site.repository)
            print(
                f"{tally.cases} cases, {len(tally.wrong)} wrong, round {tally.seconds[-1]:.1f} s", flush=True
            )
            for text in tally.wrong[before:]:
                print(f"  {text}", flush=True)
            (PIECES / f"{words.postgres}-{words.seed}.json").write_text(json.dumps(vars(tally)))
    TABLE.write_text(
        report([Tally.of(json.loads(path.read_text())) for path in sorted(PIECES.glob("*.json"))])
    )
    print(TABLE.read_text())
    return 1 if tally.wrong else 0


@dataclass
class Shadow:
    """A shadow whose server runs on between the rounds."""

    site: Sandbox
    keeper: Keeper

    @classmethod
    @contextmanager
    def of(cls, site: Sandbox) -> Iterator[Shadow]:
        keys = {"enabled": True, "behind": "0s", "checks": ["invariants"]}
        settings = site.cluster.settings.model_copy(update={"shadow": ShadowSettings.model_validate(keys)})
        keeper = Keeper()
        # Whether it would be quicker is not the question: so much WAL takes hours.
        page_repair_shadow.beats_some_blocks = lambda *_: True
        try:
            yield cls(replace(site, cluster=replace(site.cluster, settings=settings)), keeper)
        finally:
            keeper.end()

    def go_on(self) -> None:
        """As `shadow run` and a scheduled `check` do now and then; what was damaged is mended, and holds nothing."""
        cluster = self.site.cluster
        bring_up_to_date(cluster, self.site.repository)
        shadow_steps.step(cluster, self.site.repository, check=False, keeper=self.keeper)
        check(cluster, ["lost_writes"])
        for hold in shadow.status(cluster).holds:
            if hold.active:
                shadow.release(cluster, hold.id)


def prepare(site: Sandbox, major: int) -> None:
    """The tables, and their base backup."""
    with psycopg.connect(site.dsn, autocommit=True) as connection:
        for statement in SCHEMA.strip().split(";\n"):
            connection.execute(statement.encode())
        if major < 17:
            connection.execute(FILLER.encode())
        connection.execute("vacuum hot")
        connection.execute("vacuum cold")
    take(site.cluster, site.repository)


def report(tallies: Sequence[Tally]) -> str:
    """All runs together, by version."""
    majors = sorted({tally.major for tally in tallies}, reverse=True)
    of = {major: [tally for tally in tallies if tally.major == major] for major in majors}
    header = ("damage", *(f"PostgreSQL {major}" for major in majors), "answer")
    rows = [
        [
            TITLES[kind],
            *(str(sum(each.mended[kind] + each.refused[kind] for each in of[major])) for major in majors),
            "refused" if kind == "unlogged" else "mended",
        ]
        for kind in KINDS
    ]
    rows.append(["in all", *(str(sum(each.cases for each in of[major])) for major in majors), ""])
    blocked = sorted(seconds for tally in tallies for seconds in tally.blocked) or [0.0]
    rounds = sorted(seconds for tally in tallies for seconds in tally.seconds) or [0.0]
    wrong = [f"{tally.major}: {text}" for tally in tallies for text in tally.wrong]
    summary = (
        f"{len(wrong)} wrong. {len(rounds)} rounds of up to {ROUND} damages at once took"
        f" {rounds[len(rounds) // 2]:.1f} s each in the median, {rounds[-1]:.1f} s at most, plan, clones and"
        f" verification included. Writers waited {blocked[len(blocked) // 2]:.2f} s for a step in the median,"
        f" {blocked[-1]:.2f} s at most. {sum(tally.waited for tally in tallies)} times a page had to leave the"
        " buffers first (15)."
    )
    listed = "".join(f"- {text}\n" for text in wrong)
    return f"{describe()}.\n\n{markdown(header, rows)}\n\n{summary}\n{listed}"


if __name__ == "__main__":
    sys.exit(main())
