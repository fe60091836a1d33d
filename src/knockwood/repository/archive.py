"""The WAL archive of a repository: whole segments, partial segments and timeline histories.

What goes in is checked against its first page header first: a segment of another cluster, of another
position or of another size is refused, so that no later restore has to find out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from knockwood.errors import (
    ObjectDamagedError,
    ObjectExistsError,
    ObjectMissingError,
    RepositoryError,
    WrongKeyError,
)
from knockwood.host import files
from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalSegment
from knockwood.repository import codec
from knockwood.repository.inventory import (
    ArchiveInventory,
    Partial,
    history_object,
    partial_object,
    segment_object,
)
from knockwood.repository.repository import Repository
from knockwood.repository.storage import ObjectInfo
from knockwood.repository.walfile import check_header

_REPLACEMENTS = 10
"""How often a partial segment may be replaced while it is being opened; a receiver stores one a second."""


@dataclass(frozen=True)
class WalArchive:
    """WAL objects in a repository. Objects are never overwritten; storing equal content again is no error."""

    repository: Repository
    _histories: dict[Timeline, TimelineHistory] = field(default_factory=dict, repr=False, compare=False)

    @property
    def segment_bytes(self) -> int:
        return self.repository.header.segment_bytes

    # --- in ---------------------------------------------------------------------------------------

    def put_segment(self, segment: WalSegment, path: Path) -> bool:
        """Store a whole segment, durable on return; False if it was there already with equal content.

        Raises ObjectExistsError if other content has that name, ObjectDamagedError or WrongSystemError
        if the file is not that segment.
        """
        with files.translated(path):
            size = path.stat().st_size
        if size != self.segment_bytes or segment.bytes != self.segment_bytes:
            raise ObjectDamagedError(
                f"{segment} has {size} bytes, segments of this cluster have {self.segment_bytes}",
                where=str(path),
            )
        check_header(segment, path, self.repository.header.system_identifier)
        return self._put(segment_object(segment), path, None)

    def put_partial(self, segment: WalSegment, path: Path, end: Lsn) -> bool:
        """Store the first bytes of a segment, up to `end`; False if they were there already."""
        if not segment.start < end <= segment.end:
            raise RepositoryError(f"{end} is not inside {segment}")
        check_header(segment, path, self.repository.header.system_identifier)
        return self._put(partial_object(segment, end), path, end - segment.start)

    def put_history(self, timeline: Timeline, text: str) -> bool:
        """Store a timeline's history; False if it was there already. ObjectDamagedError for no history."""
        try:
            history = TimelineHistory.parse(timeline, text)
        except ValueError as error:
            raise ObjectDamagedError(f"history of timeline {timeline}: {error}") from error
        if any(parent >= timeline for parent, _ in history.switches):
            raise ObjectDamagedError(
                f"the history of timeline {timeline} names a later timeline as its parent"
            )
        name = history_object(timeline)
        if self.repository.find(name) is None:
            try:
                # Never encrypted: it holds no row data, and a host without an identity must still
                # be able to tell what the archive covers.
                data = text.encode("utf-8", "surrogateescape")
                self.repository.storage.put_new(name + codec.suffix(()), codec.encode([data]))
                return True
            except ObjectExistsError:
                pass
        if self.history(timeline) != history:
            raise ObjectExistsError(
                f"timeline {timeline} is stored with another history",
                where=self.repository.storage.url,
                hint="two servers were promoted to the same timeline: give one a repository of its own",
            )
        return False

    def _put(self, name: str, path: Path, limit: int | None) -> bool:
        encrypted = bool(self.repository.recipients)
        blind = encrypted and not self.repository.identities
        mark = f"{_sums(name)}{_digest(path, limit)}.json" if encrypted else ""
        if mark and self.repository.storage.info(mark) is None:
            # A host without an identity cannot read back what it or another stored: the digest, stored
            # first, is how it knows the content again after a crash between storing and being believed.
            known = self.repository.find(name) is not None
            if not known:
                _ignore_existing(self.repository, mark, {"sha256": mark.rsplit(".", 2)[1]})
        if self.repository.find(name) is None:
            try:
                self.repository.put(name, files.read_chunks(path, end=limit))
                return True
            except ObjectExistsError:
                pass
        self._require_equal(name, path, limit, mark if blind else "")
        return False

    def _require_equal(self, name: str, path: Path, limit: int | None, mark: str) -> None:
        if mark:
            equal = self.repository.storage.info(mark) is not None
            if not equal and not any(True for _ in self.repository.storage.list(_sums(name))):
                raise WrongKeyError(
                    f"{name} is stored already, and without an identity it cannot be compared",
                    where=self.repository.storage.url,
                    hint="set identity_file on this host until the next run has compared it",
                )
        else:
            equal = _same(self.repository.read(self._stored(name)), files.read_chunks(path, end=limit))
        if not equal:
            raise ObjectExistsError(
                f"{name} is stored with other content",
                where=self.repository.storage.url,
                hint="do two servers archive into this repository, or was one restored or promoted twice?",
            )

    def drop_partials(self, segment: WalSegment, below: Lsn | None = None) -> int:
        """Delete the partials of a segment that a longer one (`below` its end) or the whole replaced.

        Returns how many. Only what is replaced by a stored object goes: without it nothing happens.
        """
        if below is None:
            safe = self.repository.find(segment_object(segment)) is not None
        else:
            safe = self.repository.find(partial_object(segment, below)) is not None
        if not safe:
            return 0
        dropped = 0
        for info in list(self.repository.storage.list("wal/partial/")):
            partial = Partial.parse(info.name, self.segment_bytes)
            if partial and partial.segment == segment and (below is None or partial.end < below):
                self.repository.storage.delete(info.name)
                dropped += 1
        return dropped

    # --- out --------------------------------------------------------------------------------------

    def listing(self) -> dict[str, ObjectInfo]:
        """Every object of the archive, by name.

        Partial segments are listed first: one that a receiver replaces meanwhile is then found as the
        whole segment or as the longer partial, so that a moving archive never shows a hole or an early end.
        """
        partials = {info.name: info for info in self.repository.storage.list("wal/partial/")}
        return partials | {info.name: info for info in self.repository.storage.list("wal/")}

    def inventory(self) -> ArchiveInventory:
        """What the archive lists now. Histories are read once per WalArchive; they never change.

        Raises ObjectDamagedError for a history that cannot be read.
        """
        return self.inventory_of(self.listing())

    def inventory_of(self, names: Iterable[str]) -> ArchiveInventory:
        """The inventory that a listing makes."""
        names = list(names)
        histories = {}
        for name in names:
            digits = name.removeprefix("wal/history/").split(".", 1)[0]
            if name.startswith("wal/history/") and len(digits) == 8:
                timeline = Timeline(int(digits, 16))
                histories[timeline] = self.history(timeline)
        return ArchiveInventory.of_names(self.segment_bytes, names, histories)

    def history(self, timeline: Timeline) -> TimelineHistory:
        """A timeline's ancestry; ObjectMissingError if it is not stored (timeline 1 needs none)."""
        if timeline not in self._histories:
            name = history_object(timeline)
            if timeline == 1 and self.repository.find(name) is None:
                return TimelineHistory(timeline)
            text = self.history_text(timeline)
            try:
                self._histories[timeline] = TimelineHistory.parse(timeline, text)
            except ValueError as error:
                raise ObjectDamagedError(str(error), where=name) from error
        return self._histories[timeline]

    def history_text(self, timeline: Timeline) -> str:
        """The history file as PostgreSQL wrote it. Raises ObjectMissingError, ObjectDamagedError."""
        data = b"".join(self.repository.read(self._stored(history_object(timeline))))
        return data.decode("utf-8", "surrogateescape")

    def fetch(self, segment: WalSegment, into: Path, *, durable: bool = True) -> None:
        """Write a whole segment to the file `into`, which appears only when it is complete and right.

        Raises ObjectMissingError, ObjectDamagedError (also for a wrong size or header), WrongKeyError.
        """
        name = self._stored(segment_object(segment))
        self._write(segment, into, self.repository.read(name), name, durable)

    def fetch_partial(self, name: str, into: Path, *, durable: bool = True) -> None:
        """Write a partial segment to `into`, followed by zeros up to the segment's size.

        Where it was replaced since it was listed, the same bytes come from what replaced it.
        """
        wanted = Partial.parse(name, self.segment_bytes)
        if wanted is None:
            raise ObjectMissingError("not the name of a partial segment", where=name)
        chunks = _padded(self.read_partial(wanted), wanted.segment.end - wanted.end)
        self._write(wanted.segment, into, chunks, wanted.name, durable)

    def read_partial(self, wanted: Partial) -> Iterator[bytes]:
        """The bytes of a partial segment; where it was replaced since it was listed, out of what replaced it.

        Raises ObjectMissingError, ObjectDamagedError, WrongKeyError.
        """
        replaced: ObjectMissingError | None = None
        for _ in range(_REPLACEMENTS):
            stored = self.repository.find(wanted.name) or self._longer(wanted)
            chunks = _first(self.repository.read(stored), wanted.end - wanted.segment.start, stored)
            try:
                first = next(chunks, b"")
            except ObjectMissingError as error:
                replaced = error  # a receiver was quicker: between the look and the read
                continue
            yield first
            yield from chunks
            return
        assert replaced is not None
        raise replaced

    def _longer(self, wanted: Partial) -> str:
        source = self.inventory().source(wanted.segment)
        if source == "segment":
            return self._stored(segment_object(wanted.segment))
        if isinstance(source, Partial) and source.end >= wanted.end:
            return self._stored(source.name)
        raise ObjectMissingError("not in the archive", where=wanted.name)

    def _write(
        self, segment: WalSegment, into: Path, chunks: Iterator[bytes], name: str, durable: bool
    ) -> None:
        work = into.with_name(f"{into.name}.knockwood")
        work.unlink(missing_ok=True)
        try:
            size = files.write_new(work, chunks) if durable else files.write_passing(work, chunks)
            if size != segment.bytes:
                raise ObjectDamagedError(
                    f"holds {size} bytes, segments of this cluster have {segment.bytes}", where=name
                )
            check_header(segment, work, self.repository.header.system_identifier)
            with files.translated(into):
                work.replace(into)
                if durable:
                    files.fsync_file(into.parent)
        finally:
            work.unlink(missing_ok=True)

    def _stored(self, name: str) -> str:
        stored = self.repository.find(name)
        if stored is None:
            raise ObjectMissingError(
                "not in the archive", where=name, hint="`knockwood verify` lists what can be restored"
            )
        return stored


