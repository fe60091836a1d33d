"""What Knockwood must have found, exactly; pure. An empty list of faults means that it did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from knockwood.model import Lsn, Timeline, WalSegment

HELD, BROKEN, REFUSED = 0, 1, 4
WAL_CASES = ("a", "b", "c", "c2", "c3")
REFUSES = ("a", "b", "c", "c2", "d")


@dataclass(frozen=True, slots=True)
class Observed:
    """What Knockwood did with one damage. `loss_rows` is what a restore with --accept-loss gave."""

    key: str
    verify_exit: int | None
    verify_json: str
    restore_exit: int | None
    started: bool
    rows: int | None
    tables: str
    loss_rows: int | None


@dataclass(frozen=True, slots=True)
class Known:
    """What the scenario did: where each commit ended, which commit's segment is damaged, what tables hold."""

    ends: tuple[Lsn, ...]
    segments: tuple[int, ...]
    damaged: int
    segment_bytes: int
    tables: str

    @property
    def segment(self) -> WalSegment:
        return WalSegment(Timeline(1), self.segments[self.damaged - 1], self.segment_bytes)


def faults(seen: Observed, known: Known) -> list[str]:
    """Everything in which Knockwood fell short of its promise for this damage."""
    try:
        answer = json.loads(seen.verify_json)
    except ValueError:
        return [f"verify printed no JSON: {seen.verify_json[:200]!r}"]
    return [*_verdict(seen, answer), *_windows(seen, answer, known), *_restore(seen, known)]


def _verdict(seen: Observed, answer: dict[str, Any]) -> Iterator[str]:
    exit_status, verdict = (HELD, "held") if seen.key == "0" else (BROKEN, "broken")
    if seen.verify_exit != exit_status:
        yield f"verify ended with {seen.verify_exit}, not {exit_status}"
    if answer.get("verdict") != verdict:
        yield f"verify's verdict is {answer.get('verdict')!r}, not {verdict!r}"


def _windows(seen: Observed, answer: dict[str, Any], known: Known) -> Iterator[str]:
    windows = [(Lsn.parse(w["from"]["lsn"]), Lsn.parse(w["to"]["lsn"])) for w in answer.get("windows", [])]
    if seen.key in ("d", "e", "f"):
        if windows:
            yield f"verify calls {_text(windows)} restorable, although the only backup is not usable"
        yield from _named(seen, answer)
    elif len(windows) != 1:
        yield f"verify tells {len(windows)} windows, not one"
    elif seen.key == "0":
        if windows[0][1] < known.ends[-1]:
            yield f"the window ends at {windows[0][1]}, before the last commit's end {known.ends[-1]}"
    else:
        yield from _cut(seen, answer, known, windows[0][1])


def _cut(seen: Observed, answer: dict[str, Any], known: Known, end: Lsn) -> Iterator[str]:
    # Behind the record that switches to the next segment there is nothing up to that segment's start.
    first, last = known.ends[known.damaged - 2], known.segment.start
    if seen.key == "c2":  # the records before the flipped one are whole
        last = known.ends[known.damaged - 1] + -1
    if not first <= end <= last:
        yield f"the window ends at {end}, not between {first} and {last}"
    gaps = answer.get("gaps", [])
    named = [gap.get("segment") for gap in gaps]
    if named != [known.segment.name]:
        yield f"the gaps name {named}, not {known.segment.name} alone"
        return
    begin, until = Lsn.parse(gaps[0]["from"]["lsn"]), Lsn.parse(gaps[0]["to"]["lsn"])
    if begin != end:
        yield f"the gap begins at {begin}, the window ends at {end}"
    if until < known.ends[-1]:
        yield f"the gap ends at {until}, before the last commit's end {known.ends[-1]}"
    if seen.key in ("c", "c2", "c3") and not any(
        known.segment.name in str(d) for d in answer.get("damaged", [])
    ):
        yield f"damaged names nothing of {known.segment.name}"


def _named(seen: Observed, answer: dict[str, Any]) -> Iterator[str]:
    said = json.dumps(answer)
    if seen.key == "e" and not any("pack-" in str(entry) for entry in answer.get("damaged", [])):
        yield "damaged does not name the pack with the flipped bit"
    if seen.key == "f" and "backup_label" not in said:
        yield "nothing in verify's answer names backup_label"


def _restore(seen: Observed, known: Known) -> Iterator[str]:
    if seen.key == "0":
        if (seen.restore_exit, seen.rows, seen.tables) != (HELD, len(known.ends), known.tables):
            yield f"a healthy restore ended with {seen.restore_exit}, {seen.rows} rows, tables {seen.tables}"
        return
    if seen.started:
        yield f"the restore left something that starts, with {seen.rows} rows"
    if seen.key in REFUSES and seen.restore_exit != REFUSED:
        yield f"restore ended with {seen.restore_exit}, not {REFUSED} (refused)"
    if seen.restore_exit in (HELD, None):
        yield f"restore ended with {seen.restore_exit}"
    if seen.key in WAL_CASES and seen.loss_rows != known.damaged - 1:
        yield f"restore --accept-loss gave {seen.loss_rows} rows, not {known.damaged - 1}"


def _text(windows: list[tuple[Lsn, Lsn]]) -> str:
    return ", ".join(f"{begin}..{end}" for begin, end in windows)
