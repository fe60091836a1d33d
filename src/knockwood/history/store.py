"""The objects of the index in a repository, one set per segment of the archive.

`history/index/v1/<timeline>/<16 digits>/<segment>.<start LSN>` with `.blocks`, `.transactions` and `.head`,
stored in this order: the head makes the rest count (`packs` keeps copies of many heads together). They are
derived from the WAL and may be deleted at any time. Names tell where the index starts: made before its
predecessor was there, it lacks the record that crosses into the segment, and is replaced by one that starts
earlier.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from knockwood.errors import ObjectDamagedError, ObjectExistsError
from knockwood.history.columns import Column, pack, unpack
from knockwood.history.summary import BLOCK_DELTAS, KIND_BITS, TRANSACTION_DELTAS, SegmentSummary
from knockwood.model.wal import WalSegment
from knockwood.postgres.walendings import Ending, File
from knockwood.repository.repository import Repository
from knockwood.repository.walk import Piece

ROOT: Final = "history/index/"
FOLDER: Final = f"{ROOT}v1/"
PACKS: Final = f"{FOLDER}heads/"
FORMAT: Final = 1
_PARTS: Final = ("head", "transactions", "blocks")


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """What a segment holds of an xid that does not end in it. Changes are by file and kind."""

    xid: int
    first: int
    bytes: int
    changes: tuple[tuple[File, int, int], ...] = ()
    created: tuple[File, ...] = ()
    gid: str | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The short part of a segment's index. LSNs are absolute; `whole` tells that nothing at its beginning
    was left out. `xids` and `times` are the least and greatest of its commits, None without any; `most` is the most
    bytes of WAL that one transaction which is committed in it has in it.
    """

    segment: WalSegment
    source: str
    source_bytes: int
    start: int
    end: int
    major: int | None
    records: int
    commits: int
    xids: tuple[int, int] | None
    times: tuple[int, int] | None
    relations: tuple[File, ...]
    changed: frozenset[File]
    opened: tuple[OpenTransaction, ...]
    messages: tuple[dict[str, Any], ...]
    most: int
    highest_xid: int | None = None
    next_xid: int | None = None

    @property
    def whole(self) -> bool:
        return self.start <= self.segment.start.value

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "segment": self.segment.name,
            "source": self.source,
            "source_bytes": self.source_bytes,
            "start": self.start,
            "end": self.end,
            "major": self.major,
            "records": self.records,
            "commits": self.commits,
            "xids": self.xids,
            "times": self.times,
            "relations": self.relations,
            "changed": sorted(self.changed),
            "open": [
                [one.xid, one.first, one.bytes, one.changes, one.created, one.gid, one.label]
                for one in self.opened
            ],
            "messages": self.messages,
            "most": self.most,
            "highest_xid": self.highest_xid,
            "next_xid": self.next_xid,
        }

    @classmethod
    def from_json(cls, value: Any, segment_bytes: int) -> Head:
        """Raises ObjectDamagedError for what is no head of this format."""
        try:
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']}")
            return cls(
                segment=WalSegment.parse(value["segment"], segment_bytes),
                source=value["source"],
                source_bytes=int(value["source_bytes"]),
                start=int(value["start"]),
                end=int(value["end"]),
                major=value["major"],
                records=int(value["records"]),
                commits=int(value["commits"]),
                xids=_pair(value["xids"]),
                times=_pair(value["times"]),
                relations=tuple(_file(one) for one in value["relations"]),
                changed=frozenset(_file(one) for one in value["changed"]),
                opened=tuple(_opened(one) for one in value["open"]),
                messages=tuple(value["messages"]),
                most=int(value["most"]),
                highest_xid=value["highest_xid"],
                next_xid=value["next_xid"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ObjectDamagedError(f"not a head of the index: {error}") from error


@dataclass(frozen=True, slots=True)
class Transactions:
    """The columns of SegmentSummary.transactions, and what few transactions have."""

    columns: Mapping[str, Column]
    details: Mapping[int, Ending] = field(default_factory=dict)
    prepared: Mapping[int, str] = field(default_factory=dict)
    created: tuple[tuple[int, File], ...] = ()


def make_head(summary: SegmentSummary, piece: Piece, source_bytes: int) -> Head:
    """The head of a segment's index."""
    columns = summary.transactions
    commits = columns["end_commit"] == 1
    xids, times = columns["end_xid"][commits], columns["end_time"][commits]
    subs = columns["sub_xid"]
    all_xids = np.concatenate((xids, subs))
    changed = np.unique(columns["change_what"] >> KIND_BITS)
    known = columns["xact_xid"]
    return Head(
        segment=piece.segment,
        source=piece.object,
        source_bytes=source_bytes,
        start=summary.start,
        end=summary.end,
        major=summary.major,
        records=summary.records,
        commits=int(commits.sum()),
        xids=(int(all_xids.min()), int(all_xids.max())) if len(xids) else None,
        times=(int(times.min()), int(times.max())) if len(times) else None,
        relations=summary.relations,
        changed=frozenset(
            [
                *(summary.relations[int(row)] for row in changed),
                *(file for detail in summary.details.values() for file in detail.dropped),
                *(file for _, file in summary.created),
            ]
        ),
        opened=tuple(_open_ones(summary)),
        messages=summary.messages,
        most=int(bytes_of(columns)[commits].max(initial=0)),
        highest_xid=int(known.max()) if len(known) else None,
        next_xid=summary.next_xid,
    )


def bytes_of(columns: Mapping[str, Column]) -> Column:
    """The bytes of WAL that a segment has of each transaction that ends in it, its subtransactions included."""
    known = columns["xact_xid"]
    sums = np.zeros(len(columns["end_xid"]), np.int64)
    if len(known):
        xids = np.concatenate((columns["end_xid"], columns["sub_xid"]))
        rows = np.concatenate((np.arange(len(sums)), columns["sub_row"]))
        place = np.minimum(np.searchsorted(known, xids), len(known) - 1)
        np.add.at(sums, rows, np.where(known[place] == xids, columns["xact_bytes"][place], 0))
    return sums


def _open_ones(summary: SegmentSummary) -> Iterator[OpenTransaction]:
    columns = summary.transactions
    ended = np.concatenate((columns["end_xid"], columns["sub_xid"]))
    labels = labels_of(summary.messages)
    rows = np.flatnonzero(~np.isin(columns["xact_xid"], ended))
    for row in rows.tolist():
        xid = int(columns["xact_xid"][row])
        low, high = np.searchsorted(columns["change_xid"], [xid, xid + 1])
        what, count = columns["change_what"][low:high], columns["change_count"][low:high]
        changes = tuple(
            (summary.relations[w >> KIND_BITS], w & ((1 << KIND_BITS) - 1), n)
            for w, n in zip(what.tolist(), count.tolist(), strict=True)
        )
        yield OpenTransaction(
            xid=xid,
            first=int(columns["xact_first"][row]),
            bytes=int(columns["xact_bytes"][row]),
            changes=changes,
            created=tuple(file for owner, file in summary.created if owner == xid),
            gid=summary.prepared.get(xid),
            label=labels.get(xid),
        )


def labels_of(messages: tuple[dict[str, Any], ...]) -> dict[int, str]:
    """What transactional messages call their transactions: our own text, else the prefix of another's."""
    found: dict[int, str] = {}
    for message in messages:
        xid = message["xid"]
        if xid and message["text"] is not None:
            found[xid] = message["text"]
        elif xid:
            found.setdefault(xid, message["prefix"])
    return found


def put(repository: Repository, summary: SegmentSummary, head: Head) -> None:
    """Store a segment's index; what another process stored meanwhile is the same."""
    name = object_name(head.segment, head.start)
    extra = {
        "details": {
            row: [one.xid, one.subxids, one.dropped, one.relations, one.catalogs, one.gid]
            for row, one in summary.details.items()
        },
        "prepared": summary.prepared,
        "created": summary.created,
    }
    contents = {
        "blocks": pack(summary.blocks, delta=BLOCK_DELTAS),
        "transactions": pack(summary.transactions, delta=TRANSACTION_DELTAS, extra=extra),
        "head": json.dumps(head.as_json()).encode(),
    }
    for part, content in contents.items():
        try:
            repository.put(f"{name}.{part}", [content])
        except ObjectExistsError:
            # Left by a killed run, or stored by another at this moment.
            continue


def object_name(segment: WalSegment, start: int) -> str:
    """The name of a segment's index objects, without part and suffix."""
    return f"{_folder(segment)}{segment.name}.{start:016X}"


def _folder(segment: WalSegment) -> str:
    return f"{FOLDER}{segment.name[:8]}/{segment.name[:16]}/"


def heads(repository: Repository, segments: Iterable[WalSegment] | None = None) -> dict[str, str]:
    """The full names of the heads stored, by the name of their segment; the one that starts first.

    Where only some `segments` matter, no others need be listed.
    """
    folders = [FOLDER] if segments is None else sorted({_folder(segment) for segment in segments})
    found: dict[str, str] = {}
    for info in (info for folder in folders for info in repository.storage.list(folder)):
        name, _, rest = info.name.rpartition("/")[2].partition(".")
        if ".head." in rest:
            # Ordered by name, and so by start.
            found.setdefault(name, info.name)
    return found


def read_head(repository: Repository, name: str) -> Head:
    """Read a head by its full name. Raises ObjectDamagedError, ObjectMissingError, WrongKeyError."""
    try:
        value = json.loads(b"".join(repository.read(name)))
    except ValueError as error:
        raise ObjectDamagedError("not a head of the index", where=name) from error
    return Head.from_json(value, repository.header.segment_bytes)


def read_transactions(repository: Repository, head_name: str) -> Transactions:
    """The transactions of a segment's index, by the full name of its head."""
    name = head_name.replace(".head.", ".transactions.")
    columns, extra = unpack(b"".join(repository.read(name)))
    try:
        return transactions_from(columns, extra)
    except (KeyError, TypeError, ValueError) as error:
        raise ObjectDamagedError(f"not an index of transactions: {error}", where=name) from error


def transactions_from(columns: Mapping[str, Column], extra: Any) -> Transactions:
    details = {
        int(row): Ending(
            xid, tuple(subs), tuple(map(_file, dropped)), tuple((a, b) for a, b in rels), catalogs, gid
        )
        for row, (xid, subs, dropped, rels, catalogs, gid) in extra["details"].items()
    }
    prepared = {int(xid): gid for xid, gid in extra["prepared"].items()}
    return Transactions(
        columns, details, prepared, tuple((xid, _file(file)) for xid, file in extra["created"])
    )


def read_blocks(repository: Repository, head_name: str) -> dict[str, Column]:
    """The columns of SegmentSummary.blocks, by the full name of the head."""
    return unpack(b"".join(repository.read(head_name.replace(".head.", ".blocks."))))[0]


def delete(repository: Repository, segment_names: set[str] | None = None) -> int:
    """Delete the index of the segments named, or all of every format; how many objects went. Heads go first, packs
    with one of theirs before."""
    doomed = [
        info.name
        for info in repository.storage.list(ROOT)
        if segment_names is None or _tells_of(info.name, segment_names)
    ]
    for name in sorted(doomed, key=lambda name: (not name.startswith(PACKS), ".head." not in name)):
        repository.storage.delete(name)
    return len(doomed)


def _tells_of(name: str, segment_names: set[str]) -> bool:
    segment, _, rest = name.rpartition("/")[2].partition(".")
    if name.startswith(PACKS):
        first = rest.partition(".")[0]
        return any(first <= each <= segment for each in segment_names)
    return segment in segment_names


def _pair(value: Any) -> tuple[int, int] | None:
    return None if value is None else (int(value[0]), int(value[1]))


def _file(value: Any) -> File:
    tablespace, database, number = value
    return int(tablespace), int(database), int(number)


def _opened(value: Any) -> OpenTransaction:
    xid, first, size, changes, created, gid, label = value
    return OpenTransaction(
        int(xid), int(first), int(size),
        tuple((_file(file), int(kind), int(count)) for file, kind, count in changes),
        tuple(map(_file, created)), gid, label,
    )  # fmt: skip
