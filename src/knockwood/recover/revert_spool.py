"""Row changes in a file: what a plan's step reads when it runs, and what a repair keeps as evidence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Final

from knockwood.errors import HostError, ObjectExistsError
from knockwood.history.transaction import ColumnValue, RowChange, TableId
from knockwood.host import files
from knockwood.recover.plan.rows import Culprit

_FORMAT: Final = "knockwood rows 1"
_BATCH: Final = 1000


def encode(culprits: Iterable[Culprit]) -> bytes:
    """The transactions' changes as JSON lines: equal changes give equal bytes."""
    return b"".join(_chunks(culprits))


def _chunks(culprits: Iterable[Culprit]) -> Iterator[bytes]:
    """The same, many lines at once."""
    lines = _lines(culprits)
    while batch := list(islice(lines, _BATCH)):
        # Bytes that are no UTF-8 (postgres/bytetext.py) become JSON's own escapes.
        yield ("\n".join(batch) + "\n").encode("utf-8", "backslashreplace")


def _lines(culprits: Iterable[Culprit]) -> Iterator[str]:
    yield json.dumps({"format": _FORMAT})
    for culprit in culprits:
        yield json.dumps({"xid": culprit.xid, "changes": len(culprit.changes)})
        for change in culprit.changes:
            yield json.dumps(_change(change), ensure_ascii=False)


def decode(data: bytes) -> tuple[Culprit, ...]:
    """What `encode` wrote; raises HostError."""
    try:
        return tuple(_culprits(line.decode() for line in BytesIO(data) if line.strip()))
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise HostError("the file of row changes cannot be read", hint=str(error)) from error


def store(folder: Path, culprits: Iterable[Culprit]) -> tuple[Path, str]:
    """Keep the changes under their own SHA-256; returns the path and that."""
    chunks = list(_chunks(culprits))
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    sha256 = digest.hexdigest()
    path = folder / f"{sha256}.jsonl"
    try:
        files.write_new(path, chunks)
    except ObjectExistsError:
        pass  # the same changes, shown before
    return path, sha256


def load(path: Path, sha256: str) -> tuple[Culprit, ...]:
    """Read the changes back; raises HostError if they are gone or are not those that were stored."""
    with files.translated(path):
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise HostError(
            "the row changes kept are not those of the plan", where=str(path), hint="show the plan again"
        )
    return decode(data)


def _change(change: RowChange) -> dict[str, Any]:
    table = change.table
    return {
        "table": [table.database, table.schema, table.name],
        "kind": change.kind,
        "key": list(change.key),
        "before": _row(change.before),
        "after": _row(change.after),
    }


def _row(row: Mapping[str, ColumnValue] | None) -> dict[str, list[str | None]] | None:
    if row is None:
        return None
    return {
        name: [value.text, None if value.image is None else value.image.hex()] for name, value in row.items()
    }


def _culprits(lines: Iterator[str]) -> Iterator[Culprit]:
    head = json.loads(next(lines))
    if head.get("format") != _FORMAT:
        raise ValueError(f"its format is {head.get('format')!r}")
    for line in lines:
        entry = json.loads(line)
        changes = tuple(_parsed(json.loads(next(lines))) for _ in range(entry["changes"]))
        yield Culprit(entry["xid"], changes)


def _parsed(value: Mapping[str, Any]) -> RowChange:
    before, after = _cells(value["before"]), _cells(value["after"])
    if before and after:
        # Most columns of an update stay as they are: one value does for both.
        after = {name: before[name] if before.get(name) == cell else cell for name, cell in after.items()}
    row = before or after or {}
    return RowChange(
        TableId(*value["table"]), value["kind"], {name: row[name] for name in value["key"]}, before, after
    )


def _cells(row: Mapping[str, list[str | None]] | None) -> dict[str, ColumnValue] | None:
    if row is None:
        return None
    return {
        name: ColumnValue(text, None if image is None else bytes.fromhex(image))
        for name, (text, image) in row.items()
    }
