"""The other half of the table: every check again and again on healthy data that sixteen clients change."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from damage_places import ABOUT_THE_SERVER
from damage_site import BENCH, SHOP, Site, copy_of, pgbench_command
from knockwood.clone.spawn import spawn
from knockwood.drill.witness import Witness
from knockwood.drill.workload import Workload
from knockwood.errors import KnockwoodError
from knockwood.host import processes
from knockwood.integrity.check import Budget, Role
from knockwood.integrity.run import Report, run_checks
from knockwood.operations.check import check
from knockwood.operations.examination import names_for_a_clone
from knockwood.operations.protect import receiving, take
from knockwood.operations.proving import prove_cluster
from knockwood.postgres.connection import Connection, connect, server_facts
from knockwood.repository.targets import Latest, resolve
from sandbox import environment, say

CLIENTS = 16

# Two cores serve the writers and the checks: without a limit the checks would only wait.
_PGBENCH_RATE = "100"
_SHOP_PAUSE = 0.1
_UPKEEP_PAUSE = 1.0

_SHOP_UPKEEP = (
    "vacuum orders",
    "update parcels set seen = seen + 1, spot = point(seen, 1), papers = papers where id % 7 = 0",
    "create table brief as select i from generate_series(1, 5000) i",
    "reindex table concurrently parcels",
    "truncate brief",
    "alter table ledger alter column body type varchar(300)",
    "insert into parcels (number, label, seen) select i, 'new ' || i, i from generate_series(1, 300) i",
    "drop table brief",
    "delete from parcels where id % 5 = 0",
    "reindex index orders_by_customer",
    "vacuum parcels",
    "alter table ledger alter column body type text using body || ''",
    "insert into events (day) select date '2026-02-01' + i % 300 from generate_series(1, 300) i",
    "checkpoint",
    "vacuum full ledger",
    "create index concurrently brief_index on parcels (seen, id)",
    "vacuum order_lines",
    "drop index brief_index",
    "delete from events where id % 3 = 0",
    "cluster parcels using parcels_pkey",
    "vacuum analyze",
)
_BENCH_UPKEEP = (
    "vacuum pgbench_accounts",
    "create database brief_database",
    "update audit set body = repeat('y', id % 400) where id % 3 = 0",
    "reindex table pgbench_tellers",
    "truncate pgbench_history",
    "drop database brief_database",
    "alter table audit add column if not exists more int default (random() * 9)::int",
    "update pgbench_tellers set notes = repeat(md5(random()::text), 300)",
    "vacuum full pgbench_tellers",
    "alter table audit drop column if exists more",
    "reindex table concurrently pgbench_accounts",
    "vacuum full audit",
    "vacuum freeze pgbench_branches",
)


@dataclass
class Health:
    """What was run and what was said. `alarms` are findings that no damage explains: there is none here."""

    rounds: int = 0
    seconds: float = 0.0
    commits: int = 0
    upkeep: int = 0
    runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    alarms: list[Mapping[str, Any]] = field(default_factory=list)
    about_the_server: set[str] = field(default_factory=set)
    not_checked: Counter[str] = field(default_factory=Counter)
    compared_rows: int = 0

    def add(self, where: str, report: Report) -> None:
        """Count what a run of checks did on the server or on a clone."""
        for result in report.results:
            self.runs[where, result.name] += 1
            for finding in result.findings:
                self.finding(where, finding.as_json())
            for gap in result.not_checked:
                self.not_checked[_kind(f"{where}: {gap.check}: {gap.reason}")] += 1

    def finding(self, where: str, finding: Mapping[str, Any]) -> None:
        """Take one finding as JSON."""
        if finding["check"] in ABOUT_THE_SERVER:
            self.about_the_server.add(f"{finding['check']}: {finding['summary']}")
            return
        say(f"  FALSE ALARM {where}: {finding['check']}: {finding['summary']} ({finding['location']})")
        self.alarms.append({"where": where, **finding})

    def as_json(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "seconds": round(self.seconds, 1),
            "commits": self.commits,
            "upkeep": self.upkeep,
            "compared_rows": self.compared_rows,
            "clients": CLIENTS,
            "runs": {
                place: {name: count for (where, name), count in sorted(self.runs.items()) if where == place}
                for place in sorted({where for where, _ in self.runs})
            },
            "alarms": self.alarms,
            "about_the_server": sorted(self.about_the_server),
            "not_checked": dict(self.not_checked.most_common()),
        }


def _kind(reason: str) -> str:
    """Reasons that differ in numbers only are one."""
    return re.sub(r"\d+", "N", reason)


def watch_healthy(
    healthy: Site, parent: Path, rounds: int, seconds: float, on_round: Callable[[Health], None]
) -> None:
    """Run every check `rounds` times (or for so many seconds, if that is longer) under the writers.

    After each round `on_round` is told what there is so far.
    """
    health = Health()
    with copy_of(healthy, parent) as site, receiving(site.cluster, site.repository), ExitStack() as stack:
        before = _commits(site)
        begun = time.monotonic()
        stack.enter_context(_writers(site, health))
        while health.rounds < rounds or time.monotonic() - begun < seconds:
            if health.rounds:
                # As everywhere; without it each round would replay all the WAL of those before, twice.
                take(site.cluster, site.repository)
            health.add("server", check(site.cluster, heavy=True, here=True))
            _prove(site, health)
            _paused(site, health)
            health.rounds += 1
            health.seconds = time.monotonic() - begun
            health.commits = _commits(site) - before
            say(f"healthy: {health.rounds} rounds in {health.seconds:.0f} s, {health.commits} commits")
            on_round(health)


def _commits(site: Site) -> int:
    query = "select sum(xact_commit)::int from pg_stat_database where datname in (%s, %s)"
    return int(site.one("postgres", query, SHOP, BENCH))


def _prove(site: Site, health: Health) -> None:
    """A clone at the primary's last commit: every row compared, then opened for writes and checked."""
    proof = prove_cluster(site.cluster, backup=None, target=Latest())
    stored = site.repository.get_json(f"proofs/{proof.id}.json")
    for claim in proof.claims:
        where, name = "promoted clone", claim.name
        if name.startswith("check "):
            name = name.removeprefix("check ")
        elif claim.verdict == "broken":  # the comparison, the backup, the repository
            health.finding(where, {"check": "proof", "summary": f"{name}: {claim.detail}", "location": {}})
        health.runs[where, name] += 1
        if claim.verdict == "not_checked":
            health.not_checked[_kind(f"{where}: {name}: {claim.detail}")] += 1
    for finding in stored["findings"]:
        health.finding("promoted clone", finding)
    for table in stored["tables"]:
        health.compared_rows += table["rows"]
        for finding in table["findings"]:
            health.finding("comparison", finding)


