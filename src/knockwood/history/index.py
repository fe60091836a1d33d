"""The archive as a list of transactions: an index per segment, read where it is there, made where not."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from knockwood.errors import ObjectDamagedError, ObjectMissingError
from knockwood.history import packs, store
from knockwood.history.assemble import Asked, Assembler
from knockwood.history.build import Indexed, Indexer, keep, pieces_of, runs_of
from knockwood.history.build_pool import build_in_processes
from knockwood.history.carried import Carried
from knockwood.history.store import Head, Transactions
from knockwood.history.transaction import Transaction
from knockwood.model.proof import Commit
from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalRange, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.repository.archive import WalArchive
from knockwood.repository.inventory import merged, split
from knockwood.repository.repository import Repository
from knockwood.repository.route import Route
from knockwood.repository.walk import Piece

Progress = Callable[[int, int], None]
"""Called with bytes of WAL indexed so far and to index in all."""

_ALL = Asked()

_READERS = 8
"""Heads that are read at once: from a bucket each takes a while."""


@dataclass(frozen=True, slots=True)
class NotCovered:
    """A range of the archive that no transaction can be told of, and why."""

    range: WalRange
    reason: str


@dataclass(slots=True)
class _Part:
    """One segment of the route: its head, and where the rest is (in the repository, or at hand)."""

    piece: Piece
    head: Head | None
    stored: str | None = None
    made: Indexed | None = None
    reason: str | None = None


class ArchiveIndex:
    """Transactions along one timeline's history, in the order of their commits.

    It is a picture of the archive when it was opened. What is not `covered` is in `not_covered`, with its
    reason: nothing is left out in silence.
    """

    def __init__(
        self, repository: Repository, timeline: Timeline, parts: Sequence[_Part], route: Route
    ) -> None:
        self.repository = repository
        self.timeline = timeline
        self._parts = parts
        self._route = route
        self._history: TimelineHistory = route.inventory.history(timeline)
        self._known = [part for part in parts if part.head is not None]
        self._carried: Carried | None = None

    @classmethod
    def open(
        cls,
        repository: Repository,
        *,
        programs_for: Callable[[int], Programs] | None = None,
        progress: Progress | None = None,
        build: bool = True,
        timeline: Timeline | None = None,
        workers: int | None = None,
    ) -> ArchiveIndex:
        """Read the index along a timeline (the newest), and with `build` make what is missing of it.

        The WAL is decoded here: `programs_for` is taken for the sake of callers that have it, and not
        used. Raises WrongKeyError without an identity for an encrypted archive, StorageUnavailableError.
        """
        del programs_for
        archive = WalArchive(repository)
        listing = archive.listing()
        inventory = archive.inventory_of(listing)
        newest = timeline or max((*inventory.timelines, *inventory.histories), default=Timeline(1))
        route = Route(inventory, newest)
        parts = [_Part(piece, None) for piece in pieces_of(route, listing)]
        sizes = {part.piece.object: listing[part.piece.object].bytes for part in parts}
        packed = _load(repository, parts, sizes)
        _build(repository, parts, sizes, build, progress, workers)
        if build:
            _pack(repository, parts, packed)
        return cls(repository, newest, parts, route)

    # --- what there is ------------------------------------------------------------------------------

    @property
    def covered(self) -> tuple[WalRange, ...]:
        """The ranges that are indexed, each on the timeline it belongs to."""
        path = self._history.path()
        return merged(
            piece
            for part in self._parts
            if part.head is not None and part.head.start < part.head.end
            for piece in split(path, Lsn(part.head.start), Lsn(part.head.end))
        )

    @property
    def not_covered(self) -> tuple[NotCovered, ...]:
        """What lies between the first and the last WAL of the route and is not covered, with the reason."""
        if not self._parts:
            return ()
        path = self._history.path()
        found: list[NotCovered] = []
        first = self._parts[0]
        # The end of a record that began before all WAL there is: the archive begins after it.
        position = Lsn(first.head.start) if first.head is not None else first.piece.segment.start
        reason = ""
        before: int | None = None
        for part in self._parts:
            segment = part.piece.segment
            begin = Lsn(part.head.start) if part.head is not None else segment.end
            if before is not None and segment.number > before + 1:
                reason = f"{self._missing(before + 1)} is missing"
            before = segment.number
            if begin > position:
                why = part.reason or reason
                found += [NotCovered(piece, why) for piece in split(path, position, begin)]
            if part.head is not None:
                position = max(position, Lsn(part.head.end))
                reason = part.reason or "a record that begins here does not end in the archive"
            else:
                position = max(position, segment.end)
        last = self._parts[-1]
        end = last.piece.end or last.piece.segment.end
        if last.reason is not None and position < end:
            found += [NotCovered(piece, last.reason) for piece in split(path, position, end)]
        return tuple(found)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads of the segments that are indexed, in order."""
        return tuple(part.head for part in self._parts if part.head is not None)

    def _missing(self, number: int) -> str:
        size = self._route.segment_bytes
        return WalSegment(self._history.timeline_at(Lsn(number * size)), number, size).name

    # --- questions ----------------------------------------------------------------------------------

    def transactions(
        self,
        *,
        since: Lsn | None = None,
        until: Lsn | None = None,
        filenodes: Container[object] | None = None,
        xid: int | None = None,
    ) -> Iterator[Transaction]:
        """Committed transactions in the order of their commit records, which start from `since` on and
        before `until`.

        `filenodes` holds relation file numbers, or pairs of database and number: transactions that
        changed one of them. `xid` asks for the transaction that had it, also as a subtransaction.
        """
        xids = frozenset([xid]) if xid is not None else None
        return self.select(Asked(since, until, filenodes=filenodes, xids=xids))

    def select(self, asked: Asked) -> Iterator[Transaction]:
        """The same, asked for in one value."""
        return self._stream(self._assembler(asked))

    def newest(self, limit: int, asked: Asked = _ALL) -> list[Transaction]:
        """The newest of those asked for, at most `limit`, in order: without reading the others."""
        found: list[Transaction] = []
        assembler = self._assembler(asked)
        end, width = len(self._known), 1
        while end > 0 and len(found) < limit:
            begin = max(end - width, 0)
            found = [*self._stream(assembler, begin, end, last=limit), *found]
            if assembler.before(_head(self._known[begin])):
                break
            end, width = begin, width * 2
        return found[-limit:]

    def largest(self, limit: int, asked: Asked = _ALL) -> list[Transaction]:
        """Those with the most bytes of WAL, the largest first."""
        assembler = self._assembler(asked)
        heads = [_head(part) for part in self._known]
        ranked = sorted((-assembler.most(at, head), head.start, at) for at, head in enumerate(heads))
        found: list[Transaction] = []
        for most, start, at in ranked:
            # From here on none is larger, or as large and earlier, than the last one found.
            if found and len(found) == limit and (most, start) > _rank(found[-1]):
                break
            found += self._stream(assembler, at, at + 1, largest=limit)
            found = sorted(found, key=_rank)[:limit]
        return found

    def _assembler(self, asked: Asked) -> Assembler:
        if self._carried is None:
            self._carried = Carried([_head(part) for part in self._known])
        return Assembler(self._history, asked, self._carried)

    def _stream(
        self,
        assembler: Assembler,
        begin: int = 0,
        end: int | None = None,
        *,
        last: int | None = None,
        largest: int | None = None,
    ) -> Iterator[Transaction]:
        for position, part in enumerate(self._known[begin:end], begin):
            head = _head(part)
            if assembler.beyond(head):
                return
            if assembler.needs(position, head):
                found = self._transactions_of(part)
                yield from assembler.read(position, head, found, last=last, largest=largest)

    def transaction(self, xid: int, near: Lsn | None = None) -> Transaction:
        """The transaction that had an xid, also as a subtransaction; the newest, or the nearest to `near`,
        where the number was used more than once.

        Raises ObjectMissingError where no commit of it is in what is covered.
        """
        found = list(self.transactions(xid=xid & 0xFFFF_FFFF))
        if not found:
            raise ObjectMissingError(
                f"no commit of transaction {xid} is in the archive's index",
                where=self.repository.storage.url,
                hint="it was aborted, has not ended, or its WAL is not there: `knockwood log` tells what is",
            )
        if near is None:
            return found[-1]
        return min(found, key=lambda one: abs(one.commit_lsn.value - near.value))

    def writers(self, xids: Iterable[int]) -> dict[int, Transaction]:
        """The transactions that had some xids, also as subtransactions, in one pass; the newest of each.

        Those whose commit is not in what is covered are left out.
        """
        wanted = frozenset(xids)
        return {xid: one for one in self.select(Asked(xids=wanted)) for xid in one.xids if xid in wanted}

    def commit_of(self, xid: int, near: Lsn | None = None) -> Commit:
        """The commit of a transaction. Raises ObjectMissingError."""
        found = self.transaction(xid, near)
        return Commit(found.xid, found.commit_lsn, found.commit_time)

    def _transactions_of(self, part: _Part) -> Transactions:
        if part.made is None and part.stored is not None:
            try:
                return store.read_transactions(self.repository, part.stored)
            except (ObjectDamagedError, ObjectMissingError):
                self._remake(part)
        summary = part.made.summary if part.made is not None else None
        if summary is None:
            raise ObjectMissingError(
                "the segment's index is gone, and so is its WAL", where=part.piece.object
            )
        return Transactions(summary.transactions, summary.details, summary.prepared, summary.created)

    def _remake(self, part: _Part) -> None:
        """Index a segment again whose index cannot be read: nothing is lost with it."""
        store.delete(self.repository, {part.piece.segment.name})
        info = self.repository.storage.info(part.piece.object)
        for run in runs_of([one.piece for one in self._parts]):
            if part.piece in run and info is not None:
                part.made = Indexer(self.repository, run).index(run.index(part.piece), info.bytes)
                part.stored = keep(self.repository, part.made)


