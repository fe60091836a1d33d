"""Every WAL record that names some blocks of one relation, and the page LSN inside each full-page image."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from knockwood.errors import ProgramFailedError
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.waldump import stopped
from knockwood.postgres.walimages import WalImages
from knockwood.postgres.walreader import (
    Reader,
    files_end,
    parse_lsn,
    record_end,
)
from knockwood.recover.plan.page_wal import BlockRecord

Node = tuple[int, int, int]
"""Tablespace, database, relation file number, as WAL names a relation."""

_LINE: Final = re.compile(
    rb"^rmgr: (\w+) +len \(rec/tot\): +\d+/ *(\d+), tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), prev [0-9A-F/]+,"
    rb" desc: ([^\s,]+)([^\n]*)",
    re.MULTILINE,
)
_REFERENCE: Final = re.compile(
    rb"blkref #(\d+): rel (\d+)/(\d+)/(\d+)(?: fork (\w+))? blk (\d+)((?: \(FPW[^)]*\)| FPW)?)"
)


def block_records(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    start: Lsn,
    end: Lsn,
    segment_bytes: int,
    node: Node,
    blocks: Collection[int],
    fork: str = "main",
) -> dict[int, list[BlockRecord]]:
    """The records in [start, end) that name the blocks, in order; each block asked for has its list.

    Raises ProgramFailedError where WAL is missing or damaged: then nothing is proven.
    """
    found: dict[int, list[BlockRecord]] = {block: [] for block in blocks}
    if end <= start or not blocks:
        return found
    available = files_end(folder, timeline, start, segment_bytes)
    if available < end:
        name = WalSegment.containing(timeline, available, segment_bytes).name
        raise ProgramFailedError(f"segment {name} is missing", where=str(folder))
    reader = Reader(programs, folder, timeline, segment_bytes, None)
    options = [f"--relation={'/'.join(map(str, node))}", f"--fork={fork}"]
    if len(blocks) == 1:
        options.append(f"--block={min(blocks)}")
    with WalImages(folder, timeline, segment_bytes) as images:
        complaint = reader.stream(options, start, end, _Taker(images, node, fork, found).take)
    if complaint is not None and not stopped(reader, complaint, start, start, ()).sound:
        raise ProgramFailedError(f"WAL cannot be read: {complaint.strip()}", where=str(folder))
    return found


class _Taker:
    def __init__(self, wal: WalImages, node: Node, fork: str, found: Mapping[int, list[BlockRecord]]) -> None:
        self._wal = wal
        self._node = tuple(str(part).encode() for part in node)
        self._fork = fork.encode()
        self._found = found

    def take(self, text: bytes) -> None:
        for rmgr, size, xid, lsn, kind, rest in _LINE.findall(text):
            for number, *node, fork, block, image in _REFERENCE.findall(rest):
                mine = tuple(node) == self._node and (fork or b"main") == self._fork
                records = self._found.get(int(block)) if mine else None
                if records is None:
                    continue
                start, total = Lsn(parse_lsn(lsn)), int(size)
                has_image = bool(image)
                # An update begins the page of the new version anew (reference 0), not that of the old one.
                done = kind if number == b"0" else kind.removesuffix(b"+INIT")
                inner = self._wal.image_lsn(start, int(number)) if has_image else None
                records.append(
                    BlockRecord(
                        start,
                        record_end(start, total, self._wal.segment_bytes),
                        f"{rmgr.decode()} {done.decode()}",
                        has_image,
                        inner,
                        int(xid),
                        int(number),
                    )
                )
