"""Long stretches of WAL, window after window: nothing is lost at a border, and little lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_archive import archive_wal, new_archive
from fix_checks import SHOP, sql, subject_of
from knockwood.errors import ProgramFailedError
from knockwood.integrity.check import Subject
from knockwood.integrity.staged_wal import StagedWal, in_windows
from knockwood.model import Lsn
from knockwood.postgres.walreader import Reader, records

if TYPE_CHECKING:
    from fix_archive import Archived
    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer

MEGABYTE = 1 << 20


def position(server: LocalServer) -> Lsn:
    # A commit ends here: what is flushed may end inside a record.
    return Lsn.parse(sql(server, "select pg_logical_emit_message(true, 'test', '')::text"))


@pytest.fixture
def written(new_server: ServerFactory, tmp_path: Path) -> tuple[LocalServer, Archived, Lsn, Lsn]:
    """Some 12 MB of WAL in an archive with segments of 1 MB, some records of it longer than a segment."""
    server = new_server(18, segment_megabytes=1, wal_keep_size="200MB", max_wal_size="1GB")
    made = new_archive(server, tmp_path / "archive")
    since = position(server)
    sql(server, SHOP)
    for number in (1, 3):
        sql(
            server, "select pg_logical_emit_message(false, 'test', repeat('x', %s))", number * MEGABYTE + 5000
        )
        sql(server, "update shop set amount = amount + 1")
    sql(server, "select pg_switch_wal()")
    sql(server, "update shop set amount = amount + 1")
    until = position(server)
    sql(server, "select pg_switch_wal()")
    archive_wal(made)
    return server, made, since, until


def starts(subject: Subject, since: Lsn, until: Lsn, window_bytes: int) -> tuple[list[int], list[int]]:
    """Where records begin, as each window has them; and how many files each window had."""
    files: list[int] = []

    def read(wal: StagedWal) -> list[int]:
        files.append(len(list(wal.folder.iterdir())))
        seen: list[int] = []
        assert subject.programs is not None
        reader = Reader(subject.programs, wal.folder, wal.timeline, wal.segment_bytes, None)
        complaint = reader.stream(
            [], wal.start, wal.end, lambda block: seen.extend(one[0] for one in records(block))
        )
        assert complaint is None
        return seen

    found = [lsn for seen in in_windows(subject, since, until, read, window_bytes) for lsn in seen]
    return found, files


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("segments", [1, 2, 5])
def test_every_record_is_whole_in_a_window(
    written: tuple[LocalServer, Archived, Lsn, Lsn], segments: int, local: bool
) -> None:
    server, made, since, until = written
    subject = subject_of(server, local=local, repository=made.repository)
    whole, files = starts(subject, since, until, 1 << 30)
    assert len(files) == 1
    assert files[0] > 10
    seen, files = starts(subject, since, until, segments * MEGABYTE)
    assert sorted(set(seen)) == whole
    assert len(files) > 2
    # A record of 3 MB holds its window open; a switch of segments does not.
    assert max(files) <= segments + 6


def test_a_hole_is_no_end(written: tuple[LocalServer, Archived, Lsn, Lsn]) -> None:
    server, made, since, until = written
    subject = subject_of(server, local=False, repository=made.repository)
    beyond = Lsn(until.value + 10 * MEGABYTE)
    with pytest.raises(ProgramFailedError, match="there is"):
        starts(subject, since, beyond, 2 * MEGABYTE)


def test_nothing_is_read_of_nothing(written: tuple[LocalServer, Archived, Lsn, Lsn]) -> None:
    server, _, since, _ = written
    assert starts(subject_of(server), since, since, MEGABYTE) == ([], [])
