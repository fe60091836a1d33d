"""Exactness: proofs in a row under writers, none with a false difference; one changed byte, found and named.

    bench/exactness.py [--only MAJOR:LEVEL ...] [--bytes TABLE ...] [--proofs N] [--short N] [--clients N]
                       [--orders N] [--seed N]

Exit status 0: every claim of every proof held, and every changed byte was named, alone; 1: not so, and the last
lines say where; 2: it could not be tested.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psycopg

from exactness_flip import CASES, Case, Changed, change_a_byte
from exactness_report import Proved, Round, report
from knockwood.clone.spawn import Clone, spawn
from knockwood.drill.sandbox import DATABASE, Sandbox, choose_programs, sandbox
from knockwood.errors import KnockwoodError, ProgramsMissingError
from knockwood.host import processes
from knockwood.model import Proof, Verdict
from knockwood.operations import prove as prove_module
from knockwood.operations.proof_pages import COMPARED
from knockwood.operations.protect import take
from knockwood.operations.prove import Options, prove
from knockwood.operations.proving import prove_cluster
from knockwood.repository.targets import Latest
from machine import describe
from sandbox import BENCH, OUT, end_cleanly, say

FULL, SHORT = (18,), (17, 15)
LEVELS = ("logical", "replica")


@dataclass
class Settings:
    """How much of it."""

    proofs: int
    short: int
    clients: int
    orders: int
    seed: int
    only: tuple[str, ...] = field(default=())
    bytes: tuple[str, ...] = field(default=())

    def cases(self, major: int) -> list[Case]:
        """The bytes to change: all on the newest version, three on the others, or those asked for."""
        if self.bytes:
            return [case for case in CASES if case.table in self.bytes]
        return list(CASES if major in FULL else CASES[:3])


@contextmanager
def load(box: Sandbox, clients: int, seed: int) -> Iterator[dict[str, int]]:
    """Writers in a process of their own while the block runs; what they did is in the mapping afterwards."""
    told: dict[str, int] = {}
    command = [sys.executable, BENCH / "exactness_load.py", box.server.dsn(DATABASE, user="app")]
    child = processes.start(
        [*map(str, command), str(box.folder / "load.log"), str(clients), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None,
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline().strip() != b"ready":
            raise RuntimeError("the load did not start")
        yield told
        child.stdin.close()
        told |= json.loads(child.stdout.readline())
        child.wait(60)
    finally:
        processes.stop(child, grace=5)


def one_round(major: int, level: str, settings: Settings) -> Round:
    """One cluster: its proofs in a row, then its changed bytes."""
    programs = choose_programs(major)
    done = Round(f"{programs.major}.{programs.minor}", level)
    with (
        sandbox(
            orders=settings.orders,
            clients=0,
            seed=settings.seed,
            programs=programs,
            settings={"wal_level": level},
        ) as box,
        load(box, settings.clients, settings.seed) as told,
    ):
        take(box.cluster, box.repository)
        count = settings.proofs if major in FULL else settings.short
        for number in range(1, count + 1):
            if number % 3 == 0:
                # Between proofs backups go on as everywhere, full and incremental in turn.
                take(box.cluster, box.repository, incremental=major >= 17 and number % 2 == 1)
            proof = prove_cluster(box.cluster, backup=None, target=Latest())
            done.proofs.append(judged(box, proof, f"proof {number}"))
            say(f"{done.name}: {done.proofs[-1]}")
        for number, case in enumerate(settings.cases(major)):
            try:
                # Little is left to replay after it. Before 17 the server is stopped while the byte is changed, and
                # replays again from its restart point: this leaves pages of the table that it does not touch.
                take(box.cluster, box.repository)
                done.proofs.append(changed(box, case, settings.seed + number))
            except (KnockwoodError, RuntimeError, psycopg.Error) as error:
                done.failures.append(f"one byte of {case.table}: {type(error).__name__}: {error}")
                say(f"{done.name}: {done.failures[-1]}")
            else:
                say(f"{done.name}: {done.proofs[-1]}")
    done.load = told
    return done


def stored(box: Sandbox, proof: Proof) -> dict[str, Any]:
    """The proof with all its tables, as it lies in the repository."""
    value: dict[str, Any] = json.loads(b"".join(box.repository.storage.read(f"proofs/{proof.id}.json")))
    return value


def judged(box: Sandbox, proof: Proof, name: str) -> Proved:
    """A proof of an undamaged clone: every claim must be held."""
    found = Proved(name, proof, sum(table["rows"] for table in stored(box, proof)["tables"]))
    found.violations += [
        f"{claim.name}: {claim.verdict}: {claim.detail}"
        for claim in proof.claims
        if claim.verdict is not Verdict.HELD
    ]
    return found


def changed(box: Sandbox, case: Case, seed: int) -> Proved:
    """A proof in which the clone has one wrong byte: that must be named, and nothing else."""
    done: list[Changed] = []
    real = spawn

    def spawn_and_change(*arguments: Any, **options: Any) -> Clone:
        clone = real(*arguments, **options)
        try:
            done.append(change_a_byte(clone, DATABASE, case, seed))
        except BaseException:
            clone.destroy()
            raise
        return clone

    options = Options(
        invariants=box.cluster.invariants(),
        checks=("invariants", "foreign_keys", "page_checksums"),
        data_directory=box.server.data_directory,
        programs_for=box.cluster.programs,
    )
    with patch.object(prove_module, "spawn", spawn_and_change):
        proof = prove(box.repository, box.dsn, cluster=box.cluster.name, options=options)
    tables = stored(box, proof)["tables"]
    found = Proved(f"one byte of {case.table} {case.column}", proof, sum(table["rows"] for table in tables))
    if not done:
        found.violations.append("no clone was made")
        return found
    [change] = done
    findings = [finding for table in tables for finding in table["findings"]]
    found.named = [str(finding["summary"]) for finding in findings]
    found.violations += misnamed(change, findings) if case.quiet else mislocated(change, findings)
    for claim in proof.claims:
        expected = Verdict.BROKEN if claim.name == COMPARED else Verdict.HELD
        if claim.verdict is not expected and claim.name not in case.breaks:
            found.violations.append(f"{claim.name}: {claim.verdict}: {claim.detail}")
    return found


def misnamed(change: Changed, findings: list[dict[str, Any]]) -> list[str]:
    """What is wrong with findings that must name one row: table, key, column, both values."""
    if len(findings) != 1:
        return [f"{len(findings)} findings instead of one: {[f['summary'] for f in findings][:5]}"]
    location, columns = findings[0]["location"], findings[0]["evidence"]["columns"]
    wanted = {"relation": change.case.table, "key": change.key, "database": DATABASE}
    wrong = [
        f"{part} is {location.get(part)!r}, not {value!r}"
        for part, value in wanted.items()
        if location.get(part) != value
    ]
    values = {change.case.column: {"primary": change.before[:200], "copy": change.after[:200]}}
    # Of a long value the beginning is shown; the byte may lie behind it.
    if columns != values:
        wrong.append(f"columns are {columns}, not {values}")
    return wrong


def mislocated(change: Changed, findings: list[dict[str, Any]]) -> list[str]:
    """A row that the primary has rewritten since can be named by its table at least."""
    relations = {finding["location"].get("relation") for finding in findings}
    return [] if relations == {change.case.table} else [f"named {sorted(map(str, relations))}"]


def wanted_rounds(only: tuple[str, ...]) -> list[tuple[int, str]]:
    rounds = [(major, level) for major in (*FULL, *SHORT) for level in LEVELS]
    return [entry for entry in rounds if not only or f"{entry[0]}:{entry[1]}" in only]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="MAJOR:LEVEL")
    parser.add_argument("--bytes", nargs="*", default=[], metavar="TABLE", choices=[c.table for c in CASES])
    parser.add_argument("--proofs", type=int, default=10, help="in a row, on the newest version")
    parser.add_argument("--short", type=int, default=3, help="in a row, on the others")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--orders", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT / "exactness.md")
    given = parser.parse_args()
    settings = Settings(
        given.proofs,
        given.short,
        given.clients,
        given.orders,
        given.seed,
        tuple(given.only),
        tuple(given.bytes),
    )
    end_cleanly()
    rounds: list[Round] = []
    for major, level in wanted_rounds(settings.only):
        try:
            rounds.append(one_round(major, level, settings))
        except ProgramsMissingError as error:
            if major in FULL:
                say(f"cannot test: {error}")
                return 2
            say(f"PostgreSQL {major} is not installed: left out")
        except (KnockwoodError, RuntimeError, OSError, psycopg.Error) as error:
            rounds.append(Round(str(major), level, failures=[f"{type(error).__name__}: {error}"]))
            say(f"{major} {level}: {rounds[-1].failures[0]}")
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(report(rounds, describe(), settings.clients))
    print(given.out.read_text() if rounds else "nothing was tested")
    violations = [line for entry in rounds for line in entry.violations]
    for line in violations:
        say(f"VIOLATION {line}")
    return 1 if violations or not rounds else 0


if __name__ == "__main__":
    sys.exit(main())
