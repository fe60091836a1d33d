"""WAL fetched ahead, in parallel, beside the data directory: what the plan needs, each file proven there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from knockwood.errors import ObjectMissingError, RefusedError
from knockwood.host import files, privileges, processes
from knockwood.host.privileges import Account
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.model import Progress

if TYPE_CHECKING:
    from knockwood.repository.targets import WalPiece
    from knockwood.repository.walk import Kept

Report = Callable[[Progress], None]

_CREATED = re.compile(r"lsn: ([0-9A-F]+/[0-9A-F]+),.*desc: CREATE (\d+) \"([^\"]+)\"")


@dataclass(slots=True)
class Spool:
    """A folder of WAL files for `restore_command`. Remembers what each came from, to renew partial ones."""

    folder: Path
    account: Account | None = None
    sources: dict[str, str | None] = field(default_factory=dict)

    def missing(self, pieces: Iterable[WalPiece]) -> list[WalPiece]:
        """The pieces that are not here yet, or here from another object than the one wanted now."""
        return [
            piece
            for piece in pieces
            if self.sources.get(piece.segment.name, "none") != (piece.partial_name or "")
        ]

    def arriving(
        self,
        archive: WalArchive,
        pieces: Iterable[WalPiece],
        *,
        workers: int = 4,
        progress: Report | None = None,
    ) -> Generator[WalSegment, None, None]:
        """Fetch what is missing, and give each segment, in the pieces' order, once it is here.

        Raises ObjectMissingError or ObjectDamagedError if a piece is not whole.
        """
        wanted = list(pieces)
        missing = self.missing(wanted)
        with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="wal") as pool:
            jobs = {piece.segment: pool.submit(self._fetch_one, archive, piece) for piece in missing}
            try:
                done = 0
                for piece in wanted:
                    if piece.segment in jobs:
                        jobs[piece.segment].result()
                        done += 1
                        if progress is not None:
                            size = archive.segment_bytes
                            progress(Progress(done * size, len(missing) * size, "WAL"))
                    self.verify([piece])
                    yield piece.segment
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _fetch_one(self, archive: WalArchive, piece: WalPiece) -> None:
        path = self.folder / piece.segment.name
        path.unlink(missing_ok=True)
        if piece.partial_name is None:
            # Not durable: who restores flushes what is left of it with the rest, a clone nothing.
            archive.fetch(piece.segment, path, durable=False)
        else:
            archive.fetch_partial(piece.partial_name, path, durable=False)
        privileges.give(path, self.account)
        self.sources[piece.segment.name] = piece.partial_name or ""

    def adopt(self, kept: Kept, pieces: Iterable[WalPiece]) -> None:
        """Take over what the plan needs of WAL that was read already, on the same disk; the rest goes."""
        wanted = {piece.segment.name: piece.partial_name or "" for piece in pieces}
        with files.translated(kept.folder):
            for name, source in kept.sources.items():
                path = kept.folder / name
                if wanted.get(name) == source:
                    path.chmod(0o600)
                    privileges.give(path, self.account)
                    path.replace(self.folder / name)
                    self.sources[name] = source
        files.remove_tree(kept.folder)

    def fetch_histories(self, archive: WalArchive, timelines: Iterable[Timeline]) -> None:
        """Fetch timeline histories; the first timeline has none."""
        for timeline in timelines:
            path = self.folder / f"{timeline:08X}.history"
            if timeline > 1 and not path.exists():
                files.replace(path, archive.history_text(timeline).encode("utf-8", "surrogateescape"))
                privileges.give(path, self.account)

    def verify(self, pieces: Iterable[WalPiece]) -> None:
        """Raise ObjectMissingError unless each piece lies here in full size.

        To PostgreSQL a missing file is the end of the archive: that must never be ours to say.
        """
        for piece in pieces:
            path = self.folder / piece.segment.name
            if not path.is_file() or path.stat().st_size != piece.segment.bytes:
                raise ObjectMissingError("a WAL segment that the plan needs is not here", where=str(path))


def runs(segments: Iterable[WalSegment]) -> Iterator[tuple[WalSegment, WalSegment]]:
    """First and last segment of each stretch without a hole on one timeline."""
    first = last = None
    for segment in sorted(segments):
        if last is not None and segment == last.next():
            last = segment
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = segment
    if first is not None and last is not None:
        yield first, last


def refuse_new_tablespaces(
    programs: Programs, folder: Path, segments: Iterable[WalSegment], start: Lsn, end: Lsn
) -> None:
    """Raise RefusedError if the WAL in `folder`, from `start` up to `end`, creates a tablespace at a path.

    Replay would use that very path: on the machine of the live server it would write over the live
    tablespace, on another it fails. Tablespaces within the data directory have no path and are fine.
    """
    for first, last in runs(segments):
        low, high = max(first.start, start), min(last.end, end)
        if low >= high:
            continue
        command: list[str | Path] = [programs.path("pg_waldump"), "--rmgr=Tablespace", "-p", folder]
        command += ["-t", str(first.timeline), "-s", str(low), "-e", str(high)]
        # It fails at the end of the WAL or at damage; recovery ends there too.
        out = processes.run(command, env={"LC_ALL": "C", "PATH": os.environ.get("PATH", "")}, check=False).out
        match = _CREATED.search(out)
        if match is not None:
            raise new_tablespace(int(match[2]), match[1], match[3])


def new_tablespace(oid: int, lsn: str, path: str) -> RefusedError:
    """Why WAL that makes a tablespace at a path is not replayed."""
    return RefusedError(
        f"tablespace {oid} was created after the backup (at {lsn}), in {path};"
        " replay would write there, over the live one if this is its machine",
        where=path,
        hint="restore from a backup taken after that, or to a point before it",
    )
