"""The pages of a backup as they stream by: which fail, and which of those were only torn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knockwood.errors import KnockwoodError, MissingPrivilegeError
from knockwood.host import clock
from knockwood.model import Lsn, Verdict
from knockwood.postgres.pages import (
    INCREMENTAL_HEAD_BYTES,
    PAGE_BYTES,
    RelationFile,
    bad_blocks,
    bad_pages,
    decode_header,
    incremental_head,
    relation_file,
)
from knockwood.repository.backups.model import BAD_PAGES_LISTED, BackupHealth, BadPage
from knockwood.repository.backups.tar import Member

_SUSPECTS_KEPT = 100_000
_TRIES = 5
_RUN = 128
_NO_LSN = Lsn(0)
_CUT = "the file ends in the middle of a page"

ReadAgain = Callable[[str, int, int], bytes | None]
"""(path on the server, first byte, bytes) -> what is there now; None if the file is gone."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A page that failed. `block` counts within the fork; -1: an incremental file that cannot be read."""

    file: str
    block: int
    reason: str
    lsn: Lsn = _NO_LSN


@dataclass(frozen=True, slots=True)
class Piece:
    """Some pages of one file, and their block numbers within the fork."""

    relation: RelationFile
    start: int
    blocks: NDArray[np.int64]


class FileCheck:
    """Cuts one relation file's content, met in order, into pieces that can be checked in any order."""

    def __init__(self, check: PageCheck, member: Member, relation: RelationFile) -> None:
        self._check = check
        self._relation = relation
        self._size = member.size
        self._incremental: NDArray[np.int64] | None = None
        self._header_bytes = 0

    def piece(self, content: memoryview, offset: int) -> Piece | None:
        """The pages in `content`, which lies at `offset` (a multiple of the page size) of the file."""
        start = 0
        if self._relation.incremental and offset == 0 and not self._read_incremental_header(content):
            return None
        if self._relation.incremental:
            if self._incremental is None:
                return None
            start = max(0, self._header_bytes - offset)
        count = (len(content) - start) // PAGE_BYTES
        if (len(content) - start) % PAGE_BYTES and offset + len(content) == self._size:
            block = (
                -1 if self._relation.incremental else self._relation.first_block + self._size // PAGE_BYTES
            )
            self._check.suspect(self._relation.path, block, _CUT)
        if count <= 0:
            return None
        first = (offset + start - self._header_bytes) // PAGE_BYTES
        if self._incremental is None:
            blocks = np.arange(first, first + count, dtype=np.int64) + self._relation.first_block
        else:
            blocks = self._incremental[first : first + count]
        return Piece(self._relation, start, blocks[:count])

    def _read_incremental_header(self, content: memoryview) -> bool:
        head = incremental_head(content)
        if head is not None and head.bytes <= len(content):
            numbers = np.frombuffer(content, "<u4", head.blocks, INCREMENTAL_HEAD_BYTES).astype(np.int64)
            self._incremental = numbers + self._relation.first_block
            self._header_bytes = head.bytes + (-head.bytes % PAGE_BYTES if head.blocks else 0)
            return bool(head.blocks)
        self._check.suspect(self._relation.path, -1, "not a valid header of an incremental file")
        return False