def _paused(site: Site, health: Health) -> None:
    """A clone that stands still in recovery, as the comparison has it."""
    cluster, repository = site.cluster, site.repository
    plan = resolve(repository, Latest(), programs_for=cluster.programs)
    with spawn(repository, plan, programs=site.server.programs, purpose="check") as clone:
        with connect(clone.dsn()) as connection:
            facts = server_facts(connection)
        subject = replace(
            cluster.subject(Budget(), repository=repository),
            dsn=clone.dsn(SHOP),
            facts=facts,
            role=Role.CLONE,
            data_directory=clone.data_directory,
        )
        health.add("paused clone", run_checks(subject, names_for_a_clone()))


# --- the load ----------------------------------------------------------------------------------------


@contextmanager
def _writers(site: Site, health: Health) -> Iterator[None]:
    witness = Witness(site.folder / "witness.log")
    workload = Workload(site.server.dsn(SHOP), witness, clients=CLIENTS, pause=_SHOP_PAUSE)
    words = ["-n", "-c", str(CLIENTS), "-j", "2", "-T", "100000", "-R", _PGBENCH_RATE]
    stop = threading.Event()
    upkeep = [
        threading.Thread(target=_upkeep, args=(site, database, statements, stop, health), daemon=True)
        for database, statements in ((SHOP, _SHOP_UPKEEP), (BENCH, _BENCH_UPKEEP))
    ]
    child = processes.start(
        pgbench_command(site, words),
        env=environment(None),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        workload.start()
        for thread in upkeep:
            thread.start()
        yield
        if child.poll() is not None:
            raise RuntimeError(f"pgbench ended by itself with status {child.returncode}")
        if workload.counters.acknowledged == 0:
            raise RuntimeError(f"the shop's clients did nothing: {workload.counters.errors}")
    finally:
        stop.set()
        workload.stop()
        processes.stop(child, grace=0)
        for thread in upkeep:
            thread.join(60)
        witness.close()


def _remove_half_built(connection: Connection) -> None:
    """Drop what a concurrent build left that lost a deadlock."""
    query = "select indexrelid::regclass::text from pg_index where not indisvalid"
    for (name,) in connection.execute(query).fetchall():
        connection.execute(f"drop index if exists {name}".encode())


def _upkeep(
    site: Site, database: str, statements: tuple[str, ...], stop: threading.Event, health: Health
) -> None:
    """What administrators and scripts do, over and over. What a lock keeps from happening may fail."""
    turn = 0
    while not stop.is_set():
        try:
            with connect(site.server.dsn(database, application_name="upkeep")) as connection:
                while not stop.is_set():
                    statement = statements[turn % len(statements)]
                    turn += 1
                    # A concurrent build that gives up leaves an invalid index: a true finding.
                    limit = "0" if "concurrently" in statement else "2s"
                    try:
                        connection.execute(f"set lock_timeout = '{limit}'".encode())
                        connection.execute(statement.encode())
                        health.upkeep += 1
                    except Exception:
                        if connection.closed:
                            raise
                        _remove_half_built(connection)
                    stop.wait(_UPKEEP_PAUSE)
        except (KnockwoodError, Exception):
            stop.wait(0.5)
