#!/usr/bin/env python3
"""Every drill with many seeds, judged by its witness: `make bench-drills`.

Each drill runs as a process of its own, as users run it (`knockwood drill run NAME --seed N --json`). Results are
kept in bench/out/drills.json, so that a long run can be done in pieces. Ends with 0 if every drill held, with 1 if
one did not, with 2 if one came to no end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from knockwood import __version__
from knockwood.drill.sandbox import choose_programs
from machine import describe, load
from sandbox import OUT, ask, end_cleanly, knockwood_command, say
from tables import markdown

NAMES = ("corrupt-table", "rogue-script", "bad-release", "faulty-disk")
_HEADER = (
    "drill",
    "runs",
    "held",
    "promised commits",
    "lost",
    "detect s",
    "diagnose s",
    "mended s",
    "proved s",
    "writers blocked s",
    "failed requests",
    "longest stall s",
)


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    end_cleanly()
    store = OUT / "drills.json"
    OUT.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = json.loads(store.read_text()) if store.exists() and not given.anew else {}
    begun = load()
    for seed in range(1, given.seeds + 1):
        for name in given.names:
            key = f"{__version__} {name} {seed} {given.clients} {given.orders}"
            if key not in kept:
                kept[key] = _run(name, seed, given)
                store.write_text(json.dumps(kept, indent=1))
    cards = {
        name: [
            kept[key]
            for seed in range(1, given.seeds + 1)
            if (key := f"{__version__} {name} {seed} {given.clients} {given.orders}") in kept
        ]
        for name in given.names
    }
    programs = choose_programs()
    text = (
        f"Knockwood {__version__}, PostgreSQL {programs.major}.{programs.minor}; {describe()}. Load before:"
        f" {begun:.1f}. {given.clients} clients, {given.orders:,} orders. Medians, and the most in brackets.\n\n"
        + markdown(_HEADER, [_row(name, each) for name, each in cards.items() if each])
        + "\n"
    )
    (OUT / "drills.md").write_text(text)
    print(text)
    verdicts = [card["verdict"] for each in cards.values() for card in each]
    return 2 if "not_checked" in verdicts else 1 if "broken" in verdicts else 0


def _run(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    words = ["drill", "run", name, "--seed", str(seed), "--clients", str(given.clients)]
    said = ask([*knockwood_command(), *words, "--orders", str(given.orders), "--json"], timeout=900)
    try:
        [card] = json.loads(said.out)["scorecards"]
    except (ValueError, KeyError):
        card = {"scenario": name, "seed": seed, "verdict": "not_checked", "said": said.lines(20)}
    failed = [gate["name"] for gate in card.get("gates", []) if not gate["passed"]]
    if failed:
        card["said"] = said.err.splitlines()
    say(f"{name}, seed {seed}: {card['verdict']}{': ' + ', '.join(failed) if failed else ''}")
    return dict(card)


def _row(name: str, cards: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    ended = [card for card in cards if "seconds" in card]

    def told(values: Sequence[float | None], digits: int = 1) -> str:
        known = [value for value in values if value is not None]
        return f"{statistics.median(known):.{digits}f} ({max(known):.{digits}f})" if known else "–"

    return (
        name,
        str(len(cards)),
        str(sum(card["verdict"] == "held" for card in cards)),
        f"{sum(card['acknowledged_commits'] for card in ended):,}",
        str(sum(card["good_transactions_lost"] for card in ended)),
        *(
            told([card["seconds"][part] for card in ended])
            for part in ("detect", "diagnose", "restore", "verify")
        ),
        told([card["writers_blocked_seconds"] for card in ended], 2),
        told([card["failed_requests"] for card in ended], 0),
        told([card["longest_stall_seconds"] for card in ended], 2),
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/drills.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="DRILL")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--orders", type=int, default=20_000)
    parser.add_argument("--anew", action="store_true", help="forget earlier results")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"no such drill: {', '.join(unknown)} (there are {', '.join(NAMES)})")
    return given


if __name__ == "__main__":
    sys.exit(main())
