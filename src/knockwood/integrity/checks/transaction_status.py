"""pg_xact: complete, and in agreement with what rows and the WAL remember of transactions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from knockwood.host import clock
from knockwood.integrity.block_audit import LOOK_BACK_BYTES
from knockwood.integrity.budget import pace
from knockwood.integrity.catalog import Names
from knockwood.integrity.check import NotChecked, Outcome, Subject, Weight
from knockwood.integrity.checks.page_checksums import scannable
from knockwood.integrity.relation_files import DataFiles, RelationFile, data_files, listing
from knockwood.integrity.row_headers import Hints, hints_of
from knockwood.integrity.staged_wal import StagedWal, with_wal
from knockwood.model import Finding, Location, Lsn, Severity
from knockwood.postgres.connection import translated
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES
from knockwood.postgres.waldump import RawCommit, WalWalk, raw_lsn, walk

_CHUNK: Final = 4 << 20
_PAGES: Final = 32  # pages of one segment file
_XIDS_PER_PAGE: Final = PAGE_BYTES * 4
_XIDS: Final = 1 << 32
_FIRST_NORMAL: Final = 3
_COMMITTED: Final = 1
_SETTLE: Final = 0.5
_MOST_FINDINGS: Final = 100
_WORDS: Final = ("unfinished", "committed", "aborted", "subcommitted")

_RANGE: Final = """
select (select datfrozenxid::text::int8 from pg_catalog.pg_database
        order by pg_catalog.age(datfrozenxid) desc limit 1),
       pg_catalog.split_part(next_xid, ':', 2)::int8,
       oldest_active_xid::text::int8, redo_lsn::text
