#!/usr/bin/env python3
"""How fast the archive is indexed and asked: `make bench-history`.

A cluster of its own writes WAL with pgbench, and between its runs COPY, wide rows, updates, deletes and DDL; its
segments are archived, indexed by two processes, and asked as `knockwood log` asks and by the command itself. Ends
with 0 if the bars were reached (300 MB/s of WAL on two cores, any question under 1 s).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from knockwood.history import store
from knockwood.history.assemble import Asked
from knockwood.history.index import ArchiveIndex
from knockwood.host import privileges
from knockwood.model import WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import connect, server_facts
from knockwood.postgres.server import LocalServer, init_cluster
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository
from knockwood.repository.storage.local import LocalStorage
from machine import describe, load
from sandbox import OUT, ask, end_cleanly, say, system_programs, work_folder
from tables import markdown

BAR_MEGABYTES = 300.0
BAR_SECONDS = 1.0
_OTHERS = """
create table if not exists narrow (id bigint, a int, b int, t text);
create table if not exists wide (id bigint, body text, big text);
insert into narrow select g, g % 7, g % 11, 'some text ' || g from generate_series(1, 100000) g;
copy narrow to '{file}' with (format binary);
truncate narrow;
copy narrow from '{file}' with (format binary);
insert into wide select g, repeat(md5(g::text), 40),
  (select string_agg(md5((g * 200 + k)::text), '') from generate_series(1, 150) k) from generate_series(1, 2000) g;
