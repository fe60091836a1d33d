"""Subjects and damage for the tests of checks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from knockwood.integrity.check import Budget, Role, Subject
from knockwood.integrity.run import Report, run_checks
from knockwood.model import Finding
from knockwood.postgres.connection import connect, server_facts
from knockwood.postgres.server import LocalServer

SHOP = """
create table shop (
    id int primary key, customer int not null, amount numeric not null, note text, tags int[], place point);
alter table shop alter column note set storage external;
insert into shop
select i, i % 97, i * 1.5, case when i % 50 = 0 then repeat(md5(i::text), 200) else 'n' || i end,
       array[i % 10, i % 7], point(i % 100, i % 77)
from generate_series(1, 5000) as i;
create index shop_customer on shop (customer);
create table other (id int primary key, body text);
insert into other select i, repeat('x', 100) from generate_series(1, 5000) as i;
create unlogged table scratch as select i as id from generate_series(1, 1000) as i;
"""


def subject_of(server: LocalServer, *, local: bool = True, **more: Any) -> Subject:
    """The server as a subject; with `local=False` without reach to its files."""
    with connect(server.dsn()) as connection:
        facts = server_facts(connection)
    return Subject(
        "shop",
        server.dsn(user=more.pop("user", "postgres")),
        facts,
        role=more.pop("role", Role.PRIMARY),
        data_directory=more.pop("folder", server.data_directory) if local else None,
        programs=server.programs,
        budget=Budget(lock_timeout=timedelta(seconds=2)),
        **more,
    )


def check(server: LocalServer, *names: str, **more: Any) -> Report:
    return run_checks(subject_of(server, **more), names)


def found(server: LocalServer, name: str, **more: Any) -> list[Finding]:
    """What one check finds; fails if it did not look everywhere and found nothing."""
    report = check(server, name, **more)
    assert report.findings or not report.not_checked, report.not_checked
    return list(report.findings)


def silent(server: LocalServer, *names: str, **more: Any) -> None:
    """The checks look at everything and find nothing."""
    report = check(server, *names, **more)
    shown = [f.as_json() for f in report.findings] + [gap.as_json() for gap in report.not_checked]
    assert shown == [], shown


def sql(server: LocalServer, text: str, *parameters: object, database: str = "postgres") -> Any:
    """Run statements; the first column of the first row of the last, if there is one."""
    with connect(server.dsn(database)) as connection:
        cursor = connection.execute(text, parameters or None)
        while cursor.nextset():
            pass
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def path_of(server: LocalServer, relation: str) -> str:
    return str(sql(server, f"select pg_relation_filepath('{relation}')"))


def places(findings: list[Finding]) -> set[tuple[str | None, str | None, int | None]]:
    return {(f.location.relation, f.location.file, f.location.block) for f in findings}


CHURN = (
    "insert into shop select (random() * 2e9)::int, 1, 1, repeat(md5('x'), 100) on conflict do nothing",
    "update shop set amount = amount + 1, note = note where id = 1 + (random() * 5000)::int",
    "update shop set customer = customer + 1 where id = 1 + (random() * 5000)::int",
    "delete from shop where id = 1 + (random() * 5000)::int",
    "vacuum shop",
    "update other set body = body || 'x' where id % 7 = 0",
    "reindex table other",
    "checkpoint",
    "create table if not exists brief as select g from generate_series(1, 5000) g",
    "truncate brief",
    "drop table if exists brief",
    "vacuum full other",
)


@contextmanager
def writers(server: LocalServer, count: int = 4) -> Iterator[None]:
    """Concurrent changes of every kind while the block runs."""
    stop = threading.Event()

    def work(number: int) -> None:
        with connect(server.dsn()) as connection:
            connection.execute("set lock_timeout = '1s'")
            step = number
            while not stop.is_set():
                step += 1
                # Writers meet deadlocks and vanished tables; what they do not manage does not matter.
                try:
                    connection.execute(CHURN[step % len(CHURN)])
                except Exception:
                    continue

    threads = [threading.Thread(target=work, args=(n * 3,)) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
