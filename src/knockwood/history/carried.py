"""What the heads of earlier segments hold of transactions that end in a later one, looked up and not carried along.

Transaction ids go round. Here they are counted on: the 64-bit number that a segment's highest one leads to tells a
transaction from one that had the same id a round before, and was left open by a crash.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence

from knockwood.history.store import Head, OpenTransaction

_HALF = 1 << 31
_ROUND = 1 << 32

Part = tuple[int, OpenTransaction]
"""The LSN at which a segment begins, and what it holds of a transaction that does not end in it."""


class Carried:
    """All of it, of heads in order."""

    def __init__(self, heads: Sequence[Head]) -> None:
        self._newest: list[int] = []
        self._whole_from: list[int | None] = []
        self._parts: dict[int, list[tuple[int, Part]]] = {}
        newest: int | None = None
        whole_from: int | None = None
        reached: int | None = None
        for position, head in enumerate(heads):
            # After a hole, and at the archive's beginning, transactions may have begun in what is not there.
            if whole_from is None or reached is None or head.start > reached:
                whole_from = head.next_xid
            reached = head.end
            if head.highest_xid is not None:
                found = head.highest_xid + _ROUND if newest is None else _near(head.highest_xid, newest)
                newest = found if newest is None else max(found, newest)
            self._newest.append(newest or 0)
            self._whole_from.append(whole_from)
            base = head.segment.start.value
            for part in head.opened:
                whole = _near(part.xid, self._newest[-1])
                self._parts.setdefault(whole, []).append((position, (base, part)))
        self._xids = sorted(self._parts)

    def complete(self, position: int, xid: int) -> bool:
        """Whether all WAL is there since a transaction that ends in the segment may have begun."""
        whole_from = self._whole_from[position]
        return whole_from is not None and (xid - whole_from) % _ROUND < _HALF

    def of(self, position: int, xid: int) -> list[Part]:
        """The parts that lie before the segment at `position`, in which the transaction ends."""
        parts = self._parts.get(_near(xid, self._newest[position]), ())
        return [part for at, part in parts if at < position]

    def bytes(self, position: int, xid: int) -> int:
        """How much WAL those parts are."""
        return sum(part.bytes for _, part in self.of(position, xid))

    def ending(
        self, position: int, head: Head, wanted: Callable[[OpenTransaction], bool] | None = None
    ) -> Iterator[int]:
        """The xids that may end in the segment and have parts before it, one of them `wanted`."""
        if head.xids is None:
            return
        newest = self._newest[position]
        low, high = (_near(xid, newest) for xid in head.xids)
        if low > high:  # they went round in the segment: the least and the greatest tell nothing
            low, high = newest - _HALF, newest + _HALF
        for whole in self._xids[bisect_left(self._xids, low) : bisect_right(self._xids, high)]:
            parts = self._parts[whole]
            if any(at < position and (wanted is None or wanted(part)) for at, (_, part) in parts):
                yield whole % _ROUND


def _near(xid: int, newest: int) -> int:
    """The number that ends with these 32 bits and is nearest to another."""
    return newest + (xid - newest + _HALF) % _ROUND - _HALF
