#!/usr/bin/env python3
"""The gap test: Knockwood beside pgBackRest and Barman, on the same damages, in one run.

`make bench-peers`. Ends with 0 if Knockwood found every damage with its exact window and never restored
short, with 1 if not, with 2 if Knockwood could not be tested.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import gap_barman
import gap_pgbackrest
from gap_expect import Known, Observed, faults
from gap_knockwood import Knockwood
from gap_report import protocol, report
from gap_scenario import (
    DAMAGED,
    DAMAGES,
    Damage,
    Facts,
    Result,
    busy,
    commit_all,
    differences,
    fill,
    questions,
    run_case,
    wait_archived,
)
from gap_tools import Source, Tool
from knockwood.host import privileges
from knockwood.postgres.binaries import Programs
from machine import describe
from sandbox import OUT, end_cleanly, new_server, say, system_programs, work_folder

EXIT_OK, EXIT_BROKEN, EXIT_NOT_CHECKED = 0, 1, 2
TOOLS = ("Knockwood", "pgBackRest", "Barman")


@dataclass(frozen=True, slots=True)
class Run:
    """All that was seen in one run."""

    title: str
    results: Mapping[str, Sequence[Result]]
    missing: Mapping[str, str]
    facts: Facts
    wanted: Mapping[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/peers.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--postgres", type=int, help="the distribution's major version; otherwise 15 or the next"
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="only these")
    keys = [damage.key for damage in DAMAGES]
    parser.add_argument("--damages", nargs="+", choices=keys, default=keys, help="only these rows")
    given = parser.parse_args(arguments)
    end_cleanly()
    damages = [damage for damage in DAMAGES if damage.key in given.damages]
    programs = system_programs(given.postgres)
    run = run_everything(programs, given.tools, damages)
    text = report(run.title, damages, run.results, run.missing, run.wanted)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "gap-test.md").write_text(text)
    (OUT / "gap-test.txt").write_text(protocol(run.results))
    print(text)
    say(f"written to {OUT / 'gap-test.md'}, every command and its answer to {OUT / 'gap-test.txt'}")
    return judge(run)


def judge(run: Run) -> int:
    """Say whether Knockwood kept its promise; returns the exit status."""
    if "Knockwood" not in run.results:
        say(f"Knockwood was not tested: {run.missing.get('Knockwood', 'left out')}")
        return EXIT_NOT_CHECKED
    facts = run.facts
    known = Known(facts.ends, facts.segments, DAMAGED, facts.segment_bytes, "")
    broken = 0
    for result in run.results["Knockwood"]:
        if not result.applicable or result.restored is None or result.restore is None:
            continue
        verify = result.verify[-1]
        wrong = differences(result.restored.tables, run.wanted) if result.restored.started else ""
        seen = Observed(
            key=result.damage.key,
            verify_exit=verify.status,
            verify_json=verify.out,
            restore_exit=result.restore.status,
            started=result.restored.started,
            rows=result.restored.rows,
            tables=wrong,
            loss_rows=result.loss_rows,
        )
        for fault in faults(seen, known):
            broken += 1
            print(f"Knockwood fell short, {result.damage.key}: {fault}")
    print("Knockwood found every damage with its exact window" if not broken else f"{broken} shortcomings")
    return EXIT_BROKEN if broken else EXIT_OK


def run_everything(programs: Programs, names: Sequence[str], damages: Sequence[Damage]) -> Run:
    """Set up the cluster and the tools, commit, damage, verify, restore."""
    account = privileges.server_account()
    results: dict[str, list[Result]] = {}
    with work_folder(account) as work, cluster(programs, work) as source, ExitStack() as closing:
        tools, missing = prepare(source, names, closing)
        facts, tools = protect(source, tools, missing)
        wanted = questions(source.server.dsn())[1]
        versions = ", ".join(f"{tool.name} {tool.version()}" for tool in tools)
        for tool in tools:
            say(tool.name)
            results[tool.name] = [run_case(tool, damage, facts, source) for damage in damages]
    title = (
        f"# The gap test\n\nPostgreSQL {programs.major}.{programs.minor}; {versions}; {describe()}.\n\n"
        f"Six commits, each in a WAL segment of its own; commit {DAMAGED}'s segment is the damaged one."
    )
    return Run(title, results, missing, facts, wanted)


@contextmanager
def cluster(programs: Programs, work: Path) -> Iterator[Source]:
    """A cluster with an archive_command that is set once the tools are known."""
    account = privileges.server_account()
    work.chmod(0o755)
    settings = {
        "wal_level": "replica",
        "max_wal_senders": "10",
        "archive_mode": "on",
        "fsync": "off",
        "autovacuum": "off",
    }
    server = new_server(programs, work / "pg", account, settings)
    try:
        yield Source(programs, account, work, server)
    finally:
        server.stop("immediate")


def prepare(source: Source, names: Sequence[str], closing: ExitStack) -> tuple[list[Tool], dict[str, str]]:
    """The tools that can be used, archiving from now on, and why the others cannot."""
    missing: dict[str, str] = {}
    found: list[Tool] = []
    for name in names:
        tool, reason = make(source, name)
        if tool is None:
            missing[name] = reason
        else:
            found.append(tool)
            closing.callback(tool.close)
    fill(source)
    ready: list[Tool] = []
    for tool in found:
        try:
            say(f"preparing {tool.name}")
            tool.prepare()
            ready.append(tool)
        except (RuntimeError, OSError) as error:
            missing[tool.name] = f"cannot be set up: {str(error).splitlines()[-1]}"
            say(f"{tool.name}: {error}")
    words = " && ".join(words for words in (tool.archive_words() for tool in ready) if words)
    source.ask(f"ALTER SYSTEM SET archive_command = '{words or '/bin/true'}'")
    source.ask("SELECT pg_reload_conf()")
    return ready, missing


def make(source: Source, name: str) -> tuple[Tool | None, str]:
    """One tool, or why it cannot be used."""
    folder = source.work / name.lower()
    if name == "Knockwood":
        return Knockwood(source, folder), ""
    if name == "pgBackRest":
        reason = gap_pgbackrest.find()
        return (None, reason) if reason else (gap_pgbackrest.PgBackRest(source, folder), "")
    program, reason = gap_barman.find(source.account)
    return (None, reason) if reason else (gap_barman.Barman(source, folder, program), "")


def protect(source: Source, tools: list[Tool], missing: dict[str, str]) -> tuple[Facts, list[Tool]]:
    """A backup by each tool, then the commits, then all WAL in each repository."""
    done: list[Tool] = []
    for tool in tools:
        say(f"backup by {tool.name}")
        try:
            with busy(source):
                tool.backup()
            done.append(tool)
        except (RuntimeError, TimeoutError) as error:
            missing[tool.name] = f"its backup failed: {str(error).splitlines()[-1]}"
            say(f"{tool.name}: {error}")
    facts = commit_all(source)
    wait_archived(source, facts.segments[-1])
    for tool in done:
        tool.settle(facts.segments[-1])
    return facts, done


if __name__ == "__main__":
    sys.exit(main())
