"""Running pg_waldump: its command line, its output in blocks of whole lines, where a record ends."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from knockwood.host import files, processes
from knockwood.host.privileges import Account
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs

PAGE_BYTES = 8192
SHORT_HEADER = 24
LONG_HEADER = 40
_BLOCK = 1 << 20
# Commit times are printed in the zone of TZ; messages are matched in English.
_ENVIRONMENT = {"TZ": "UTC", "LC_ALL": "C", "LANGUAGE": "C"}

RECORD = re.compile(
    rb"^rmgr: (\w+) +len \(rec/tot\): +\d+/ *(\d+), tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), prev [0-9A-F/]+,"
    rb" desc: ([^\n]*)",
    re.MULTILINE,
)
_STATISTICS = re.compile(rb"WAL statistics between [0-9A-F/]+ and ([0-9A-F]+/[0-9A-F]+)")


def parse_lsn(text: bytes) -> int:
    high, low = text.split(b"/")
    return int(high, 16) << 32 | int(low, 16)


def records(block: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    for rmgr, size, _, lsn, text in RECORD.findall(block):
        yield parse_lsn(lsn), int(size), rmgr, text


def record_end(start: Lsn, size: int, segment_bytes: int) -> Lsn:
    """Where the record after one of `size` bytes at `start` would begin, page headers not counted.

    Records are aligned to 8 bytes and interrupted by each page's header (40 bytes at a segment's first
    page, 24 elsewhere): xlog.c, `XLogBytePosToRecPtr`.
    """
    position, left = start.value, size
    while True:
        room = PAGE_BYTES - position % PAGE_BYTES
        if left <= room:
            position += left
            return Lsn(position + (-position % 8))
        left -= room
        position += room
        position += LONG_HEADER if position % segment_bytes == 0 else SHORT_HEADER


def _before_header(end: Lsn, segment_bytes: int) -> Lsn:
    """The same end, before the page's header where that is all that lies before it: pg_waldump reads the page up to
    there, and takes for a record what another page left behind it in its buffer."""
    size = LONG_HEADER if end.value % segment_bytes < PAGE_BYTES else SHORT_HEADER
    return Lsn(end.value - size) if end.value % PAGE_BYTES == size else end


def files_end(folder: Path, timeline: Timeline, start: Lsn, segment_bytes: int) -> Lsn:
    """The end of the segment files that follow each other from the one holding `start`; `start` if none."""
    segment = WalSegment.containing(timeline, start, segment_bytes)
    reached = start
    while (folder / segment.name).exists():
        reached = segment.end
        segment = segment.next()
    return reached


Ended = Callable[[], str | None]
"""Waits for the program; what it complained of, or None."""


@dataclass(frozen=True, slots=True)
class Reader:
    """pg_waldump on one folder and timeline."""

    programs: Programs
    folder: Path
    timeline: Timeline
    segment_bytes: int
    account: Account | None

    def command(self, options: Iterable[str], start: Lsn, end: Lsn) -> list[str | Path]:
        # Naming the segments makes the program read the segment size from the first: without names it
        # takes any file of the folder. The end has to lie in the last one named.
        end = _before_header(end, self.segment_bytes)
        last = WalSegment.containing(self.timeline, Lsn(end.value - 1), self.segment_bytes).name
        first = WalSegment.containing(self.timeline, start, self.segment_bytes).name
        words: list[str | Path] = [self.programs.path("pg_waldump"), "--path", self.folder, *options]
        return [*words, f"--timeline={self.timeline}", f"--start={start}", f"--end={end}", first, last]

    @contextmanager
    def _running(self, options: Iterable[str], start: Lsn, end: Lsn) -> Iterator[tuple[IO[bytes], Ended]]:
        child = processes.start(
            self.command(options, start, end),
            account=self.account,
            env=_ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdout is not None
        assert child.stderr is not None
        complaints = child.stderr

        def ended() -> str | None:
            complaint = complaints.read().decode(errors="replace").strip()
            status = child.wait()
            return None if status == 0 else complaint or f"pg_waldump ended with status {status}"

        try:
            yield child.stdout, ended
        finally:
            processes.stop(child, grace=0)
            child.stdout.close()
            child.stderr.close()

    def stream(
        self, options: Iterable[str], start: Lsn, end: Lsn, take: Callable[[bytes], None]
    ) -> str | None:
        """Hand the output over in blocks of whole lines; what the program complained of, or None."""
        with self._running(options, start, end) as (output, ended):
            for block in _whole_lines(output):
                take(block)
            return ended()

    def blocks(
        self, options: Iterable[str], start: Lsn, end: Lsn, complained: Callable[[str], None]
    ) -> Iterator[bytes]:
        """The same as an iterator; a complaint is handed over at the end."""
        with self._running(options, start, end) as (output, ended):
            yield from _whole_lines(output)
            complaint = ended()
        if complaint is not None:
            complained(complaint)

    def end_of(self, record: Lsn) -> Lsn:
        """Where the record that starts at `record` ends."""
        return self._end_of_last(record, files_end(self.folder, self.timeline, record, self.segment_bytes), 1)

    def end_after(self, record: Lsn, end: Lsn) -> Lsn:
        """The end of the last whole record before `end`, read from a valid record (or position) on."""
        found: list[Lsn] = []

        def take(block: bytes) -> None:
            if match := _STATISTICS.search(block):
                found.append(Lsn(parse_lsn(match[1])))

        self.stream(["--stats"], record, end, take)
        # Before version 15 the statistics do not say it.
        return found[0] if found else self._end_of_last(record, end, None)

    def _end_of_last(self, record: Lsn, end: Lsn, limit: int | None) -> Lsn:
        last: list[tuple[int, int, bytes, bytes]] = []

        def take(block: bytes) -> None:
            for entry in records(block):
                last[:] = [entry]

        self.stream([f"--limit={limit}"] if limit else [], record, end, take)
        if not last:
            return record
        position, size, rmgr, text = last[0]
        if rmgr == b"XLOG" and text.startswith(b"SWITCH"):  # the rest of the segment is padding
            return WalSegment.containing(self.timeline, Lsn(position), self.segment_bytes).end
        return record_end(Lsn(position), size, self.segment_bytes)

    def only_zeroes_after(self, position: Lsn) -> bool:
        """Whether nothing was ever written after `position`: zeroes to the end, and no further file."""
        segment = WalSegment.containing(self.timeline, position, self.segment_bytes)
        path = self.folder / segment.name
        if not path.exists() or (self.folder / segment.next().name).exists():
            return False
        offset = position.value - segment.start.value
        return all(chunk.count(0) == len(chunk) for chunk in files.read_chunks(path, start=offset))


def _whole_lines(stream: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while data := stream.read(_BLOCK):
        cut = data.rfind(b"\n") + 1
        if not cut:
            rest += data
            continue
        yield rest + data[:cut]
        rest = data[cut:]
    if rest:
        yield rest
