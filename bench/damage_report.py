"""The table as people read it, made of the stored results and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from damage_rows import ROWS
from damage_site import BENCH, SHOP
from damage_wal import CLUSTER
from tables import clipped, markdown


class Bar(NamedTuple):
    """At least so many of so many rows of the catalogue."""

    found: int
    rows: int


BAR = Bar(17, 19)

Json = Mapping[str, Any]

_TITLES = {SHOP: "shop, with invariants", BENCH: "pgbench, without", CLUSTER: "repository"}
_WHERES = ("server", "paused clone", "promoted clone")
_CATALOGUE = frozenset(row.key for row in ROWS)


def in_catalogue(case: Json) -> bool:
    """Whether a case is one of the rows that the bar counts; the others are about the repository."""
    return case["row"] in _CATALOGUE


def of_database(case: Json, database: str) -> list[Json]:
    """The case's damages in one database."""
    return [damage for damage in case["damages"] if damage["database"] == database]


def found_rows(cases: Sequence[Json], database: str) -> int:
    """The rows of which every damage in this database was found, each at its place."""
    parts = [of_database(case, database) for case in cases]
    return sum(bool(damages) and all(damage["found"] for damage in damages) for damages in parts)


def alarms(value: Json) -> int:
    """Findings that no damage explains, on damaged clusters and on healthy ones."""
    healthy = len(value["healthy"]["alarms"]) if value["healthy"] else 0
    return sum(len(case["false_alarms"]) for case in value["cases"]) + healthy


def shortfalls(value: Json) -> list[str]:
    """What keeps the results from passing, in words; none if they pass."""
    cases = [case for case in value["cases"] if in_catalogue(case)]
    others = [case for case in value["cases"] if not in_catalogue(case)]
    missed = {database: len(cases) - found_rows(cases, database) for database in (SHOP, BENCH)}
    words = [
        f"{_TITLES[database]}: {count} rows not found"
        for database, count in missed.items()
        if count > BAR.rows - BAR.found
    ]
    if found_rows(others, CLUSTER) < len(others):
        words.append("damage to the repository was not found")
    if false := alarms(value):
        words.append(f"{false} false alarms")
    return words


def report(value: Json) -> str:
    """All of it as Markdown."""
    parts = [f"{value['versions']}; {value['machine']}.", _summary(value)]
    if value["cases"]:
        parts += ["## Damaged clusters", _damages(value["cases"]), _notes(value["cases"])]
    if value["healthy"]:
        health = value["healthy"]
        parts += ["## Healthy clusters", _healthy_words(health), _runs(health), *_silences(health)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(value: Json) -> str:
    rows = [case for case in value["cases"] if in_catalogue(case)]
    others = [case for case in value["cases"] if not in_catalogue(case)]
    words = [
        f"{_TITLES[database]}: {found_rows(rows, database)} of {len(rows)} rows found, each at its place"
        for database in (SHOP, BENCH)
        if rows
    ]
    if others:
        words.append(f"{_TITLES[CLUSTER]}: {found_rows(others, CLUSTER)} of {len(others)} rows found")
    words.append(f"false alarms: {alarms(value)}")
    return "\n".join(f"- {line}" for line in words)


def _damages(cases: Sequence[Json]) -> str:
    rows = []
    for number, case in enumerate(cases, 1):
        took = ", ".join(f"{step} {seconds}" for step, seconds in case["seconds"].items())
        # A damage of the repository has no database of its own.
        columns = (SHOP, BENCH) if in_catalogue(case) else (CLUSTER, BENCH)
        rows.append([str(number), case["title"], *(_cell(case, database) for database in columns), took])
    header = ["", "damage", f"found in the {_TITLES[SHOP]}", f"found in {_TITLES[BENCH]}", "seconds"]
    return markdown(header, rows)


def _cell(case: Json, database: str) -> str:
    return "; ".join(_words(damage) for damage in of_database(case, database)) or "-"


def _words(damage: Json) -> str:
    line = f"{damage['line']}: " if damage["line"] else ""
    checks = ", ".join(f"`{check}`" for check in damage["checks"])
    return line + (checks if damage["found"] else "**not found**")


def _notes(cases: Sequence[Json]) -> str:
    lines = [
        f"- {case['title']}, {_TITLES[damage['database']]}: not found. {damage['note']}"
        for case in cases
        for damage in case["damages"]
        if not damage["found"]
    ]
    lines += [
        f"- False alarm, {case['title']}: `{found['check']}`: {clipped(str(found['summary']), 100)}"
        for case in cases
        for found in case["false_alarms"]
    ]
    return "\n".join(lines)


def _healthy_words(health: Json) -> str:
    return (
        f"{health['rounds']} rounds of every check in {health['seconds']:.0f} s, while {health['clients']} clients"
        f" ordered and paid in the shop, {health['clients']} more ran pgbench, and two did an administrator's work"
        f" ({health['upkeep']} statements: VACUUM, VACUUM FULL, REINDEX, CLUSTER, TRUNCATE, ALTER TABLE with a"
        " rewrite, CREATE and DROP of tables, indexes and databases):"
        f" {health['commits']:,} transactions in all. {health['compared_rows']:,} rows were compared with clones."
        f" **{len(health['alarms'])} false alarms.**"
    )


def _runs(health: Json) -> str:
    names = sorted({name for runs in health["runs"].values() for name in runs})
    counted = Counter(str(alarm["check"]) for alarm in health["alarms"])
    rows = [
        [f"`{name}`" if " " not in name else name]
        + [str(health["runs"].get(where, {}).get(name, "-")) for where in _WHERES]
        + [str(counted[name])]
        for name in names
    ]
    return markdown(["check", *(f"runs on the {where}" for where in _WHERES), "alarms"], rows)


def _silences(health: Json) -> list[str]:
    told = [f"- {text}" for text in health["about_the_server"]]
    gaps = [
        f"- {count} times {clipped(text, 150)}" for text, count in list(health["not_checked"].items())[:12]
    ]
    parts = []
    if told:
        parts.append("\n".join(["True of the bench's server, and said so:", "", *told]))
    if gaps:
        parts.append("\n".join(["Said to be not checked, and why (N stands for a number):", "", *gaps]))
    return parts
