"""The names of a cluster's superusers, read from its files: a clone must be entered before SQL can tell."""

from __future__ import annotations

import struct
from pathlib import Path

_PAGE = 8192
_AUTHID = 1260
_NORMAL = 1


def superusers(data_directory: Path) -> list[str]:
    """Roles that are superusers and may log in, as pg_authid on disk names them; empty if unreadable."""
    try:
        content = (data_directory / "global" / str(_filenode(data_directory))).read_bytes()
    except OSError:
        return []
    names: list[str] = []
    for start in range(0, len(content) - _PAGE + 1, _PAGE):
        names += [name for name in _names(content[start : start + _PAGE]) if name not in names]
    return names


def _filenode(data_directory: Path) -> int:
    """pg_authid is a mapped relation: its file changes its name when it is rewritten."""
    content = (data_directory / "global" / "pg_filenode.map").read_bytes()
    (count,) = struct.unpack_from("=i", content, 4)
    pairs: dict[int, int] = dict(
        struct.unpack_from("=II", content, 8 + 8 * index) for index in range(min(count, 62))
    )
    return pairs.get(_AUTHID, _AUTHID)


def _names(page: bytes) -> list[str]:
    lower = struct.unpack_from("=H", page, 12)[0]
    names: list[str] = []
    for position in range(24, min(lower, _PAGE - 3), 4):
        (item,) = struct.unpack_from("=I", page, position)
        offset, flags, length = item & 0x7FFF, (item >> 15) & 3, item >> 17
        if flags != _NORMAL or offset + length > _PAGE or length < 100:
            continue
        row = page[offset + page[offset + 22] : offset + length]
        # oid, rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin
        if len(row) > 72 and row[68] == 1 and row[72] == 1:
            names.append(row[4:68].split(b"\0", 1)[0].decode("utf-8", "replace"))
    return names
