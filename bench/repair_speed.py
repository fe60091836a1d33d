#!/usr/bin/env python3
"""Repairs beside whole restores of the same database, writers going on: `make bench-repair`.

For each size: the whole database restored by Knockwood, pgBackRest and (once) Barman until it is open for
writes; then damaged pages mended, a transaction taken back and one table of 100 MB brought back, cold (from a clone
made for it) and warm (with the shadow at hand). Ends with 0 if every bar was reached, with 1 if one was missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from knockwood import __version__
from knockwood.host import privileges
from machine import describe, load
from repair_inside import Repairs, Taken
from sandbox import OUT, end_cleanly, say, system_programs, work_folder
from speed_site import Options, site
from tables import markdown

SCALES = {"0.5": 34, "2": 137, "8": 547, "24": 1640}
"""pgbench's scale by the GB that it makes."""

# Pages that are not in memory can be damaged on disk without a trace in memory.
_SETTINGS = {"shared_buffers": "64MB", "wal_level": "replica"}
_TIMES = {"cold": 5.0, "warm": 50.0}
_BLOCKED = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    end_cleanly()
    programs = system_programs(given.postgres)
    begun = load()
    sections: list[str] = []
    missed: list[str] = []
    for size in given.sizes:
        options = Options(scale=SCALES[size], runs=given.runs, clients=4, text=given.text)
        with (
            work_folder(privileges.server_account()) as work,
            site(programs, work, options, peers=True, settings=_SETTINGS) as place,
        ):
            bench = Repairs(place, given.pages, given.rows)
            bench.prepare(barman=size == given.barman)
            text, short = _section(bench, size, given.warm)
        sections.append(text)
        missed += short
        _write(f"PostgreSQL {programs.major}.{programs.minor}", given, begun, sections)
    print((OUT / "repairs.md").read_text())
    for bar in missed:
        say(f"bar missed: {bar}")
    return 1 if missed else 0


def _section(bench: Repairs, size: str, warm: bool) -> tuple[str, list[str]]:
    restores = bench.restores()
    peer = min(one.seconds for one in restores)
    takes = bench.repairs("cold")
    if warm:
        with bench.shadow():
            takes += bench.repairs("warm")
    rows = [(one.what, one.how, f"{one.seconds:.2f}", "all of it", "–", one.detail) for one in restores]
    rows += [
        (
            one.what,
            one.how,
            f"{one.seconds:.2f}",
            f"{one.blocked:.2f}",
            f"{peer / one.seconds:.1f}",
            one.detail,
        )
        for one in takes
    ]
    header = ("what", "how", "seconds", "writers blocked s", "times as fast as the fastest restore", "")
    title = f"### {bench.site.bytes / 1e9:.2f} GB, {bench.wal_megabytes():.0f} MB of WAL in the repository"
    return "\n\n".join([title, markdown(header, rows)]), _missed(takes, peer, size)


def _missed(takes: Sequence[Taken], peer: float, size: str) -> list[str]:
    """The bars are for 8 GB; blocked writers count at every size."""
    short = [
        f"{size} GB: {one.what}, {one.how}: {peer / one.seconds:.1f} times as fast, not {_TIMES[one.how]:.0f}"
        for one in takes
        if size == "8" and peer / one.seconds < _TIMES[one.how]
    ]
    return short + [
        f"{size} GB: {one.what}, {one.how}: writers blocked {one.blocked:.2f} s"
        for one in takes
        if one.blocked >= _BLOCKED
    ]


def _write(server: str, given: argparse.Namespace, begun: float, sections: Sequence[str]) -> None:
    head = (
        f"Knockwood {__version__}, {server}; {describe()}. Load before: {begun:.1f}."
        f" Medians of {given.runs}; {given.pages} pages, {given.rows} rows."
        + (" Rows with text in them." if given.text else "")
    )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "repairs.md").write_text("\n\n".join(["# Repairs", head, *sections]) + "\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/repair_speed.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["0.5", "2", "8"], choices=list(SCALES), help="in GB")
    parser.add_argument("--runs", type=int, default=3, help="repetitions; medians are told")
    parser.add_argument("--pages", type=int, default=100, help="damaged pages")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of the transaction")
    parser.add_argument("--barman", default="2", help="the size at which Barman restores too, or none")
    parser.add_argument("--no-warm", dest="warm", action="store_false", help="leave the shadow out")
    parser.add_argument(
        "--text", action="store_true", help="rows with text that compresses by half, not pgbench's blanks"
    )
    parser.add_argument("--postgres", type=int, help="the distribution's major version")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