from pg_catalog.pg_control_checkpoint()
"""


@dataclass(frozen=True, slots=True)
class _Range:
    """Transactions whose end is known and was on disk at the last checkpoint: `oldest` up to `end`, all
    commits whose record lies before `redo` among them."""

    oldest: int
    end: int
    redo: Lsn

    def __len__(self) -> int:
        return (self.end - self.oldest) % _XIDS


class TransactionStatus:
    """Is every page of pg_xact there, and does it say what rows say of the same transactions?

    A row's hint bits were copied from pg_xact once. Where they now say the contrary, pg_xact (which has
    no checksum) or the row has changed. Rows that nobody has read yet remember nothing, and the first reader
    copies the wrong end into them: so the commit records of recent WAL are compared as well.
    """

    name = "transaction_status"
    title = "Transaction status (pg_xact) against its files, rows and WAL"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        with data_files(subject) as data:
            known = _range(subject)
            status, flaws = _read(data, known)
            if flaws:
                # VACUUM removes old files while we look; then the range has moved on too.
                clock.sleep(_SETTLE)
                known = _range(subject)
                status, flaws = _read(data, known)
            yield from flaws
            if not len(known):
                yield NotChecked(self.name, "no transaction has ended for certain before the last checkpoint")
                return
            yield from _against_wal(subject, known, status)
            yield from _against_rows(subject, data, known, status)


def _range(subject: Subject) -> _Range:
    with subject.connect() as connection, translated():
        row = connection.execute(_RANGE).fetchone()
    assert row is not None
    oldest, following, active, redo = row
    oldest = max(oldest, _FIRST_NORMAL)
    # A shutdown checkpoint has no active transactions and writes none down.
    end = active if active >= _FIRST_NORMAL else following
    return _Range(oldest, end if (end - oldest) % _XIDS < _XIDS // 2 else oldest, Lsn.parse(redo))


def _read(data: DataFiles, known: _Range) -> tuple[NDArray[np.uint8], list[Finding]]:
    """The status bytes of the range's pages, one after the other, and the pages that cannot be right."""
    if not len(known):
        return np.empty(0, np.uint8), []
    first = known.oldest // _XIDS_PER_PAGE
    count = (known.oldest % _XIDS_PER_PAGE + len(known) - 1) // _XIDS_PER_PAGE + 1
    status = np.zeros(count * PAGE_BYTES, np.uint8)
    flaws: list[Finding] = []
    for index in range(count):
        page = (first + index) % (_XIDS // _XIDS_PER_PAGE)
        path = f"pg_xact/{page // _PAGES:04X}"
        image = data.read(path, page % _PAGES * PAGE_BYTES, PAGE_BYTES)
        if len(image) < PAGE_BYTES:
            flaws.append(_flaw(path, page % _PAGES, "the page is missing"))
            continue
        status[index * PAGE_BYTES : (index + 1) * PAGE_BYTES] = np.frombuffer(image, np.uint8)
        # A crash leaves single transactions without an end, never 32768 in a row.
        if 0 < index < count - 1 and not any(image):
            flaws.append(_flaw(path, page % _PAGES, "the page is all zeros"))
    return status, flaws


def _flaw(path: str, block: int, summary: str) -> Finding:
    return Finding(
        TransactionStatus.name,
        Severity.CRITICAL,
        Location(file=path, block=block),
        summary,
        "the server takes committed transactions of this range for unfinished: their rows vanish, or queries"
        " fail",
        "bring the file back from the newest clean backup and the WAL; do not create it from zeros",
        {},
    )


def _against_wal(subject: Subject, known: _Range, status: NDArray[np.uint8]) -> Iterator[Outcome]:
    """Commits that the WAL holds and pg_xact does not know. Without WAL the rows alone are asked."""

    def read(wal: StagedWal | None) -> tuple[WalWalk | None, list[tuple[int, Lsn]]]:
        denied: list[tuple[int, Lsn]] = []
        if wal is None or wal.end <= wal.start:
            return None, denied

        def compare(commits: list[RawCommit]) -> None:
            if len(denied) < _MOST_FINDINGS:
                denied.extend(_denied(commits, known, status))

        programs = subject.server_programs
        walked = walk(
            programs, wal.folder, wal.timeline, wal.start, wal.end, wal.segment_bytes, on_commits=compare
        )
        return walked, denied

    walked, denied = with_wal(subject, known.redo, LOOK_BACK_BYTES, read)
    if walked is not None and not walked.sound:
        yield NotChecked(
            TransactionStatus.name, f"the WAL cannot be read from {walked.end_lsn} on: {walked.error}"
        )
    for xid, lsn in denied[:_MOST_FINDINGS]:
        yield _denial(xid, lsn, known, status)


def _denied(commits: list[RawCommit], known: _Range, status: NDArray[np.uint8]) -> Iterator[tuple[int, Lsn]]:
    # COMMIT PREPARED names its transaction apart.
    xids = np.array([int(prepared or xid) for xid, _, prepared, _ in commits], np.int64)
    inside = (xids - known.oldest) % _XIDS < len(known)
    for at in np.flatnonzero(inside & (_statuses(xids, known, status) != _COMMITTED)):
        yield int(xids[at]), Lsn(raw_lsn(commits[at]))


def _denial(xid: int, lsn: Lsn, known: _Range, status: NDArray[np.uint8]) -> Finding:
    now = _WORDS[int(_statuses(np.array([xid], np.int64), known, status)[0])]
    return Finding(
        TransactionStatus.name,
        Severity.CRITICAL,
        Location(file=_file_of(xid), block=_block_of(xid), key=f"xid {xid}", lsn=lsn),
        f"the WAL holds the commit of transaction {xid}, pg_xact says {now}",
        "rows of this transaction that were not read before appear or vanish wrongly",
        "compare pg_xact with a clone restored to now, and bring it back from there: knockwood recover",
        {"xid": xid, "commit_record": str(lsn), "pg_xact_says": now, "pg_xact_file": _file_of(xid)},
    )


def _file_of(xid: int) -> str:
    return f"pg_xact/{xid // (_XIDS_PER_PAGE * _PAGES):04X}"


def _block_of(xid: int) -> int:
    return xid // _XIDS_PER_PAGE % _PAGES


def _against_rows(
    subject: Subject, data: DataFiles, known: _Range, status: NDArray[np.uint8]
) -> Iterator[Finding]:
    names = Names(subject)
    told = 0
    for file in scannable(listing(data)):
        if file.fork != "main" or file.bytes == 0:
            continue
        relation = names.of(file)
        if relation is None or relation.kind not in ("r", "m", "t") or relation.method != "heap":
            continue
        for finding in _file(subject, data, file, names, known, status):
            yield finding
            told += 1
            if told >= _MOST_FINDINGS:
                return


def _file(
    subject: Subject,
    data: DataFiles,
    file: RelationFile,
    names: Names,
    known: _Range,
    status: NDArray[np.uint8],
) -> Iterator[Finding]:
    offset = 0
    while offset < file.bytes:
        chunk = data.read(file.path, offset, _CHUNK)
        whole = len(chunk) - len(chunk) % PAGE_BYTES
        if not whole:
            return
        pages = np.frombuffer(chunk, np.uint8, whole).reshape(-1, PAGE_BYTES)
        first = file.segment * SEGMENT_PAGES + offset // PAGE_BYTES
        for hints in hints_of(pages, first, subject.facts.checksums):
            for at in _contradictions(hints, known, status):
                yield _contradiction(names, file, hints, int(at), known, status)
        offset += whole
        pace(subject)


def _statuses(xids: NDArray[np.int64], known: _Range, status: NDArray[np.uint8]) -> NDArray[np.uint8]:
    base = known.oldest - known.oldest % _XIDS_PER_PAGE
    place = (xids - base) % _XIDS
    place = np.where(place < len(status) * 4, place, 0)
    found: NDArray[np.uint8] = status[place >> 2] >> ((place & 3) * 2).astype(np.uint8) & 3
    return found


def _contradictions(hints: Hints, known: _Range, status: NDArray[np.uint8]) -> NDArray[np.intp]:
    inside = (hints.xids - known.oldest) % _XIDS < len(known)
    committed = _statuses(hints.xids, known, status) == _COMMITTED
    return np.flatnonzero(inside & (committed != hints.committed))


def _contradiction(
    names: Names, file: RelationFile, hints: Hints, at: int, known: _Range, status: NDArray[np.uint8]
) -> Finding:
    xid, block, item = int(hints.xids[at]), int(hints.blocks[at]), int(hints.items[at])
    now = int(_statuses(hints.xids[at : at + 1], known, status)[0])
    words = _WORDS[now]
    was = "committed" if hints.committed[at] else "aborted"
    place = names.location(file, block)
    return Finding(
        TransactionStatus.name,
        Severity.CRITICAL,
        Location(
            database=place.database, relation=place.relation, file=place.file, block=block, key=f"xid {xid}"
        ),
        f"a row says that transaction {xid} {was}, pg_xact says {words}",
        "rows of this transaction that were not read before appear or vanish wrongly",
        "compare pg_xact with a clone restored to now, and bring it back from there: knockwood recover",
        {
            "xid": xid,
            "row": f"({block},{item})",
            "column": hints.column,
            "row_says": was,
            "pg_xact_says": words,
            "pg_xact_file": _file_of(xid),
        },
    )


CHECK = TransactionStatus()