update wide set body = body || 'x' where id % 3 = 0;
delete from narrow where id % 5 = 0;
create table passing (a int primary key, b text);
alter table passing alter a type bigint;
drop table passing;
"""
"""What is no pgbench: run after each of its runs, a statement a transaction."""

_SETTINGS = {"fsync": "off", "wal_keep_size": "64GB", "max_wal_size": "8GB", "checkpoint_timeout": "15min"}


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    end_cleanly()
    programs = system_programs(given.postgres)
    account = privileges.server_account()
    with work_folder(account) as work:
        repository = _archive(programs, work, given)
        text, missed = _measure(repository, given.runs)
    title = f"# History\n\nPostgreSQL {programs.major}.{programs.minor}; {describe()}. Load before: {load():.1f}.\n\n"
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "history.md").write_text(title + text)
    print(title + text)
    say(f"written to {OUT / 'history.md'}; " + (", ".join(missed) if missed else "every bar reached"))
    return 1 if missed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/history_speed.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2000, help="of WAL to write")
    parser.add_argument("--scale", type=int, default=20, help="pgbench's; 15 MB each")
    parser.add_argument("--segment-megabytes", type=int, default=16, help="small ones make many of them")
    parser.add_argument("--runs", type=int, default=3, help="repetitions; the best is told beside the median")
    parser.add_argument("--postgres", type=int, help="the distribution's major version")
    return parser.parse_args(arguments)


def _archive(programs: Programs, work: Path, given: argparse.Namespace) -> Repository:
    """The archive of a server that wrote so much WAL."""
    account = privileges.server_account()
    data = work / "data"
    init_cluster(programs, data, account=account, segment_megabytes=given.segment_megabytes)
    server = LocalServer(programs, data, account=account, settings=_SETTINGS)
    server.start()
    try:
        _pgbench(programs, server, "-i", "-q", "-s", str(given.scale))
        with connect(server.dsn()) as connection:
            facts = server_facts(connection)
            while True:
                _pgbench(programs, server, "-n", "-c", "8", "-t", "5000")
                for statement in _OTHERS.format(file=work / "narrow").split(";\n"):
                    connection.execute(statement.encode())
                row = connection.execute("select pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
                assert row is not None
                say(f"{int(row[0]) >> 20} MB of WAL")
                if row[0] > given.megabytes << 20:
                    break
            connection.execute("select pg_switch_wal()")
    finally:
        server.stop("fast")
    repository = Repository.create(
        LocalStorage(work / "repository"), cluster="bench", system_identifier=facts.system_identifier,
        segment_bytes=facts.segment_bytes,
    )  # fmt: skip
    archive = WalArchive(repository)
    for path in sorted((data / "pg_wal").iterdir())[:-1]:
        if len(path.name) == 24:
            archive.put_segment(WalSegment.parse(path.name, facts.segment_bytes), path)
    shutil.rmtree(data)
    return repository


def _pgbench(programs: Programs, server: LocalServer, *words: str) -> None:
    program = programs.folder / "pgbench"
    if not program.exists():
        program = Path(shutil.which("pgbench") or "pgbench")
    subprocess.run([str(program), *words, server.dsn()], check=True, capture_output=True)


def _measure(repository: Repository, runs: int) -> tuple[str, list[str]]:
    builds: list[tuple[float, float]] = []
    for _ in range(runs):
        store.delete(repository)
        used, began = _processor(), time.perf_counter()
        index = ArchiveIndex.open(repository, workers=2)
        builds.append((time.perf_counter() - began, _processor() - used))
    size = sum(head.segment.bytes for head in index.heads) / 1e6
    stored = sum(info.bytes for info in repository.storage.list(store.ROOT)) / 1e6
    rates = sorted(size / wall for wall, _ in builds)
    per_core = sorted(size / processor for _, processor in builds)
    commits = sum(head.commits for head in index.heads)
    records = sum(head.records for head in index.heads)
    lines = [
        f"{size:.0f} MB of WAL, {records:,} records, {commits:,} transactions; the index takes {stored:.0f} MB.",
        "",
        _speed(rates, per_core),
        "",
    ]
    rows, slow = _questions(repository)
    rows += _commands(repository)
    missed = [f"indexing {rates[-1]:.0f} MB/s"] if rates[-1] < BAR_MEGABYTES else []
    text = (
        "\n".join(lines) + "\n" + markdown(["question", "seconds", "processor seconds", "found"], rows) + "\n"
    )
    return text, missed + slow


def _speed(rates: Sequence[float], per_core: Sequence[float]) -> str:
    return (
        f"Indexed by two processes at {rates[-1]:.0f} MB/s at best, {rates[len(rates) // 2]:.0f} in the median of"
        f" {len(rates)} (bar: {BAR_MEGABYTES:.0f}); {per_core[len(per_core) // 2]:.0f} MB per second of processor"
        " time."
    )


def _questions(repository: Repository) -> tuple[list[list[str]], list[str]]:
    opened = ArchiveIndex.open(repository)
    middle = opened.heads[len(opened.heads) // 2]
    one = next(opened.transactions(since=middle.segment.start))
    busiest = {file[1:] for file in middle.changed}
    questions: dict[str, Callable[[ArchiveIndex], object]] = {
        "the newest 50": lambda index: index.newest(50),
        "the newest 50 of some tables": lambda index: index.newest(50, Asked(filenodes=busiest)),
        "the largest 50": lambda index: index.largest(50),
        "50 before a time": lambda index: index.newest(50, Asked(before=one.commit_time)),
        "50 from an LSN": lambda index: index.newest(50, Asked(until=one.commit_lsn)),
        "one by its number": lambda index: [index.transaction(one.xid)],
    }
    rows: list[list[str]] = []
    slow: list[str] = []
    for name, question in questions.items():
        used, began = _processor(), time.perf_counter()
        found = question(ArchiveIndex.open(repository))
        wall = time.perf_counter() - began
        assert isinstance(found, list)
        rows.append(
            [f"{name} (index opened anew)", f"{wall:.2f}", f"{_processor() - used:.2f}", str(len(found))]
        )
        if wall > BAR_SECONDS:
            slow.append(f"{name} {wall:.2f} s")
    return rows, slow


def _commands(repository: Repository) -> list[list[str]]:
    """`knockwood log` as it is typed, its start included; the server is down, and the archive answers."""
    root = Path(repository.storage.url)
    config = root.parent / "knockwood.toml"
    config.write_text(f'[cluster.bench]\ndsn = "host={root.parent} dbname=postgres"\nrepository = "{root}"\n')
    index = ArchiveIndex.open(repository)
    one = next(index.transactions(since=index.heads[len(index.heads) // 2].segment.start))
    rows: list[list[str]] = []
    for words in ((), ("--largest",), ("--xid", str(one.xid)), ("--to", str(one.commit_lsn))):
        used, began = _processor(), time.perf_counter()
        said = ask([Path(sys.executable).parent / "knockwood", "--config", config, "--json", "log", *words])
        wall = time.perf_counter() - began
        if said.status not in (0, 2):
            raise RuntimeError(said.err)
        found = str(len(json.loads(said.out)["transactions"]))
        name = " ".join(("knockwood log", *(word for word in words if word.startswith("-"))))
        rows.append([f"`{name}` (the whole command)", f"{wall:.2f}", f"{_processor() - used:.2f}", found])
    return rows


def _processor() -> float:
    """Seconds of processor time of this process and its children that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    sys.exit(main())
