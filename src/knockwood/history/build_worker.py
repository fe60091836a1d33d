"""One process that indexes segments: its parent writes lines of JSON to its input, it answers in lines.

First the job, then lists of positions, at last nothing. For each position one line: the position, and the
name of the head it stored, or null for what the parent has to look at itself. If the input ends, the
parent is done or dead, and the worker ends.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from knockwood.history.build import Indexer, keep, runs_of
from knockwood.history.child import repository_from
from knockwood.model.wal import Lsn, WalSegment
from knockwood.repository.walk import Piece


def piece_as_json(piece: Piece) -> list[Any]:
    return [piece.segment.name, piece.object, piece.end.value if piece.end else None]


def main() -> None:
    """Work until the input ends."""
    job = json.loads(sys.stdin.readline())
    repository = repository_from(job)
    size = repository.header.segment_bytes
    pieces = [
        Piece(WalSegment.parse(name, size), stored, Lsn(end) if end is not None else None)
        for name, stored, end in job["pieces"]
    ]
    indexers: list[tuple[Indexer, int]] = []
    for run in runs_of(pieces):
        indexer = Indexer(repository, run)
        indexers += [(indexer, number) for number in range(len(run))]
    with ThreadPoolExecutor(1) as storing:
        for line in sys.stdin:
            stored: tuple[int, Future[str | None]] | None = None
            for position in json.loads(line):
                indexer, number = indexers[position]
                made = indexer.index(number, job["sizes"][position])
                # Storage makes durable what it takes, which is waiting, while the next one is decoded.
                _answer(stored)
                stored = position, storing.submit(keep, repository, made)
            _answer(stored)
            _say([])


def _answer(stored: tuple[int, Future[str | None]] | None) -> None:
    if stored is not None:
        _say([stored[0], stored[1].result()])


def _say(answer: list[Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
