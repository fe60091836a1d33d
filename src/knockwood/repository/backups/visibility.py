"""Visibility maps put together from incremental backups: emptied where they may say too much.

An incremental backup takes the pages that the WAL's summaries name. Until the minor releases that mend it, changes
to a table that clear bits of its visibility map do not name the map's page, so that the combined map may still
call pages visible to everybody, or frozen, that were changed since: index-only scans then return deleted rows, and
VACUUM passes over rows that it has to freeze. (pgsql-hackers, "Why clearing the VM doesn't require registering
vm buffer in wal record", March 2026; that a truncation may do the same is from October 2026.) Summaries made
before an update stay as they are, so the server's version alone says nothing. A map without bits is always right:
VACUUM sets them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from knockwood.postgres.pages import (
    INCREMENTAL_HEAD_BYTES,
    PAGE_BYTES,
    RelationFile,
    decode_header,
    incremental_head,
    relation_file,
    sealed,
)

_HEADER_BYTES = 24


@dataclass(frozen=True, slots=True)
class Tree:
    """A data directory with its tablespaces, by oid."""

    root: Path
    tablespaces: Mapping[int, Path]

    def files(self) -> Iterator[tuple[RelationFile, Path]]:
        """The files of relations."""
        tops = {"base": self.root / "base", "global": self.root / "global"}
        tops |= {f"pg_tblspc/{oid}": place for oid, place in self.tablespaces.items()}
        for name, top in tops.items():
            for folder, _, names in os.walk(top):
                for each in names:
                    path = Path(folder) / each
                    file = relation_file(f"{name}/{path.relative_to(top)}")
                    if file is not None:
                        yield file, path


@dataclass(slots=True)
class _Link:
    """What an incremental backup has of relations: of which the main fork may have `changed`, and whose map it
    has, and whether in parts (`maps`)."""

    there: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    maps: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: Tree) -> _Link:
        link = cls()
        for file, path in tree.files():
            relation = _relation(file)
            if file.fork == "vm":
                link.maps[relation] = file.incremental or link.maps.get(relation, False)
            elif file.fork == "main":
                link.there.add(relation)
                if not file.incremental or _has_blocks(path):
                    link.changed.add(relation)
        return link


def empty_doubtful(incrementals: Sequence[Tree], result: Tree) -> list[str]:
    """Clear the bits of the maps in `result` that may be older than their tables; their relations' paths.

    `incrementals` are the backups that were combined onto a full one, the oldest first, as they were unpacked.
    """
    links = [_Link.of(tree) for tree in incrementals]
    emptied = set()
    for file, path in result.files():
        if file.fork == "vm" and _doubtful(_relation(file), links):
            _clear(path, file.first_block)
            emptied.add(_relation(file))
    return sorted(emptied)


def _doubtful(relation: str, links: Sequence[_Link]) -> bool:
    for link in reversed(links):
        if not link.maps.get(relation, False):
            return False  # it came whole, or came into being later, whole
        if relation in link.changed or relation not in link.there:
            return True
    return False


def _relation(file: RelationFile) -> str:
    return f"{file.path.rpartition('/')[0]}/{file.node}"


def _has_blocks(path: Path) -> bool:
    """Whether an incremental file has any, or may have."""
    with path.open("rb") as file:
        head = incremental_head(file.read(INCREMENTAL_HEAD_BYTES))
    return head is None or head.blocks > 0


def _clear(path: Path, first: int) -> None:
    """Clear all bits and keep the pages' headers: to replay, a page that was never initialized is damage."""
    with path.open("r+b") as file:
        block = first
        while len(page := file.read(PAGE_BYTES)) == PAGE_BYTES:
            header = decode_header(page)
            if any(page) and header.flaw() is None:
                blank = page[:_HEADER_BYTES] + bytes(PAGE_BYTES - _HEADER_BYTES)
                file.seek(-PAGE_BYTES, os.SEEK_CUR)
                # Where pages have no checksums it is 0.
                file.write(sealed(blank, block) if header.checksum else blank)
            block += 1
