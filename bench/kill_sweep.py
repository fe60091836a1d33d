#!/usr/bin/env python3
"""kill -9 at every step of receive, backup, prove, restore, expire and verify: `make bench-kills`.

A real server under load with its witness; the product's own commands as child processes, killed at chosen
steps and random moments, and the server killed beneath them. Ends with 0 if everything held, with 1 if
anything did not (each violation is printed with its operation, step and seed), with 2 if it was interrupted.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from kill_operations import all_operations
from kill_run import Killing, Result, read, save
from kill_site import must_backup, site
from knockwood import __version__
from knockwood.drill.sandbox import choose_programs
from knockwood.host import processes
from machine import describe, load
from sandbox import OUT, say
from tables import markdown

# Kills of the command itself, and of the server beneath it.
PLAN: dict[str, tuple[int, int]] = {
    "wal receive": (38, 4),
    "backup": (32, 4),
    "incremental": (28, 3),
    "prove": (24, 3),
    "restore": (22, 2),
    "expire": (30, 0),
    "verify": (20, 0),
}
# Side by side, about equally long.
LANES = (("wal receive", "expire"), ("restore",), ("backup", "incremental"), ("prove", "verify"))


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    given = _parse(arguments)
    if given.result:
        sweep(given, given.operations)
        return 0
    begun, load_before = time.monotonic(), load()
    results = lanes(given) if given.lanes > 1 else sweep(given, given.operations)
    unfinished = [name for name in given.operations if name not in {result.operation for result in results}]
    text = report(results, given, time.monotonic() - begun, load_before)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text)
    print(text)
    found = [violation for result in results for violation in result.violations]
    for violation in found:
        print(f"violation: {violation}")
    say(f"written to {given.out}; {len(found)} violations")
    if unfinished:
        say(f"not checked, because it was not finished: {', '.join(unfinished)}")
    return 1 if found else 2 if unfinished else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/kill_sweep.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"some of {', '.join(PLAN)}")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--orders", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--restore-every", type=int, default=15, help="full restores after so many kills")
    parser.add_argument(
        "--lanes", type=int, choices=(1, len(LANES)), default=len(LANES), help="sandboxes side by side"
    )
    parser.add_argument("--out", type=Path, default=OUT / "kills.md", help="where the table goes")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    unknown = [name for name in given.operations if name not in PLAN]
    if unknown:
        parser.error(f"no such operation: {', '.join(unknown)} (there are {', '.join(PLAN)})")
    given.operations = given.operations or list(PLAN)
    return given


def sweep(given: argparse.Namespace, names: Sequence[str]) -> list[Result]:
    """The operations named, one after the other, in one sandbox."""
    operations = all_operations()
    results = []
    with site(orders=given.orders, clients=given.clients, seed=given.seed) as place:
        must_backup(place)
        for number, name in enumerate(names):
            ours, servers = (scaled(count, given.scale) for count in PLAN[name])
            killing = Killing(place, operations[name], given.seed * 100 + number, given.restore_every)
            results.append(killing.sweep(ours, servers))
            if given.result:
                save(results, given.result)
    return results


def scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale)) if count else 0


def lanes(given: argparse.Namespace) -> list[Result]:
    """The lanes side by side, each a process of its own that dies with this one."""
    with tempfile.TemporaryDirectory(prefix="kwkills-") as folder:
        running: list[tuple[subprocess.Popen[bytes], Path]] = []
        for number, lane in enumerate(LANES):
            names = [name for name in lane if name in given.operations]
            if names:
                path = Path(folder) / f"{number}.json"
                running.append((_start_lane(given, names, path, number), path))
        try:
            for child, _ in running:
                child.wait()
        except KeyboardInterrupt:
            say("interrupted: what is finished is told")
        finally:
            for child, _ in running:
                processes.stop(child, grace=60)
        found = {result.operation: result for _, path in running if path.exists() for result in read(path)}
    return [found[name] for name in PLAN if name in found]


def _start_lane(
    given: argparse.Namespace, names: Sequence[str], path: Path, number: int
) -> subprocess.Popen[bytes]:
    options = {
        "--result": path,
        "--seed": given.seed + number,
        "--scale": given.scale,
        "--orders": given.orders,
        "--clients": given.clients,
        "--restore-every": given.restore_every,
    }
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, str(Path(__file__).resolve()), *names, *words]
    return processes.start(command, stdout=None, stderr=None)


def report(results: Sequence[Result], given: argparse.Namespace, seconds: float, before: float) -> str:
    """The table, and what the restores said."""
    rows = [
        [
            result.operation,
            str(result.steps),
            f"{len(set(result.hit))} of {result.places}",
            str(result.ours),
            str(result.at_random),
            str(result.server),
            f"{result.said_why} / {result.succeeded}"
            if result.server and result.operation != "wal receive"
            else "",
            str(result.again),
            str(result.missed),
            str(len(result.violations)),
        ]
        for result in results
    ]
    kills = sum(result.kills for result in results)
    header = (
        "operation",
        "steps in a run",
        "places hit",
        "kills of the command",
        "of these at random moments",
        "kills of the server",
        "it then ended with an error / with success",
        "runs to the end over what kills left",
        "aims that never came",
        "violations",
    )
    restores = [entry for result in results for entry in result.restores]
    return (
        f"Knockwood {__version__}, PostgreSQL {choose_programs().major}; {describe()}; load before {before:.1f}; "
        f"{given.orders} orders, {given.clients} clients, seed {given.seed}.\n\n"
        f"{kills} kills in {seconds / 60:.0f} minutes, "
        f"{sum(len(result.violations) for result in results)} violations.\n\n"
        f"{markdown(header, rows)}\n\n{_restores(restores)}\n"
    )


def _restores(restores: Sequence[dict[str, object]]) -> str:
    rows = []
    for lost, name in ((False, "server alive"), (True, "machine lost: repository only")):
        chosen = [entry for entry in restores if entry["lost_machine"] is lost]
        ages = sorted(float(str(entry["oldest_missing"])) for entry in chosen)
        missing = sum(int(str(entry["missing"])) for entry in chosen)
        promised = sum(int(str(entry["promised"])) for entry in chosen)
        oldest = f"{ages[-1]:.2f} s" if ages and ages[-1] else "none"
        median = f"{ages[len(ages) // 2]:.2f} s" if ages and lost else ""
        rows.append([name, str(len(chosen)), str(promised), str(missing), oldest, median])
    header = (
        "full restores to latest",
        "restores",
        "promised commits looked for",
        "missing",
        "oldest missing before the loss",
        "median of the restores",
    )
    return markdown(header, rows)


if __name__ == "__main__":
    sys.exit(main())
