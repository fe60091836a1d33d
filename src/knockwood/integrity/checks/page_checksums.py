"""Page checksums and headers of every relation file, read online."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from knockwood.errors import HostError, PostgresError
from knockwood.host import clock
from knockwood.integrity.budget import pace
from knockwood.integrity.catalog import Names, stake
from knockwood.integrity.check import NotChecked, Outcome, Subject, Weight
from knockwood.integrity.relation_files import DataFiles, RelationFile, data_files, listing
from knockwood.model import Finding
from knockwood.postgres.connection import translated
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES, bad_pages, decode_header

_CHUNK: Final = 4 << 20
_PACE_BYTES: Final = 64 << 20
_REREADS: Final = 5
_REREAD_PAUSE: Final = 0.02
_UNREADABLE: Final = "the disk cannot read it"
_LISTED_SINGLY: Final = 200
"""Bad pages of one file that become a finding each; more than that become one finding that lists them."""


@dataclass(frozen=True, slots=True)
class _Suspect:
    file: RelationFile
    block: int  # within the fork
    reason: str

    @property
    def offset(self) -> int:
        return (self.block - self.file.segment * SEGMENT_PAGES) * PAGE_BYTES


class PageChecksums:
    """Reads each page as the server would and lists every one that it would not accept."""

    name = "page_checksums"
    title = "Page checksums and headers of all relation files"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        checksums = subject.facts.checksums
        with data_files(subject) as data:
            suspects = list(_scan(subject, data, checksums))
            bad, settled = _settle(subject, data, suspects, checksums)
            yield from _findings(subject, data, bad, settled)
        if not checksums:
            yield NotChecked(
                self.name, "data_checksums is off: only page headers were checked (see pg_checksums --enable)"
            )


def _scan(subject: Subject, data: DataFiles, checksums: bool) -> Iterator[_Suspect]:
    since_pace = 0
    for file in scannable(listing(data)):
        offset = 0
        while offset < file.bytes:
            chunk, unreadable = _read(data, file, offset, min(_CHUNK, file.bytes - offset))
            yield from unreadable
            whole = len(chunk) - len(chunk) % PAGE_BYTES
            if not whole:
                break
            first = file.segment * SEGMENT_PAGES + offset // PAGE_BYTES
            for block, reason in bad_pages(memoryview(chunk)[:whole], first, checksums):
                yield _Suspect(file, block, reason)
            offset += whole
            since_pace += whole
            if since_pace >= _PACE_BYTES:
                pace(subject)
                since_pace = 0


def scannable(files: list[RelationFile]) -> list[RelationFile]:
    """The files whose pages must hold. Those of unlogged relations, which have an init fork, are emptied
    after a crash; only the init fork is kept."""
    unlogged = {file.relation_path for file in files if file.fork == "init"}
    return [file for file in files if file.fork == "init" or file.relation_path not in unlogged]


def _read(
    data: DataFiles, file: RelationFile, offset: int, length: int
) -> tuple[bytes | bytearray, list[_Suspect]]:
    """The bytes, and the pages among them that the disk refuses to read (zeros in their place)."""
    try:
        return data.read(file.path, offset, length), []
    except HostError as error:
        if not _is_disk_error(error):
            raise
    whole = bytearray()
    refused: list[_Suspect] = []
    for start in range(offset, offset + length, PAGE_BYTES):
        try:
            page = data.read(file.path, start, PAGE_BYTES)
        except HostError as error:
            if not _is_disk_error(error):
                raise
            refused.append(_Suspect(file, file.segment * SEGMENT_PAGES + start // PAGE_BYTES, _UNREADABLE))
            page = bytes(PAGE_BYTES)
        whole += page
    return whole, refused


def _is_disk_error(error: HostError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO


def _settle(
    subject: Subject, data: DataFiles, suspects: list[_Suspect], checksums: bool
) -> tuple[list[_Suspect], bool]:
    """The suspects that stay bad, and whether a checkpoint lay between.

    A page may be read while the server writes it: half old, half new. That settles within a moment; what
    does not is read again after a checkpoint has written every changed page as a whole.
    """
    bad = suspects
    for _ in range(_REREADS):
        if not bad:
            return [], False
        clock.sleep(_REREAD_PAUSE)
        bad = [again for suspect in bad if (again := _again(data, suspect, checksums))]
    if not bad:
        return [], False
    settled = _checkpoint(subject)
    return [again for suspect in bad if (again := _again(data, suspect, checksums))], settled


def _again(data: DataFiles, suspect: _Suspect, checksums: bool) -> _Suspect | None:
    try:
        page = data.read(suspect.file.path, suspect.offset, PAGE_BYTES)
    except HostError as error:
        if not _is_disk_error(error):
            raise
        return _Suspect(suspect.file, suspect.block, _UNREADABLE)
    if len(page) < PAGE_BYTES:  # dropped or truncated in the meantime
        return None
    for block, reason in bad_pages(page, suspect.block, checksums):
        return _Suspect(suspect.file, block, reason)
    return None


def _checkpoint(subject: Subject) -> bool:
    try:
        with subject.connect() as connection, translated():
            connection.execute("checkpoint")
    except PostgresError:
        # Not allowed (needs pg_checkpoint, from 15), or the limit was reached: a longer wait instead.
        clock.sleep(1.0)
        return False
    return True


def _findings(subject: Subject, data: DataFiles, bad: list[_Suspect], settled: bool) -> Iterator[Finding]:
    names = Names(subject)
    by_file: dict[str, list[_Suspect]] = {}
    for suspect in bad:
        by_file.setdefault(suspect.file.path, []).append(suspect)
    for pages in by_file.values():
        file = pages[0].file
        relation = names.of(file)
        what = stake(relation, file.fork)
        many = len(pages) > _LISTED_SINGLY
        for page in pages[:1] if many else pages:
            place = names.location(file, None if many else page.block)
            subject_words = f"{len(pages)} pages are" if many else "the page is"
            evidence = {"fork": file.fork, "re_read_after_checkpoint": settled}
            if many:
                evidence |= {"blocks": [p.block for p in pages], "reasons": sorted({p.reason for p in pages})}
            else:
                evidence |= {"reason": page.reason} | _header(data, page)
            yield Finding(
                PageChecksums.name,
                what.severity,
                place,
                f"{subject_words} damaged on disk: {page.reason}",
                what.meaning,
                what.remedy,
                evidence,
            )


def _header(data: DataFiles, page: _Suspect) -> dict[str, str]:
    if page.reason == _UNREADABLE:
        return {}
    image = data.read(page.file.path, page.offset, PAGE_BYTES)
    return {"page_lsn": str(decode_header(image).lsn)} if len(image) == PAGE_BYTES else {}


CHECK = PageChecksums()
