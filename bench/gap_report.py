"""The gap test's tables and its full protocol, from results; pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from gap_scenario import COMMITS, Damage, Result, differences
from sandbox import Restored, Said
from tables import clipped, markdown

CELL = 110
_TELLING = re.compile(
    r"error|warn|missing: [1-9]|invalid: [1-9]|other: [1-9]|fail|mismatch|unknown", flags=re.IGNORECASE
)
_PRINTED = re.compile(r"^status: error", flags=re.IGNORECASE)
_PATH = re.compile(r"/\S*/(?=[\w.-]+)")


def verify_cell(result: Result) -> str:
    """Exit statuses, and the first line that tells something."""
    if not result.applicable:
        return f"– ({result.how})"
    statuses = "/".join(_status(said) for said in result.verify)
    return f"exit {statuses}: {clipped(_telling(result.verify), CELL)}"


def restore_cell(result: Result, wanted: Mapping[str, str]) -> str:
    """The exit status, whether a server starts on what is left, and what it holds."""
    if not result.applicable or result.restore is None or result.restored is None:
        return "–"
    restored = result.restored
    if not restored.started:
        reason = restored.note if restored.note != "nothing restored" else _telling((result.restore,))
        return (
            f"exit {_status(result.restore)}, {'no start' if result.restore.ok else 'refused'}: "
            + clipped(reason, CELL)
        )
    words = [f"exit {_status(result.restore)}", "starts", f"{restored.rows} of {COMMITS}"]
    if restored.note:
        words.append(restored.note)
    if wrong := differences(restored.tables, wanted):
        words.append(clipped(wrong, CELL))
    return ", ".join(words)


def outcome(result: Result, wanted: Mapping[str, str]) -> str:
    """What the damage came to, in a few words.

    SILENT: no exit status told of it, and a server runs on the restored cluster with data missing or
    damaged.
    """
    restored, restore = result.restored, result.restore
    if restored is None or restore is None:
        return "–"
    told = any(not said.ok for said in result.verify)
    lost = _lost(restored, wanted)
    if result.damage.survivors == COMMITS:
        return "clean" if restore.ok and not told and not lost else f"FALSE ALARM {lost}".strip()
    found = [_finder(result)] if told else []
    found += ["verify (printed, with exit 0)"] if not told and _printed(result.verify) else []
    found += ["restore"] if not restore.ok else []
    found += ["the server, which does not start"] if restore.ok and not restored.started else []
    words = f"found by {' and '.join(found)}" if found else ""
    if restored.started and lost:
        gist = f"SILENT: {lost}" if restore.ok and not told else f"starts all the same: {lost}"
        return f"{words}; {gist}" if words else gist
    return words or "not found; nothing was missing this time"


def _finder(result: Result) -> str:
    # Where the whole repository was verified as well, the first answer was the usual verify's.
    trusting = result.damage.proved_before and len(result.verify) > 1 and result.verify[0].ok
    return "verify --full (not by a plain one before its rotation comes to it)" if trusting else "verify"


def _lost(restored: Restored, wanted: Mapping[str, str]) -> str:
    if not restored.started:
        return ""
    rows = f"{restored.rows} of {COMMITS} commits" if restored.rows != COMMITS else ""
    wrong = "tables not whole" if differences(restored.tables, wanted) else ""
    return ", ".join(part for part in (rows, wrong) if part)


def _printed(answers: Sequence[Said]) -> bool:
    return any(_PRINTED.search(line) for said in answers for line in said.lines(60))


def _status(said: Said) -> str:
    return "timeout" if said.status is None else str(said.status)


def _telling(answers: Sequence[Said]) -> str:
    for said in sorted(answers, key=lambda said: said.ok):
        if knockwood := _knockwood(said):
            return knockwood
    lines = [line.strip() for said in answers for line in said.lines(60)]
    telling = [line for line in lines if _TELLING.search(line) and ": OK" not in line]
    chosen = "; ".join(telling[:3]) or " ".join(lines[:2])
    return _PATH.sub("", chosen) or "(prints nothing)"


def _knockwood(said: Said) -> str:
    """The gist of one of Knockwood's JSON answers; nothing for anything else."""
    try:
        answer = json.loads(said.out)
    except ValueError:
        return ""
    if not isinstance(answer, dict) or not str(answer.get("schema", "")).startswith("knockwood/"):
        return ""
    if error := answer.get("error"):
        return f"{error.get('code')} {error.get('what')}"
    if "windows" not in answer:
        return str(answer.get("verdict", "done"))
    windows = [f"{w['from']['lsn']}..{w['to']['lsn']}" for w in answer["windows"]]
    parts = [f"{answer.get('verdict')}, window {' and '.join(windows) or 'none'}"]
    parts += [
        f"gap {g['from']['lsn']}..{g['to']['lsn']} {g.get('segment') or ''}" for g in answer.get("gaps", [])
    ]
    parts += [f"damaged {str(d.get('object', '')).rsplit('/', 1)[-1]}" for d in answer.get("damaged", [])]
    return ", ".join(parts)


def report(
    title: str,
    damages: Sequence[Damage],
    results: Mapping[str, Sequence[Result]],
    missing: Mapping[str, str],
    wanted: Mapping[str, str],
) -> str:
    """Three tables: what came of it, what verify says, what a restore gives."""
    tools = [*results, *missing]
    parts = [title]
    cells: dict[str, Callable[[Result], str]] = {
        "What came of it": lambda result: outcome(result, wanted),
        "What verify says": verify_cell,
        "What a restore to the latest point gives": lambda result: restore_cell(result, wanted),
    }
    for heading, cell in cells.items():
        rows = []
        for damage in damages:
            row = [f"{damage.key}: {damage.title}"]
            for tool in tools:
                found = [r for r in results.get(tool, ()) if r.damage.key == damage.key]
                row.append(cell(found[0]) if found else f"not run: {missing.get(tool, 'left out')}")
            rows.append(row)
        parts.append(f"## {heading}\n\n{markdown(['damage', *tools], rows)}")
    return "\n\n".join(parts) + "\n"


def protocol(results: Mapping[str, Sequence[Result]]) -> str:
    """Every command with its exit status and first lines, for whoever doubts a cell."""
    parts = []
    for tool, done in results.items():
        for result in done:
            parts.append(f"=== {tool}, {result.damage.key}: {result.damage.title} ({result.how})")
            for said in [*result.verify, *([result.restore] if result.restore else [])]:
                parts.append(f"$ {said.command}\n  exit {_status(said)}, {said.seconds:.2f} s")
                parts += [f"  {line}" for line in said.lines(40)]
            if result.restored:
                parts.append(f"  -> {result.restored}, with accepted loss {result.loss_rows}")
    return "\n".join(parts) + "\n"
