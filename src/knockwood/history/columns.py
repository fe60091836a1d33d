"""Columns of integers as bytes that describe themselves: a line of JSON, then each column's bytes.

A column is stored as the difference to its smallest value (or, `delta`, to the value before) in the
narrowest unsigned type that holds it; zstd then finds little left to do.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knockwood.errors import ObjectDamagedError

Column = NDArray[np.int64]

_TYPES = ("<u1", "<u2", "<u4", "<u8")


def pack(columns: Mapping[str, NDArray[Any]], *, delta: Collection[str] = (), extra: Any = None) -> bytes:
    """Encode columns, those named in `delta` by the difference to the value before, and a JSON value."""
    heads: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, values in columns.items():
        column = np.asarray(values, np.int64)
        step = name in delta
        if step and len(column):
            column = np.diff(column, prepend=column[:1])
        first = int(values[0]) if step and len(values) else 0
        low = int(column.min()) if len(column) else 0
        spread = int(column.max()) - low if len(column) else 0
        kind = next(t for t in _TYPES if spread < 1 << (8 * int(t[2])))
        data = (column - low).astype(kind).tobytes()
        heads.append(
            {"name": name, "type": kind, "count": len(column), "low": low, "delta": step, "first": first}
        )
        parts.append(data)
    return json.dumps({"columns": heads, "extra": extra}).encode() + b"\n" + b"".join(parts)


def unpack(data: bytes, only: Iterable[str] | None = None) -> tuple[dict[str, Column], Any]:
    """Decode what `pack` wrote, or `only` some columns, and the JSON value. Raises ObjectDamagedError."""
    wanted = set(only) if only is not None else None
    found: dict[str, Column] = {}
    try:
        line, _, _ = data.partition(b"\n")
        at = len(line) + 1
        described = json.loads(line)
        for head in described["columns"]:
            kind, count = np.dtype(head["type"]), int(head["count"])
            if wanted is None or head["name"] in wanted:
                values = np.frombuffer(data, kind, count, at).astype(np.int64)
                values += int(head["low"])
                if head["delta"] and count:
                    values[0] = int(head["first"])
                    np.cumsum(values, out=values)
                found[head["name"]] = values
            at += kind.itemsize * count
        if at != len(data):
            raise ValueError("bytes are left")
    except (ValueError, KeyError, TypeError) as error:
        raise ObjectDamagedError(f"the columns of an index cannot be read: {error}") from error
    return found, described["extra"]
