"""Which tuples transactions touched, decoded from what pg_waldump prints of PostgreSQL 15 to 18.

Only what was committed counts: the COMMIT's own list of subtransactions is the authority, so that what
was rolled back to a savepoint is absent. Row locks are no changes. Where the WAL does not say where rows
were put (COPY on 15, and on any version where a full-page image stands in for them), the block is noted,
to be looked through on a clone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple

from knockwood.errors import ProgramFailedError, RefusedError
from knockwood.history.chains import Chains, place
from knockwood.history.staging import StagedArchive, Stretch
from knockwood.history.transaction import Transaction
from knockwood.model.wal import Lsn
from knockwood.postgres.binaries import Programs
from knockwood.postgres.walreader import Reader, parse_lsn
from knockwood.repository.repository import Repository

ROW_LIMIT: Final = 1_000_000
"""Rows whose places are held in memory (about 150 bytes each)."""

_MOVED: Final = 0x10

_LINE = re.compile(
    rb"^rmgr: (Heap2?|Storage|Standby) +len \(rec/tot\): +\d+/ *\d+, tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+),"
    rb" prev [0-9A-F]+/[0-9A-F]+, desc: ([A-Z_]+)(\+INIT)? ([^\n]*)",
    re.MULTILINE,
)
_TARGET = re.compile(rb", blkref #0: rel (\d+)/(\d+)/(\d+) blk (\d+)")
_SOURCE = re.compile(rb", blkref #1: rel \d+/\d+/\d+ blk (\d+)")
# Before version 16: `off 5 xmax 7 flags 0x00 ; new off 57 xmax 0`; since: `old_off: 5, ... new_off: 57`.
_OFFSET = re.compile(rb"(?:^|[ ])off:? (\d+)")
_OLD = re.compile(rb"(?:old_off:|^off) (\d+)")
_NEW = re.compile(rb"(?:new_off:|new off) (\d+)")
_FLAGS = re.compile(rb"flags:? 0x([0-9A-Fa-f]+)")
_COUNT = re.compile(rb"(?:ntuples: (\d+)|^(\d+) tuples)")
_OFFSETS = re.compile(rb"offsets: \[([\d, ]*)\]")
_EMPTIED = re.compile(rb"(\S+) to (\d+) blocks")
_LOCKED = re.compile(rb"xid (\d+) db (\d+) rel (\d+)")
_DROPPED = re.compile(rb"desc: COMMIT[^\n]*?; rels:((?: [^\s;]+)+)")
_COMMITS = re.compile(
    rb"^rmgr: Transaction [^\n]*?, lsn: ([0-9A-F]+/[0-9A-F]+), [^\n]*?desc: COMMIT", re.MULTILINE
)
_PATH = re.compile(r"(?:global|base/(\d+)|pg_tblspc/(\d+)/[^/]+/(\d+))/(\d+)\Z")

FileId = tuple[int, int, int]
"""Tablespace, database, relation file number, as WAL names them."""


class ExclusiveLock(NamedTuple):
    """An ACCESS EXCLUSIVE lock on a relation: from `lsn` on a clone lets nobody read it until the commit."""

    lsn: Lsn
    database: int
    oid: int


@dataclass(slots=True)
class TouchedFile:
    """The changed tuples of one relation's file.

    `vague` holds blocks into which `vague_rows` rows were put at offsets the WAL does not tell.
    """

    chains: Chains = field(default_factory=Chains)
    vague: set[int] = field(default_factory=set)
    vague_rows: int = 0

    @property
    def blocks(self) -> set[int]:
        """Where the rows lie, before and after."""
        places = (place for net in self.chains.net() for place in (net.origin, net.head))
        return self.vague | {place >> 16 for place in places if place is not None}


@dataclass(slots=True)
class Touched:
    """What transactions did to relations' files, from `start` to the last one's commit.

    `created` files are new, `dropped` ones gone with a commit (TRUNCATE, a rewrite, or DROP). Catalogs
    and TOAST relations are among the files.
    """

    xids: frozenset[int]
    files: dict[FileId, TouchedFile] = field(default_factory=dict)
    created: set[FileId] = field(default_factory=set)
    dropped: set[FileId] = field(default_factory=set)
    locks: list[ExclusiveLock] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(len(file.chains) + file.vague_rows for file in self.files.values())


@dataclass(frozen=True, slots=True)
class Decoded:
    """What groups of transactions touched, each group decoded once. `limit` as for `touched`.

    `following` is the next transaction's number as of positions that were asked for.
    """

    repository: Repository
    limit: int = ROW_LIMIT
    following: dict[Lsn, int] = field(default_factory=dict)
    _found: dict[tuple[Lsn, ...], Touched] = field(default_factory=dict)

    def of(self, programs: Programs, transactions: Sequence[Transaction]) -> Touched:
        """What `touched` says of the group."""
        key = tuple(sorted(transaction.commit_lsn for transaction in transactions))
        if key not in self._found:
            self._found[key] = touched(self.repository, programs, transactions, limit=self.limit)
        return self._found[key]


def touched(
    repository: Repository,
    programs: Programs,
    transactions: Sequence[Transaction],
    *,
    limit: int = ROW_LIMIT,
    only: Callable[[FileId], bool] = lambda file: True,
    new_file: Callable[[], TouchedFile] = lambda: TouchedFile(),
    progress: Callable[[int, int], None] | None = None,
) -> Touched:
    """Decode the WAL of committed transactions of one history (several are taken as one).

    `only` leaves out files, `new_file` makes what takes a file's changes. `progress` gets WAL bytes done
    and in all. Raises RefusedError above `limit` rows, ObjectMissingError where the archive lacks WAL,
    ProgramFailedError where it is damaged.
    """
    if not transactions:
        raise ValueError("no transactions")
    last = max(transactions, key=lambda transaction: transaction.commit_lsn)
    archive = StagedArchive(repository, last.timeline, last.commit_lsn)
    start = min(transaction.first_lsn for transaction in transactions)
    end = last.commit_lsn
    xids = frozenset[int]().union(*(transaction.xids for transaction in transactions))
    decoder = Decoder(xids, limit=limit, only=only, new_file=new_file)
    options = _filters(programs)
    if len(xids) == 1:
        options.append(f"--xid={next(iter(xids))}")
    for stretch in archive.stretches(start, end):
        read_stretch(programs, stretch, options, partial(decoder.take, until=stretch.end.value))
        if progress is not None:
            progress(stretch.end - start, end - start)
    for transaction in transactions:
        if _may_drop(transaction):
            decoder.result.dropped |= _dropped_by(programs, archive, transaction)
    decoder.result.locks = _first_of_each(decoder.result.locks)
    return decoder.result


def commits_between(
    repository: Repository, programs: Programs, transaction: Transaction, start: Lsn, end: Lsn
) -> list[Lsn]:
    """Where commit records begin, of whatever transaction, in a range on the transaction's timeline."""
    found: list[Lsn] = []
    archive = StagedArchive(repository, transaction.timeline, transaction.commit_lsn)
    for stretch in archive.stretches(start, end):
        until = stretch.end.value

        def take(block: bytes, until: int = until) -> None:
            found.extend(Lsn(at) for text in _COMMITS.findall(block) if (at := parse_lsn(text)) < until)

        read_stretch(programs, stretch, ["--rmgr=Transaction"], take)
    return found


