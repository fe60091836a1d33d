"""The WAL that a stopped server has and the archive lacks: archived before the server's files are replaced."""

from __future__ import annotations

import os
from pathlib import Path

from knockwood.errors import WrongSystemError
from knockwood.host import files
from knockwood.model import Lsn, Timeline, WalRange, WalSegment
from knockwood.postgres.control_file import ControlFile, read_control_file
from knockwood.repository.archive import WalArchive
from knockwood.repository.inventory import ArchiveInventory
from knockwood.repository.repository import Repository
from knockwood.repository.walfile import valid_end


def salvage(repository: Repository, data: Path) -> Lsn | None:
    """Archive what `pg_wal` of a stopped server holds beyond the archive; up to where it reaches.

    So the last acknowledged commit is in the archive also when no receiver ran. May be called again. None
    where pg_wal holds nothing of the server's timeline. Raises WrongSystemError, ObjectExistsError when the
    archive holds other WAL of the same name.
    """
    control = read_control_file(data)
    if control.system_identifier != repository.header.system_identifier:
        raise WrongSystemError(
            f"the data directory is of cluster {control.system_identifier}, the repository of another",
            where=str(data),
        )
    archive = WalArchive(repository)
    stock = archive.inventory()
    _histories(archive, stock, data / "pg_wal", control)
    written = _written(data / "pg_wal", control.timeline, archive.segment_bytes)
    first = min(stock.segments.get(control.timeline, ()), default=0)
    for position, (segment, path, end) in enumerate(written):
        if segment.number < first:
            continue
        whole = position + 1 < len(written) or end == segment.end
        if stock.covers(WalRange(segment.timeline, segment.start, segment.end if whole else end)):
            continue
        if whole:
            archive.put_segment(segment, path)
            archive.drop_partials(segment)
        else:
            archive.put_partial(segment, path, end)
            archive.drop_partials(segment, below=end)
    return written[-1][2] if written else None


def _written(folder: Path, timeline: Timeline, segment_bytes: int) -> list[tuple[WalSegment, Path, Lsn]]:
    """The segments of the timeline that hold WAL, in order, with the end of it; recycled ones hold none."""
    found = []
    with files.translated(folder):
        names = sorted(name for name in os.listdir(folder) if len(name) == 24)
    for name in names:
        try:
            segment = WalSegment.parse(name, segment_bytes)
        except ValueError:
            continue
        if segment.timeline != timeline:
            continue
        end = valid_end(folder / name, segment)
        if end > segment.start:
            found.append((segment, folder / name, end))
    return found


def _histories(archive: WalArchive, stock: ArchiveInventory, folder: Path, control: ControlFile) -> None:
    path = folder / f"{control.timeline:08X}.history"
    if path.is_file() and control.timeline not in stock.histories:
        with files.translated(path):
            archive.put_history(control.timeline, path.read_text(errors="surrogateescape"))
