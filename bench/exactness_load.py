"""The load of the exactness bench, in a process of its own: the shop's clients, and everything that is awkward.

    exactness_load.py DSN WITNESS CLIENTS SEED

Prints `ready` once everybody works, and ends when its standard input does; the last line is JSON: what was
committed and how often each awkward thing was done.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from knockwood.drill.witness import Witness
from knockwood.drill.workload import Workload

Connection = psycopg.Connection[tuple[Any, ...]]

SCHEMA = """
create table accounts (id int primary key, balance bigint not null, note text not null);
insert into accounts select i, 1000, 'account number ' || i from generate_series(1, 3000) i;
create table documents (id int primary key, title text not null, body text not null);
alter table documents alter body set storage external;
insert into documents select i, 'document ' || i, repeat(md5(i::text), 300) from generate_series(1, 600) i;
create table events (id bigint generated always as identity, region text not null, at timestamptz not null
    default clock_timestamp(), payload jsonb not null, primary key (region, id)) partition by list (region);
create table events_north partition of events for values in ('north');
create table events_south partition of events for values in ('south');
insert into events (region, payload) select case i % 2 when 0 then 'north' else 'south' end,
    jsonb_build_object('n', i, 'text', md5(i::text)) from generate_series(1, 4000) i;
create table imports (id bigserial, batch int not null, amount numeric not null, tag uuid not null);
insert into imports (batch, amount, tag) select 0, i * 1.10, md5(i::text)::uuid from generate_series(1, 5000) i;
"""
"""`imports` has no key; ids up to the half of a table's seed rows are left alone, for whoever wants quiet rows."""

TABLES = ("accounts", "documents", "events_north", "events_south", "imports", "orders", "products")


class Awkward:
    """Clients that do what makes snapshots and row versions hard to compare."""

    def __init__(self, dsn: str, seed: int) -> None:
        self.dsn = dsn
        self.seed = seed
        self.stop = threading.Event()
        self.done: Counter[str] = Counter()
        self.lock = threading.Lock()
        kinds: list[Callable[[Connection, random.Random], None]] = [
            *(self.subtransactions, self.lockers, self.lockers, self.lockers, self.aborts),
            *(self.copies, self.documents, self.moves),
        ]
        self.threads = [
            threading.Thread(target=self.work, args=(kind, number), daemon=True)
            for number, kind in enumerate(kinds)
        ]
        self.threads.append(threading.Thread(target=self.vacuums, daemon=True))

    def work(self, kind: Callable[[Connection, random.Random], None], number: int) -> None:
        chance = random.Random(self.seed * 100 + number)
        connection: Connection | None = None
        while not self.stop.is_set():
            try:
                if connection is None or connection.closed:
                    connection = psycopg.connect(self.dsn, application_name="awkward")
                kind(connection, chance)
                connection.commit()
            except psycopg.OperationalError:
                # A deadlock, or the server is gone: begin anew.
                if connection is not None:
                    connection.close()
                self.stop.wait(0.1)
        if connection is not None:
            connection.close()

    def count(self, what: str, times: int = 1) -> None:
        with self.lock:
            self.done[what] += times

    def subtransactions(self, connection: Connection, chance: random.Random) -> None:
        """Nested savepoints, some rolled back; now and then more of them than a snapshot's cache holds."""
        many = 70 if chance.random() < 0.05 else 4
        for number in range(many):
            connection.execute(f"savepoint s{number}")
            connection.execute(
                "update accounts set balance = balance + 1 where id = %s", [chance.randint(1501, 3000)]
            )
            if chance.random() < 0.4:
                connection.execute(f"rollback to savepoint s{number}")
            elif chance.random() < 0.5:
                connection.execute(f"release savepoint s{number}")
        self.count("subtransactions", many)

    def lockers(self, connection: Connection, chance: random.Random) -> None:
        """Three of these hold the same few rows at once: multixacts, some of which update too."""
        rows = sorted(chance.sample(range(1490, 1530), 4))
        strength = chance.choice(("key share", "key share", "share", "no key update", "update"))
        connection.execute(f"select from accounts where id = any(%s) order by id for {strength}", [rows])
        time.sleep(chance.random() * 0.02)
        if strength in ("no key update", "update"):
            connection.execute("update accounts set balance = balance - 1 where id = any(%s)", [rows[:2]])
        elif strength == "key share":
            # Orders that never change are locked too: their row versions stay, their xmax does not.
            connection.execute(
                "select from orders where id = any(%s) for key share", [[-row for row in rows]]
            )
        self.count(f"for {strength}")

    def aborts(self, connection: Connection, chance: random.Random) -> None:
        """Rows written and thrown away, and the space used again."""
        first = chance.randint(1501, 2900)
        connection.execute(
            "update accounts set note = 'never ' || id where id between %s and %s", [first, first + 20]
        )
        connection.execute(
            "insert into imports (batch, amount, tag) select 1, i, gen_random_uuid() from generate_series(1, 50) i"
        )
        connection.rollback()
        self.count("aborted")

    def copies(self, connection: Connection, chance: random.Random) -> None:
        batch = chance.randint(2, 9)
        connection.execute("delete from imports where batch = %s", [batch])
        rows = chance.randint(50, 400)
        with (
            connection.cursor() as cursor,
            cursor.copy("copy imports (batch, amount, tag) from stdin") as copy,
        ):
            for number in range(rows):
                copy.write_row((batch, f"{number}.50", f"{chance.getrandbits(128):032x}"))
        self.count("rows by COPY", rows)

    def documents(self, connection: Connection, chance: random.Random) -> None:
        body = "".join(chance.choices("abcdefghijklmnop ", k=64)) * chance.randint(1, 300)
        connection.execute("update documents set body = %s where id = %s", [body, chance.randint(301, 600)])
        self.count("TOAST updates")

    def moves(self, connection: Connection, chance: random.Random) -> None:
        moved = connection.execute(
            "update events set region = case region when 'north' then 'south' else 'north' end where id = %s",
            [chance.randint(2001, 4000)],
        )
        self.count("partition moves", moved.rowcount)

    def vacuums(self) -> None:
        chance = random.Random(self.seed)
        with psycopg.connect(self.dsn, autocommit=True, application_name="awkward") as connection:
            while not self.stop.wait(0.3):
                how = "(freeze)" if chance.random() < 0.1 else ""
                connection.execute(f"vacuum {how} {chance.choice(TABLES)}".encode())
                self.count("VACUUM")


def main() -> int:
    # Writing never stops, but where cores are few the proof goes first: otherwise the bench measures waiting.
    os.nice(10)
    dsn, witness_path, clients, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
    witness = Witness(witness_path)
    shop = Workload(dsn, witness, clients=clients, seed=seed, pause=0)
    awkward = Awkward(dsn, seed)
    shop.start()
    for thread in awkward.threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    awkward.stop.set()
    shop.stop()
    for thread in awkward.threads:
        thread.join(30)
    told = {"shop commits": shop.counters.acknowledged, "shop failures": shop.counters.failed}
    print(json.dumps(told | dict(sorted(awkward.done.items()))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