def _filters(programs: Programs) -> list[str]:
    # One --rmgr only before 15: then everything is printed and filtered here.
    names = ("Heap", "Heap2", "Storage", "Standby") if programs.major >= 15 else ()
    return [f"--rmgr={name}" for name in names]


def read_stretch(
    programs: Programs, stretch: Stretch, options: list[str], take: Callable[[bytes], None]
) -> None:
    """Hand over what pg_waldump prints of a stretch; raises ProgramFailedError where the WAL is damaged."""
    reader = Reader(programs, stretch.folder, stretch.timeline, stretch.segment_bytes, None)
    complaint = reader.stream(options, stretch.start, stretch.until, take)
    if complaint is not None and "could not find a valid record" not in complaint:
        raise ProgramFailedError(f"WAL cannot be read: {complaint}", where="pg_waldump")


def _may_drop(transaction: Transaction) -> bool:
    """Whether a file may be gone with its commit, by what the index says; without relations it says nothing."""
    relations = transaction.relations
    gone = any(each.dropped or each.truncated or each.rewritten for each in relations)
    return gone or transaction.catalog_changes or not relations


def _dropped_by(programs: Programs, archive: StagedArchive, transaction: Transaction) -> set[FileId]:
    """The files that a COMMIT record names as gone."""
    found: set[FileId] = set()
    lines: list[bytes] = []
    end = max(transaction.end_lsn, transaction.commit_lsn + 8)
    for stretch in archive.stretches(transaction.commit_lsn, end, chunk_bytes=1 << 40):
        read_stretch(programs, stretch, ["--limit=1"], lines.append)
    match = _DROPPED.search(b"".join(lines))
    if match is not None:
        found.update(filter(None, (file_of(path.decode()) for path in match[1].split())))
    return found


def file_of(path: str) -> FileId | None:
    """The file that a path of a record names, such as `base/5/16384`; None for what is none."""
    match = _PATH.match(path)
    if match is None:
        return None
    base, tablespace, database, number = match.groups()
    if base is not None:
        return 1663, int(base), int(number)
    if tablespace is not None:
        return int(tablespace), int(database), int(number)
    return 1664, 0, int(number)


def _first_of_each(locks: Iterable[ExclusiveLock]) -> list[ExclusiveLock]:
    """Each lock where it was taken: checkpoints log again those that are held."""
    first: dict[tuple[int, int], ExclusiveLock] = {}
    for lock in sorted(locks):
        first.setdefault((lock.database, lock.oid), lock)
    return sorted(first.values())


