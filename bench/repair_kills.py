#!/usr/bin/env python3
"""kill -9 at every step of every repair: `make bench-repair-kills`.

A real server under load with its witness; repairs as their users' own commands in child processes, killed at
chosen steps and random moments, and the server killed beneath them; then resumed or rolled back, and compared
with the truth. What came of it is kept in bench/out/repair-kills, so that several runs add up. Ends with 0 if
everything held, with 1 if anything did not (each violation is printed with its operation, step and seed), with
2 if it was interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from kill_run import Killing, Result, read, save
from kill_site import site
from knockwood import __version__
from knockwood.drill.sandbox import choose_programs
from machine import describe
from repair_kill_base import Repair
from repair_kill_in_place import InPlace
from repair_kill_operations import Pages, Revert, Table, readers
from sandbox import OUT, say
from tables import markdown

# Kills of the command itself, and of the server beneath it (which a restore of the cluster stops itself).
PLAN: dict[str, tuple[int, int]] = {
    "pages": (50, 5),
    "lost writes": (40, 5),
    "revert": (45, 5),
    "restore of a table": (40, 5),
    "cluster in place": (30, 0),
}
_RESTORES = sys.maxsize


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    given = _parse(arguments)
    given.pieces.mkdir(parents=True, exist_ok=True)
    interrupted = False
    try:
        for number, name in enumerate(given.operations):
            sweep(given, name, given.seed * 100 + number)
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted: what was killed until then counts")
    results = merged(given.pieces)
    text = report(results)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text)
    print(text)
    found = [violation for result in results for violation in result.violations]
    for violation in found:
        print(f"violation: {violation}")
    say(f"written to {given.out}; {len(found)} violations")
    return 1 if found else 2 if interrupted else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/repair_kills.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"some of {', '.join(PLAN)}")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of kills")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--orders", type=int, default=500)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--pieces", type=Path, default=OUT / "repair-kills", help="where results add up")
    parser.add_argument("--out", type=Path, default=OUT / "repair-kills.md", help="where the table goes")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.operations if name not in PLAN]
    if unknown:
        parser.error(f"no such operation: {', '.join(unknown)} (there are {', '.join(PLAN)})")
    given.operations = given.operations or list(PLAN)
    return given


def operation(name: str) -> Repair:
    """A new one: it remembers what it damaged."""
    made: tuple[Repair, ...] = (
        Pages("pages", ("page_checksums",), (("flip", "torn", "index"), ("flip", "flip"), ("torn", "index"))),
        Pages("lost writes", ("lost_writes",), (("zero",), ("stale",), ("zero", "stale"))),
        Revert(),
        Table(),
        InPlace(),
    )
    return next(each for each in made if each.name == name)


def sweep(given: argparse.Namespace, name: str, seed: int) -> None:
    """The kills of one operation in a sandbox of its own; its result is kept after each."""
    path = given.pieces / f"{name.replace(' ', '-')}-{seed}.json"
    ours, servers = (max(1, round(count * given.scale)) if count else 0 for count in PLAN[name])
    with site(orders=given.orders, clients=given.clients, seed=seed, reach=True) as place, readers(place):
        kill = Killing(place, operation(name), seed, _RESTORES, lambda result: save([result], path))
        result = kill.sweep(ours, servers)
        save([result], path)


def merged(folder: Path) -> list[Result]:
    """One result for each operation from all pieces."""
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        for piece in read(path):
            before = found.get(piece.operation)
            found[piece.operation] = _added(before, piece) if before else piece
    return [found[name] for name in PLAN if name in found]


def _added(one: Result, other: Result) -> Result:
    return replace(
        one,
        steps=max(one.steps, other.steps),
        known=sorted({*one.known, *other.known}),
        hit=one.hit + other.hit,
        ours=one.ours + other.ours,
        server=one.server + other.server,
        at_random=one.at_random + other.at_random,
        missed=one.missed + other.missed,
        again=one.again + other.again,
        said_why=one.said_why + other.said_why,
        succeeded=one.succeeded + other.succeeded,
        violations=one.violations + other.violations,
        ends=dict(Counter(one.ends) + Counter(other.ends)),
    )


def report(results: Sequence[Result]) -> str:
    """The table, and how the killed runs came to their ends."""
    header = (
        "repair",
        "steps in a run",
        "places hit",
        "kills of the command",
        "of these at random moments",
        "kills of the server",
        "it then ended with an error / with success",
        "aims that never came",
        "violations",
    )
    rows = [
        [
            result.operation,
            str(result.steps),
            f"{len(set(result.hit))} of {len(result.known)}",
            str(result.ours),
            str(result.at_random),
            str(result.server),
            f"{result.said_why} / {result.succeeded}" if result.server else "",
            str(result.missed),
            str(len(result.violations)),
        ]
        for result in results
    ]
    ways = sorted({way for result in results for way in result.ends})
    ends = [[way, *(str(result.ends.get(way, 0)) for result in results)] for way in ways]
    kills = sum(result.kills for result in results)
    violations = sum(len(result.violations) for result in results)
    return (
        f"Knockwood {__version__}, PostgreSQL {choose_programs().major}; {describe()}.\n\n"
        f"{kills} kills, {violations} violations.\n\n{markdown(header, rows)}\n\n"
        f"{markdown(('after a kill', *(result.operation for result in results)), ends)}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