class PageCheck:
    """Collects what fails. `check` may be called from several threads.

    With `checksums` False only page headers are looked at, and health is not checked.
    """

    def __init__(self, checksums: bool, *, block_bytes: int = PAGE_BYTES) -> None:
        self._enabled = block_bytes == PAGE_BYTES
        self._checksums = checksums and self._enabled
        self._reason_off = (
            "the cluster has no data checksums"
            if self._enabled
            else f"pages have {block_bytes} bytes, not 8192"
        )
        self._lock = threading.Lock()
        self._suspects: list[Suspect] = []
        self._overflow = 0
        self.pages = 0

    def open(self, member: Member) -> FileCheck | None:
        """The check of a member's content, or None if it holds no pages."""
        relation = relation_file(member.path) if self._enabled and member.kind == "file" else None
        return FileCheck(self, member, relation) if relation is not None else None

    def check(self, piece: Piece, content: memoryview) -> None:
        """Verify the pages of a piece; `content` is what the piece was made from."""
        count = len(piece.blocks)
        pages = content[piece.start : piece.start + count * PAGE_BYTES]
        found = bad_blocks(pages, piece.blocks, self._checksums)
        with self._lock:
            self.pages += count
        for block, reason in found:
            at = int(np.flatnonzero(piece.blocks == block)[0]) * PAGE_BYTES
            self.suspect(piece.relation.path, block, reason, decode_header(pages[at : at + 24]).lsn)

    def suspect(self, file: str, block: int, reason: str, lsn: Lsn = _NO_LSN) -> None:
        with self._lock:
            if len(self._suspects) < _SUSPECTS_KEPT:
                self._suspects.append(Suspect(file, block, reason, lsn))
            else:
                self._overflow += 1

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        return tuple(sorted(self._suspects, key=lambda s: (s.file, s.block)))

    def merge(self, suspects: Iterable[Suspect], overflow: int, pages: int) -> None:
        """Add what another process found."""
        for one in suspects:
            self.suspect(one.file, one.block, one.reason, one.lsn)
        self._overflow += overflow
        self.pages += pages

    @property
    def overflow(self) -> int:
        """Failing pages beyond those kept."""
        return self._overflow

    def health(self, started: Lsn, stopped: Lsn, read_again: ReadAgain) -> BackupHealth:
        """The verdict, once the backup has ended: each failing page is read again from the server.

        A page that the server was writing while it was read looks bad and is not: it is whole on
        disk now with an LSN past the backup's start, so the WAL of the backup mends our copy. Where
        the role may not read files, a page whose LSN says that it was written meanwhile is let pass.
        """
        bad = [
            page
            for group in _runs(self.suspects)
            for page in self._judge(group, started, stopped, read_again)
        ]
        count = len(bad) + self._overflow
        if count:
            reason = f"{count} damaged pages" if count > 1 else "one damaged page"
            return BackupHealth(Verdict.BROKEN, tuple(bad[:BAD_PAGES_LISTED]), count, reason)
        if not self._checksums:
            return BackupHealth(Verdict.NOT_CHECKED, reason=self._reason_off)
        return BackupHealth(Verdict.HELD, reason=f"{self.pages} pages verified")

    def _judge(
        self, group: list[Suspect], started: Lsn, stopped: Lsn, read_again: ReadAgain
    ) -> Iterator[BadPage]:
        relation = relation_file(group[0].file)
        assert relation is not None
        if group[0].block < 0:
            yield from (BadPage(one.file, relation.first_block, one.reason) for one in group)
            return
        pending = {one.block: one.reason for one in group}
        for attempt in range(_TRIES):
            first = min(pending)
            offset = (first - relation.first_block) * PAGE_BYTES
            length = (max(pending) - first + 1) * PAGE_BYTES
            try:
                data = read_again(relation.server_path, offset, length)
            except KnockwoodError as error:
                yield from _unread(group, started, stopped, error)
                return
            pending = self._still_bad(relation, pending, data, first, started)
            if not pending:
                return
            if attempt + 1 < _TRIES:
                clock.sleep(0.02 * (attempt + 1))
        yield from (BadPage(group[0].file, block, reason) for block, reason in sorted(pending.items()))

    def _still_bad(
        self,
        relation: RelationFile,
        pending: dict[int, str],
        data: bytes | None,
        first: int,
        start_lsn: Lsn,
    ) -> dict[int, str]:
        # The free space and visibility maps change without a new LSN, and PostgreSQL takes a torn page
        # of them for an empty one: a copy of theirs that was only torn is harmless.
        a_map = relation.fork in ("fsm", "vm")
        still = {}
        for block, reason in pending.items():
            at = (block - first) * PAGE_BYTES
            page = data[at : at + PAGE_BYTES] if data is not None else b""
            if not page:
                continue  # dropped or truncated since: the WAL does the same to our copy
            if len(page) < PAGE_BYTES:
                still[block] = _CUT
                continue
            found = bad_pages(page, block, self._checksums)
            if found:
                still[block] = found[0][1]
            elif not a_map and any(page) and decode_header(page).lsn < start_lsn:
                # Nobody wrote the page during the backup, so the WAL will not mend the copy.
                still[block] = f"{reason}; whole on the server's disk, so the copy in the backup is bad"
        return still


def _unread(group: list[Suspect], started: Lsn, stopped: Lsn, error: KnockwoodError) -> Iterator[BadPage]:
    for one in group:
        if isinstance(error, MissingPrivilegeError) and started <= one.lsn <= stopped:
            continue
        yield BadPage(one.file, one.block, f"{one.reason}; could not be read again: {error.what}")


def _runs(suspects: Iterable[Suspect]) -> Iterator[list[Suspect]]:
    """Group neighbours of one file, so that a damaged stretch is read again at once."""
    group: list[Suspect] = []
    for one in suspects:
        last = group[-1] if group else None
        if last and (last.file != one.file or last.block < 0 or one.block - group[0].block >= _RUN):
            yield group
            group = []
        group.append(one)
    if group:
        yield group
