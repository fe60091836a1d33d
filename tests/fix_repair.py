"""Protected servers whose pages are damaged while they run, for the tests of repairs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from knockwood.drill import faults
from knockwood.host import privileges
from knockwood.host.direct import read_block, write_block
from knockwood.model.recovery import Plan, Recovery
from knockwood.operations.cluster import Cluster
from knockwood.operations.page_repair import PageRef, PageRepairs, plan_pages, verify_pages
from knockwood.operations.protect import take
from knockwood.postgres.connection import connect, translated
from knockwood.postgres.server import LocalServer
from knockwood.recover.execute import execute
from knockwood.recover.pages_facts import Target, target_named
from knockwood.recover.plan.page_wal import PAGE_BYTES
from knockwood.recover.plan.pages import segment_of, segment_path
from knockwood.repository.repository import Repository
from knockwood.settings import ClusterSettings
from knockwood.settings.schema import ProofSettings, ShadowSettings

ORDERS = """
create table orders (id int primary key, customer int not null, note text, body text);
alter table orders alter column body set storage external;
alter table orders set (autovacuum_enabled = off);
create index orders_customer on orders (customer);
insert into orders select i, i % 50, repeat('n', 60) || i, case when i % 100 = 0 then repeat(md5(i::text), 200) end
from generate_series(1, 4000) as i;
create table other (id int primary key, body text);
insert into other select i, repeat('x', 100) from generate_series(1, 3000) as i;
create unlogged table scratch as select i as id from generate_series(1, 1000) as i;
vacuum (freeze off) orders;
"""


@dataclass
class Site:
    """A protected server. `folder` is open to its account."""

    server: LocalServer
    cluster: Cluster
    repository: Repository
    folder: Path
    failures: list[str] = field(default_factory=list)

    def sql(self, text: str, *parameters: object) -> Any:
        """Run statements; the first column of the first row of the last, if there is one."""
        with connect(self.server.dsn()) as connection, translated():
            cursor = connection.execute(text.encode(), parameters or None)
            while cursor.nextset():
                pass
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None

    def target(self, name: str) -> Target:
        with connect(self.server.dsn()) as connection:
            return target_named(connection, "postgres", name)

    def path(self, name: str) -> str:
        return self.target(name).path

    def toast(self) -> str:
        return str(self.sql("select reltoastrelid::regclass::text from pg_class where relname = 'orders'"))

    # --- damage -----------------------------------------------------------------------------------

    def settle(self) -> None:
        self.sql("checkpoint")

    def page(self, path: str, block: int) -> bytes:
        _, offset = segment_of(block)
        return read_block(self.server.data_directory / segment_path(path, block), offset, PAGE_BYTES)

    def put(self, path: str, block: int, page: bytes) -> None:
        """A page on disk becomes this one, while the server runs and knows nothing of it."""
        _, offset = segment_of(block)
        write_block(self.server.data_directory / segment_path(path, block), offset, page)

    def forget(self) -> None:
        """Nothing is in the server's buffers any more."""
        self.server.stop("fast")
        self.server.start()

    def damage(self, path: str, block: int, page: bytes) -> None:
        """A page on disk becomes this one, and no buffer holds what was there before."""
        self.server.stop("fast")
        self.put(path, block, page)
        self.server.start()

    # --- repair -----------------------------------------------------------------------------------

    def plan(self, *refs: tuple[str, int], **options: Any) -> Plan:
        damaged = [PageRef(path, block) for path, block in refs]
        return plan_pages(self.cluster, self.repository, damaged, **options)

    def execute(self, plan: Plan) -> Recovery:
        with PageRepairs(self.cluster, self.repository, plan=plan) as repairs:
            return execute(
                plan,
                repairs.handlers,
                self.folder / "journal",
                approve=plan.id,
                verify=lambda: verify_pages(self.cluster, self.repository, plan),
            )


@contextmanager
def site_of(server: LocalServer, schema: str = ORDERS, *, shadowed: bool = False) -> Iterator[Site]:
    """Protect a running server with a full backup of the schema."""
    folder = server.data_directory.parent / "kw"
    folder.mkdir(mode=0o755)
    privileges.give(folder, server.account)
    with connect(server.dsn()) as connection:
        for statement in schema.strip().split(";\n"):
            connection.execute(statement.encode())
    settings = ClusterSettings(
        dsn=server.dsn(),
        repository=str(folder / "repository"),
        data_directory=server.data_directory,
        programs=server.programs.folder,
        proof=ProofSettings(clones=folder),
        shadow=ShadowSettings.model_validate({"enabled": shadowed, "behind": "0s", "checks": ["invariants"]}),
    )
    cluster = Cluster("shop", settings, folder / "state")
    repository = cluster.create_repository()
    take(cluster, repository)
    yield Site(server, cluster, repository, folder)


WORK = (
    "insert into orders values ({n} + 10000, 1, repeat('n', 60), repeat('b', 3000))",
    "update orders set note = note || 'u' where id = 1 + {n} * 37 % 4000",
    "update orders set customer = customer + 1 where id = 1 + {n} * 53 % 4000",
    "update other set body = body || 'y' where id = 1 + {n} * 31 % 3000",
    "select count(*) from orders where customer = {n} % 50",
    "delete from orders where id = {n} + 9000",
)


@contextmanager
def load(site: Site, count: int = 2, statements: Sequence[str] = WORK) -> Iterator[list[int]]:
    """Readers and writers while the block runs; what the damage makes fail is noted in the site.

    Yields a list whose only number is how many statements succeeded.
    """
    stop = threading.Event()
    done = [0]

    def work(number: int) -> None:
        turn = number
        with psycopg.connect(site.server.dsn(), autocommit=True) as connection:
            while not stop.is_set():
                text = statements[turn % len(statements)].format(n=turn)
                try:
                    connection.execute(text.encode())
                    done[0] += 1
                except (psycopg.errors.DataCorrupted, psycopg.errors.UniqueViolation) as error:
                    site.failures.append(str(error).splitlines()[0])
                turn += count
                stop.wait(0.002)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def flipped(page: bytes, offset: int = 8000, bit: int = 3) -> bytes:
    whole = bytearray(page)
    whole[offset] ^= 1 << bit
    return bytes(whole)


__all__ = ["ORDERS", "Site", "faults", "flipped", "load", "site_of"]
