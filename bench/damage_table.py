"""The damage table: every kind of damage done to a real cluster, and what found it.

`python bench/damage_table.py [--rows KEY...] [--rounds N] [--postgres MAJOR]`. Exit status 0: at least 17 of the
19 rows were found in each database, the two about the repository too, and nothing else was; 1: not so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from damage_cases import Case, play
from damage_healthy import Health, watch_healthy
from damage_report import report, shortfalls
from damage_rows import ROWS
from damage_site import Site, healthy_site
from damage_wal import REPOSITORY_ROWS, play_repository
from knockwood import __version__
from knockwood.drill.sandbox import choose_programs
from knockwood.host import files, privileges
from knockwood.postgres.binaries import Programs
from machine import describe
from sandbox import OUT, end_cleanly, say, work_folder

KEYS = (*(row.key for row in ROWS), *REPOSITORY_ROWS)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", nargs="*", metavar="KEY", help="only these rows; the others' results are kept from before"
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help="of every check on a healthy cluster; 0 keeps what there is"
    )
    parser.add_argument("--seconds", type=float, default=0, help="rounds go on at least so long")
    parser.add_argument("--scale", type=int, default=1, help="10,000 orders and 100,000 accounts each")
    parser.add_argument("--postgres", type=int, help="a major version; by default the newest there is")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results")
    given = parser.parse_args(words)
    keys = chosen(given.rows)
    end_cleanly()
    programs = choose_programs(given.postgres)
    account = privileges.server_account()
    files.make_folder(given.out)
    results = Results(given.out / "damage-table.json", programs)
    if given.rows is None:
        results.value["cases"] = []
    with work_folder(account) as folder:
        folder.chmod(0o755)
        with healthy_site(folder, programs, account, given.scale) as healthy:
            for key in keys:
                results.add(tell(_play(healthy, key, folder)))
            if given.rounds:
                watch_healthy(healthy, folder, given.rounds, given.seconds, results.set_health)
    text = report(results.value)
    (given.out / "damage-table.md").write_text(text)
    print(text)
    wrong = shortfalls(results.value)
    for line in wrong:
        say(f"missed: {line}")
    return 1 if wrong else 0


def _play(healthy: Site, key: str, folder: Path) -> Case:
    say(f"damage: {key}")
    for row in ROWS:
        if row.key == key:
            return play(healthy, row, folder)
    return play_repository(healthy, key, folder)


def chosen(keys: Sequence[str] | None) -> list[str]:
    """The rows of these keys, in the catalogue's order, all without any; SystemExit for a key that is none."""
    wrong = sorted(set(keys or ()) - set(KEYS))
    if wrong:
        raise SystemExit(f"no row is called {', '.join(wrong)}; there are: {', '.join(KEYS)}")
    return [key for key in KEYS if keys is None or key in keys]


class Results:
    """What is known of each row with these versions, stored after every row."""

    def __init__(self, path: Path, programs: Programs) -> None:
        versions = f"Knockwood {__version__}, PostgreSQL {programs.major}.{programs.minor}"
        self.path = path
        self.value: dict[str, Any] = {"versions": versions, "cases": [], "healthy": None}
        if path.exists():
            before = json.loads(path.read_text())
            if before.get("versions") == versions:
                self.value = before
        self.value["machine"] = describe()

    def add(self, case: Case) -> None:
        known = {one["row"]: one for one in self.value["cases"]} | {case.key: case.as_json()}
        self.value["cases"] = [known[key] for key in KEYS if key in known]
        self.store()

    def set_health(self, health: Health) -> None:
        self.value["healthy"] = health.as_json()
        self.store()

    def store(self) -> None:
        self.path.write_text(json.dumps(self.value, indent=1, default=str) + "\n")


def tell(case: Case) -> Case:
    """Say how a case went while the others go on."""
    for outcome in case.judgement.outcomes:
        how = ", ".join(outcome.checks) if outcome.found else "NOT FOUND"
        say(f"  {outcome.damage.database} {outcome.damage.line}: {how}")
    for alarm in case.judgement.false_alarms:
        say(f"  false alarm: {alarm['check']}: {alarm['summary']} ({alarm['location']})")
    took = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in case.seconds.items())
    say(f"  {took}; {len(case.not_checked)} not checked")
    return case


if __name__ == "__main__":
    sys.exit(main())
