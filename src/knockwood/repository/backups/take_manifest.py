"""A backup_manifest as PostgreSQL writes it, for a backup whose files we copied ourselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from knockwood.model import WalRange


def manifest_entry(path: str, size: int, mtime: int, checksum: tuple[str, str] | None) -> str:
    """One file's line, without the comma. `checksum` is the algorithm's name and the value."""
    try:
        path.encode()
        named = f'"Path": {json.dumps(path, ensure_ascii=False)}'
    except UnicodeEncodeError:
        named = f'"Encoded-Path": "{path.encode("utf-8", "surrogateescape").hex()}"'
    moment = datetime.fromtimestamp(mtime, UTC).strftime("%Y-%m-%d %H:%M:%S GMT")
    line = f'{{ {named}, "Size": {size}, "Last-Modified": "{moment}"'
    if checksum is not None:
        line += f', "Checksum-Algorithm": "{checksum[0]}", "Checksum": "{checksum[1]}"'
    return line + " }"


def manifest(entries: Iterable[str], wal: WalRange, *, major: int, system_identifier: int) -> Iterator[bytes]:
    """The whole manifest in pieces: version 1 before PostgreSQL 17, from then on 2."""
    digest = hashlib.sha256()
    for text in _text(entries, wal, major, system_identifier):
        data = text.encode()
        digest.update(data)
        yield data
    yield f'"Manifest-Checksum": "{digest.hexdigest()}"}}\n'.encode()


def _text(entries: Iterable[str], wal: WalRange, major: int, system_identifier: int) -> Iterator[str]:
    yield f'{{ "PostgreSQL-Backup-Manifest-Version": {2 if major >= 17 else 1},\n'
    if major >= 17:
        yield f'"System-Identifier": {system_identifier},\n'
    yield '"Files": ['
    separator = "\n"
    for entry in entries:
        yield separator + entry
        separator = ",\n"
    yield "\n],\n"
    yield '"WAL-Ranges": [\n'
    yield f'{{ "Timeline": {wal.timeline}, "Start-LSN": "{wal.start}", "End-LSN": "{wal.end}" }}\n],\n'