def _sums(name: str) -> str:
    """What the names of an object's digests begin with."""
    return f"{name.replace('wal/', 'wal/sums/', 1)}."


def _digest(path: Path, limit: int | None) -> str:
    sha = hashlib.sha256()
    for chunk in files.read_chunks(path, end=limit):
        sha.update(chunk)
    return sha.hexdigest()


def _ignore_existing(repository: Repository, name: str, value: object) -> None:
    try:
        repository.put_json(name, value)
    except ObjectExistsError:
        pass


def _same(left: Iterator[bytes], right: Iterator[bytes]) -> bool:
    """Whether two streams hold the same bytes, however they are cut."""
    a = b = b""
    while True:
        a = a or next(left, b"")
        b = b or next(right, b"")
        if not a or not b:
            return not a and not b
        common = min(len(a), len(b))
        if a[:common] != b[:common]:
            return False
        a, b = a[common:], b[common:]


def _first(chunks: Iterator[bytes], count: int, name: str) -> Iterator[bytes]:
    left = count
    for chunk in chunks:
        yield chunk[:left]
        left -= min(left, len(chunk))
        # Read on to the end: the decoder checks the whole object's checksum there.
    if left:
        raise ObjectDamagedError(f"ends {left} bytes before it should", where=name)


def _padded(chunks: Iterator[bytes], padding: int) -> Iterator[bytes]:
    yield from chunks
    while padding > 0:
        size = min(padding, 1 << 20)
        yield bytes(size)
        padding -= size