def _head(part: _Part) -> Head:
    assert part.head is not None
    return part.head


def _rank(one: Transaction) -> tuple[int, int]:
    """The largest first, then the earliest."""
    return -one.wal_bytes, one.commit_lsn.value


def _load(repository: Repository, parts: Sequence[_Part], sizes: Mapping[str, int]) -> frozenset[str]:
    """Take the stored heads of segments, but none that is damaged or of other WAL; the names of those in packs."""
    packed = packs.read(repository)
    alone = [
        part
        for part in parts
        if part.piece.end is None and not _accept(part, packed.get(part.piece.segment.name), sizes)
    ]
    known = store.heads(repository, [part.piece.segment for part in alone])
    stored = [part for part in alone if part.piece.segment.name in known]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="heads") as pool:
        heads = list(pool.map(lambda part: _read(repository, known[part.piece.segment.name]), stored))
    wrong = [part for part, head in zip(stored, heads, strict=True) if not _accept(part, head, sizes)]
    if wrong:
        store.delete(repository, {part.piece.segment.name for part in wrong})
    return frozenset(name for name, _ in packed.values())


def _read(repository: Repository, name: str) -> tuple[str, Head] | None:
    try:
        return name, store.read_head(repository, name)
    except (ObjectDamagedError, ObjectMissingError):
        return None


