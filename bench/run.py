#!/usr/bin/env python3
"""Speed, as ratios measured in one run: `make bench`, or some sections of it.

Ends with 0 if every bar was reached, with 1 if one was missed (the report says which).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import speed_inside
import speed_sections
from knockwood import __version__
from knockwood.host import privileges
from knockwood.postgres.binaries import Programs
from machine import describe, load
from sandbox import OUT, end_cleanly, say, system_programs, work_folder
from speed_sections import Section
from speed_site import Options, Site, site

SECTIONS: dict[str, Callable[[Site], Section]] = {
    "backup": speed_sections.backup,
    "restore": speed_sections.restore,
    "pages": speed_inside.pages,
    "fingerprint": speed_inside.fingerprint,
    "load": speed_sections.load,
    "verify": speed_sections.verify,
}
SMALL = ("verify",)
"""Sections with a cluster of their own, whose database is small beside its WAL."""
SMALL_SCALE = 10


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    end_cleanly()
    options = Options(given.scale, given.runs, given.seconds, given.clients, given.wal_segments)
    programs = system_programs(given.postgres)
    begun = load()
    done: list[Section] = []
    large = [name for name in SECTIONS if name in given.sections and name not in SMALL]
    small = [name for name in SECTIONS if name in given.sections and name in SMALL]
    title = ""
    if large:
        head, sections = measure(programs, options, large, peers=not given.no_peers)
        title, done = head, sections
    if small:
        own = replace(options, scale=min(SMALL_SCALE, options.scale))
        head, sections = measure(programs, own, small, peers=False)
        title, done = title or head, [*done, *sections]
    text = (
        "\n\n".join([f"# Speed\n\n{title} Load before: {begun:.1f}.", *(one.text() for one in done)]) + "\n"
    )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "speed.md").write_text(text)
    print(text)
    missed = [bar for section in done for bar in section.missed]
    say(
        f"written to {OUT / 'speed.md'}; " + (f"{len(missed)} bars missed" if missed else "every bar reached")
    )
    return 1 if missed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=str(__doc__).splitlines()[0])
    usual = Options()
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--scale", type=int, default=usual.scale, help="pgbench's; 150 makes 2.3 GB")
    parser.add_argument("--runs", type=int, default=usual.runs, help="repetitions; medians are told")
    parser.add_argument("--seconds", type=int, default=usual.seconds, help="of one pgbench run")
    parser.add_argument("--clients", type=int, default=usual.clients, help="of pgbench")
    parser.add_argument("--wal-segments", type=int, default=usual.wal_segments, help="to verify, 16 MiB each")
    parser.add_argument("--postgres", type=int, help="the distribution's major version")
    parser.add_argument("--no-peers", action="store_true", help="leave pgBackRest out")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no such section: {', '.join(unknown)} (there are {', '.join(SECTIONS)})")
    given.sections = given.sections or list(SECTIONS)
    return given


def measure(
    programs: Programs, options: Options, names: Sequence[str], *, peers: bool
) -> tuple[str, list[Section]]:
    """Run sections on one cluster; returns a line about what it was, and their tables."""
    with (
        work_folder(privileges.server_account()) as work,
        site(programs, work, options, peers=peers) as place,
    ):
        size = place.bytes / 1e9
        peer = (
            f"pgBackRest {place.pgbackrest.version()}" if place.pgbackrest else f"no peer ({place.missing})"
        )
        title = (
            f"Knockwood {__version__}, PostgreSQL {programs.major}.{programs.minor}, {peer}; {describe()}. "
            f"pgbench scale {options.scale}, {size:.2f} GB; medians of {options.runs}."
        )
        sections = []
        for name in names:
            say(name)
            sections.append(SECTIONS[name](place))
    return title, sections


if __name__ == "__main__":
    sys.exit(main())
