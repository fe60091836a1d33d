"""The last change of each block in WAL that was read before: what an image taken later must not lack. Pure."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from numpy.typing import NDArray

from knockwood.postgres.walrefs import Fork

_MOST: Final = 1_000_000
"""Blocks remembered, the last changed ones, in 12 bytes each."""

_Columns = tuple[NDArray[np.uint32], NDArray[np.uint64]]


class LastChanges:
    """For blocks of main forks the start of the last record that changed them, where one is known."""

    def __init__(self) -> None:
        self._forks: dict[Fork, _Columns] = {}
        self.complete = True
        """Whether none was forgotten."""

    def add(self, fork: Fork, blocks: NDArray[np.uint32], starts: NDArray[np.uint64]) -> None:
        """Take what other WAL says, older or younger; a start of 0 says nothing."""
        if fork[3] != "main":
            return
        known = self._forks.get(fork, (blocks[:0], starts[:0]))
        blocks = np.concatenate([known[0], blocks[starts > 0]])
        starts = np.concatenate([known[1], starts[starts > 0]])
        order = np.lexsort((starts, blocks))
        blocks, starts = blocks[order], starts[order]
        last = np.append(blocks[1:] != blocks[:-1], True)[: len(blocks)]
        self._forks[fork] = blocks[last], starts[last]

    def before(self, fork: Fork, block: int, lsn: int) -> int:
        """The start of the last change known of the block, if that is before `lsn`; else 0."""
        if fork not in self._forks:
            return 0
        blocks, starts = self._forks[fork]
        at = int(np.searchsorted(blocks, block))
        found = int(starts[at]) if at < len(blocks) and blocks[at] == block else 0
        return found if found < lsn else 0

    def limit(self) -> None:
        """Forget the oldest, where there is too much."""
        count = sum(len(blocks) for blocks, _ in self._forks.values())
        if count <= _MOST:
            return
        self.complete = False
        every = np.concatenate([starts for _, starts in self._forks.values()])
        least = np.partition(every, count - _MOST)[count - _MOST]
        for fork, (blocks, starts) in self._forks.items():
            self._forks[fork] = blocks[starts >= least], starts[starts >= least]

    def as_bytes(self) -> bytes:
        forks = list(self._forks)
        columns = list(self._forks.values())
        told = io.BytesIO()
        np.savez(
            told,
            complete=np.array(self.complete),
            forks=np.array([fork[:3] for fork in forks], np.uint32).reshape(-1, 3),
            counts=np.array([len(blocks) for blocks, _ in columns], np.uint32),
            blocks=np.concatenate([np.empty(0, np.uint32), *(blocks for blocks, _ in columns)]),
            starts=np.concatenate([np.empty(0, np.uint64), *(starts for _, starts in columns)]),
        )
        return told.getvalue()

    @classmethod
    def from_bytes(cls, told: bytes) -> LastChanges:
        """What `as_bytes` wrote; raises ValueError, KeyError or OSError for anything else."""
        made = cls()
        with np.load(io.BytesIO(told), allow_pickle=False) as arrays:
            made.complete = bool(arrays["complete"])
            begin = 0
            for fork, count in zip(arrays["forks"].tolist(), arrays["counts"].tolist(), strict=True):
                part = slice(begin, begin + count)
                made._forks[(fork[0], fork[1], fork[2], "main")] = (
                    arrays["blocks"][part],
                    arrays["starts"][part],
                )
                begin += count
        return made