def _accept(part: _Part, stored: tuple[str, Head] | None, sizes: Mapping[str, int]) -> bool:
    """Take a stored head if it is there, and of this file."""
    if stored is None:
        return False
    name, head = stored
    if (head.source, head.source_bytes) != (part.piece.object, sizes[part.piece.object]):
        return False
    part.head, part.stored = head, name
    return True


def _pack(repository: Repository, parts: Sequence[_Part], packed: frozenset[str]) -> None:
    """Put together what lies alone; not heads that the WAL before will replace."""
    alone = {
        part.stored: part.head
        for part in parts
        if part.stored is not None and part.head is not None and part.head.whole
    }
    packs.write(repository, {name: head for name, head in alone.items() if name not in packed})


def _follows(parts: Sequence[_Part], position: int) -> bool:
    """Whether the segment before is there."""
    if position == 0:
        return False
    return parts[position - 1].piece.segment.number + 1 == parts[position].piece.segment.number


def _build(
    repository: Repository,
    parts: Sequence[_Part],
    sizes: Mapping[str, int],
    build: bool,
    progress: Progress | None,
    workers: int | None,
) -> None:
    missing = [
        position
        for position, part in enumerate(parts)
        if part.head is None or (not part.head.whole and _follows(parts, position))
    ]
    if not build:
        for position in missing:
            if parts[position].head is None:
                parts[position].reason = "it is not indexed"
        return
    total = len(missing) * repository.header.segment_bytes
    done = 0

    def advance() -> None:
        nonlocal done
        done += repository.header.segment_bytes
        if progress is not None:
            progress(done, total)

    pieces = [part.piece for part in parts]
    stored = build_in_processes(repository, pieces, sizes, missing, workers, advance)
    for position, name in stored.items():
        parts[position].head, parts[position].stored = store.read_head(repository, name), name
    indexers: dict[int, tuple[Indexer, int]] = {}
    begin = 0
    for run in runs_of(pieces):
        indexer = Indexer(repository, run)
        indexers.update({begin + number: (indexer, number) for number in range(len(run))})
        begin += len(run)
    for position in missing:
        if position in stored:
            continue
        part = parts[position]
        indexer, number = indexers[position]
        _take(part, indexer.index(number, sizes[part.piece.object]), repository)
        advance()


def _take(part: _Part, made: Indexed, repository: Repository) -> None:
    part.reason = made.reason
    if made.head is None:
        return
    part.head = made.head
    part.stored = keep(repository, made)
    if part.stored is None:
        part.made = made


__all__ = ["ArchiveIndex", "Asked", "NotCovered", "Progress"]
