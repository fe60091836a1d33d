"""Heads of many segments in one object, so that an index is opened with few reads.

`history/index/v1/heads/<last segment>.<first segment>.<digest>`: copies of heads that are stored one by one as well. A
pack may be deleted at any time, and goes with its last segment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from knockwood.errors import KnockwoodError, ObjectDamagedError, ObjectExistsError, ObjectMissingError
from knockwood.history.store import PACKS, Head
from knockwood.repository.repository import Repository

FEWEST: Final = 64
"""So many heads that lie alone are worth a pack."""

_MOST: Final = 512


def read(repository: Repository) -> dict[str, tuple[str, Head]]:
    """By segment: the full name of the head's own object, and what it says. Damaged packs are passed over.

    Raises WrongKeyError, and what storage raises.
    """
    found: dict[str, tuple[str, Head]] = {}
    for info in repository.storage.list(PACKS):
        with suppress(ObjectDamagedError, ObjectMissingError):
            for name, head in _unpacked(repository, info.name):
                known = found.get(head.segment.name)
                if known is None or head.start < known[1].start:
                    found[head.segment.name] = (name, head)
    return found


def write(repository: Repository, heads: Mapping[str, Head]) -> None:
    """Pack the heads, given by the full names of their own objects, if they are many.

    A repository that cannot be written to can still be read: then nothing is done.
    """
    if len(heads) < FEWEST:
        return
    ordered = sorted(heads.items(), key=lambda entry: entry[1].segment.name)
    batches: list[list[tuple[str, Head]]] = []
    for entry in ordered:
        timeline = entry[1].segment.timeline
        if not batches or len(batches[-1]) == _MOST or batches[-1][0][1].segment.timeline != timeline:
            batches.append([])
        batches[-1].append(entry)
    for batch in batches:
        try:
            _put(repository, batch)
        except KnockwoodError:
            return


def _put(repository: Repository, batch: Sequence[tuple[str, Head]]) -> None:
    content = json.dumps([[name, head.as_json()] for name, head in batch]).encode()
    first, last = batch[0][1].segment.name, batch[-1][1].segment.name
    digest = hashlib.sha256(content).hexdigest()[:16]
    with suppress(ObjectExistsError):
        repository.put(f"{PACKS}{last}.{first}.{digest}", [content])


def _unpacked(repository: Repository, pack: str) -> list[tuple[str, Head]]:
    size = repository.header.segment_bytes
    try:
        entries = json.loads(b"".join(repository.read(pack)))
        return [(str(name), Head.from_json(value, size)) for name, value in entries]
    except (TypeError, ValueError) as error:
        raise ObjectDamagedError("not a pack of heads", where=pack) from error