class Decoder:
    """Takes pg_waldump's output in blocks of whole lines; `result` holds what the xids did."""

    def __init__(
        self,
        xids: frozenset[int],
        *,
        limit: int = ROW_LIMIT,
        only: Callable[[FileId], bool] = lambda file: True,
        new_file: Callable[[], TouchedFile] = lambda: TouchedFile(),
    ) -> None:
        self.result = Touched(xids)
        self._names = frozenset(str(xid).encode() for xid in xids)
        self._limit = limit
        self._only = only
        self._new_file = new_file
        self._rows = 0

    def take(self, block: bytes, until: int = 1 << 64) -> None:
        """Decode the records that begin before the position `until`."""
        for manager, xid, at, kind, init, text in _LINE.findall(block):
            if manager == b"Standby":
                if kind == b"LOCK":
                    self._lock(parse_lsn(at), until, text)
            elif xid in self._names and (lsn := parse_lsn(at)) < until:
                if manager == b"Storage":
                    self._storage(kind, text)
                else:
                    self._row(lsn, int(xid), kind, bool(init), text)

    def _lock(self, lsn: int, until: int, text: bytes) -> None:
        # Logged with the xid that holds it; a checkpoint logs all that are held, of any transaction.
        if lsn < until:
            self.result.locks += [
                ExclusiveLock(Lsn(lsn), int(database), int(oid))
                for xid, database, oid in _LOCKED.findall(text)
                if xid in self._names
            ]

    def _storage(self, kind: bytes, text: bytes) -> None:
        if kind == b"CREATE":
            file = file_of(text.split()[0].decode())
            if file is not None:
                self.result.created.add(file)
        elif kind == b"TRUNCATE" and (match := _EMPTIED.match(text)) and int(match[2]) == 0:
            # Only a transaction that made the file itself empties it in place.
            file = file_of(match[1].decode())
            if file is not None and file in self.result.files:
                del self.result.files[file]

    def _row(self, lsn: int, xid: int, kind: bytes, init: bool, text: bytes) -> None:
        change = _CHANGES.get(kind)
        target = _TARGET.search(text)
        if change is None or target is None:
            return
        tablespace, database, number, block = map(int, target.groups())
        file = (tablespace, database, number)
        if not self._only(file):
            return
        found = self.result.files.get(file)
        if found is None:
            found = self.result.files[file] = self._new_file()
        before = len(found.chains) + found.vague_rows
        change(found, text, block, lsn, xid, init)
        self._rows += len(found.chains) + found.vague_rows - before
        if self._rows > self._limit:
            raise RefusedError(
                f"more than {self._limit:,} rows were changed",
                hint="raise it with --max-rows if there is memory for it, or restore the tables from a clone",
            )


def _number(pattern: re.Pattern[bytes], text: bytes) -> int:
    match = pattern.search(text)
    if match is None:
        raise ProgramFailedError(
            f"a record that cannot be read: {text[:120].decode(errors='replace')}", where="pg_waldump"
        )
    return int(match[1])


def _insert(found: TouchedFile, text: bytes, block: int, lsn: int, xid: int, init: bool) -> None:
    found.chains.insert(place(block, _number(_OFFSET, text)), lsn, xid)


def _update(found: TouchedFile, text: bytes, block: int, lsn: int, xid: int, init: bool) -> None:
    # Block reference 0 is where the new version is, 1 where the old one was, unless it is the same page.
    source = _SOURCE.search(text)
    old = place(int(source[1]) if source else block, _number(_OLD, text))
    found.chains.update(old, place(block, _number(_NEW, text)), lsn, xid)


def _delete(found: TouchedFile, text: bytes, block: int, lsn: int, xid: int, init: bool) -> None:
    flags = _FLAGS.search(text)
    moved = flags is not None and bool(int(flags[1], 16) & _MOVED)
    found.chains.delete(place(block, _number(_OFFSET, text)), lsn, xid, moved=moved)


def _multi_insert(found: TouchedFile, text: bytes, block: int, lsn: int, xid: int, init: bool) -> None:
    match = _COUNT.search(text)
    if match is None:
        raise ProgramFailedError(
            f"a record that cannot be read: {text[:120].decode(errors='replace')}", where="pg_waldump"
        )
    count = int(match[1] or match[2])
    offsets = _OFFSETS.search(text)
    if offsets is not None:
        numbers: Iterable[int] = map(int, offsets[1].split(b","))
    elif init:
        numbers = range(1, count + 1)
    else:
        found.vague.add(block)
        found.vague_rows += count
        found.chains.insert_somewhere(block, lsn, xid)
        return
    for number in numbers:
        found.chains.insert(place(block, number), lsn, xid)


_CHANGES: Final = {
    b"INSERT": _insert,
    b"UPDATE": _update,
    b"HOT_UPDATE": _update,
    b"DELETE": _delete,
    b"MULTI_INSERT": _multi_insert,
}
