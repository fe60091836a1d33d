"""Some files of a backup without the rest: what bringing back one table, or one page, costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from knockwood.errors import KnockwoodError, ObjectDamagedError, ObjectMissingError, RefusedError
from knockwood.host import files
from knockwood.host.privileges import Account
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES, relation_file
from knockwood.repository import codec
from knockwood.repository.backups.extract import Extractor, Layout, create
from knockwood.repository.backups.listing import (
    MemberIndex,
    StoredMember,
    StoredPack,
    read_index,
    read_object,
)
from knockwood.repository.backups.model import Backup
from knockwood.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class PartialFetch:
    """What a partial fetch cost and brought. Sizes in bytes; `read` is of stored bytes (compressed)."""

    files: tuple[str, ...]
    written: int
    read: int


def fetch_relations(
    repository: Repository,
    backup: Backup,
    paths: Iterable[str],
    into: Path,
    *,
    account: Account | None = None,
    workers: int = 2,
) -> PartialFetch:
    """Write every fork and segment of the given relations below `into`, under their own paths.

    `paths` are main fork paths as the relation map has them (`base/5/16384`). Raises
    ObjectMissingError for one that the backup does not hold, and RefusedError for an incremental
    backup, which holds only changed blocks.
    """
    wanted = frozenset(paths)
    found: set[str] = set()

    def belongs(member: StoredMember) -> bool:
        relation = relation_file(member.path) if member.kind == "file" else None
        if relation is None:
            return False
        main = f"{member.path.rsplit('/', 1)[0]}/{relation.node}"
        if main in wanted:
            found.add(main)
        return main in wanted

    index = read_index(repository, backup, tuple(sorted(wanted)))
    chosen = [member for member in index.members.values() if belongs(member)]
    if missing := wanted - found:
        raise ObjectMissingError(
            f"the backup holds no files of {', '.join(sorted(missing))}",
            where=backup.id,
            hint="was the relation made or rewritten after the backup? then the WAL holds all of it",
        )
    return _fetch(repository, backup, index, chosen, into, account, workers)


def fetch_members(
    repository: Repository,
    backup: Backup,
    wanted: Callable[[StoredMember], bool],
    into: Path,
    *,
    account: Account | None = None,
    workers: int = 2,
) -> PartialFetch:
    """Write the members that `wanted` chooses (files and folders) below `into`, under their own paths.

    Tablespaces come as folders below `pg_tblspc`. What is there already is never overwritten.
    """
    index = read_index(repository, backup)
    chosen = [member for member in index.members.values() if wanted(member)]
    return _fetch(repository, backup, index, chosen, into, account, workers)


def read_block(repository: Repository, backup: Backup, path: str, block: int) -> bytes:
    """One page of a relation's fork (`path` as for its first segment, `block` counted within the fork).

    Raises ObjectMissingError where the backup has no such block.
    """
    _refuse_incremental(backup)
    segment, within = divmod(block, SEGMENT_PAGES)
    name = f"{path}.{segment}" if segment else path
    index = read_index(repository, backup, (name,))
    member = index.members.get(name)
    if member is None or (within + 1) * PAGE_BYTES > member.size:
        raise ObjectMissingError(f"the backup holds no block {block} of {path}", where=backup.id)
    stored = index.packs[member.pack]
    start = member.offset + within * PAGE_BYTES
    return b"".join(_Reader(repository, backup, stored).read([(start, PAGE_BYTES)]))


def _refuse_incremental(backup: Backup) -> None:
    if backup.kind != "full":
        raise RefusedError(
            "an incremental backup holds only the blocks that changed",
            where=backup.id,
            hint="fetch from the full backup of its chain; the WAL brings the rest",
        )


def _fetch(
    repository: Repository,
    backup: Backup,
    index: MemberIndex,
    chosen: Collection[StoredMember],
    into: Path,
    account: Account | None,
    workers: int,
) -> PartialFetch:
    _refuse_incremental(backup)
    total = sum(member.size for member in chosen)
    files.require_space(into, total, "fetching these files")
    layout = Layout(into, {space.oid: into / "pg_tblspc" / str(space.oid) for space in backup.tablespaces})
    extractor = Extractor(layout, account=account, hold_control_file=False)
    by_pack: dict[int, list[StoredMember]] = {}
    with files.translated(into):
        files.make_folder(into)
        for member in chosen:
            if member.kind == "folder":
                extractor.folder(layout.place(member.path))
            elif member.kind == "file":
                by_pack.setdefault(member.pack, []).append(member)
        for members in by_pack.values():
            members.sort(key=lambda member: member.offset)
        readers = [(_Reader(repository, backup, index.packs[number]), number) for number in by_pack]
        with ThreadPoolExecutor(workers) as pool:
            jobs = [
                pool.submit(_write, reader, by_pack[number], extractor, account) for reader, number in readers
            ]
            for job in jobs:
                job.result()
    names = tuple(sorted(member.path for member in chosen if member.kind == "file"))
    return PartialFetch(names, total, sum(reader.stored_bytes for reader, _ in readers))


def _write(
    reader: _Reader, members: list[StoredMember], extractor: Extractor, account: Account | None
) -> None:
    pieces = reader.read([(member.offset, member.size) for member in members])
    rest = b""
    for member in members:
        target = extractor.layout.place(member.path)
        extractor.folder(target.parent)
        left = member.size
        with open(create(target, account), "wb") as file:
            while left:
                data = rest or next(pieces)
                rest = data[left:]
                file.write(data[:left])
                left -= min(left, len(data))


class _Reader:
    """Reads raw parts of one pack: only the frames that hold them, or all of an encrypted one."""

    def __init__(self, repository: Repository, backup: Backup, stored: StoredPack) -> None:
        self._repository = repository
        self._pack = next(pack for pack in backup.packs if pack.name == stored.name)
        self._stored = stored
        self.stored_bytes = 0

    def read(self, parts: list[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of the parts (raw offset, size; ascending) one after another."""
        parts = [part for part in parts if part[1]]
        if self._pack.name.endswith(codec.ENCRYPTED_SUFFIX):
            self.stored_bytes += self._pack.bytes
            # To the end, so that the object's sha256 is checked.
            yield from _cut_out(read_object(self._repository, self._pack), 0, parts)
            return
        for start, end, raw, group in self._groups(parts):
            self.stored_bytes += (end if end is not None else self._pack.bytes) - start
            chunks = self._repository.storage.read(self._pack.name, start, end)
            try:
                yield from _cut_out(codec.decode(chunks, encrypted=False), raw, group)
            except KnockwoodError as error:
                error.where = f"{self._repository.storage.url}/{self._pack.name}"
                raise

    def _groups(
        self, parts: list[tuple[int, int]]
    ) -> Iterator[tuple[int, int | None, int, list[tuple[int, int]]]]:
        # Parts in the same or neighbouring frames are read at once.
        group: list[tuple[int, int]] = []
        begin, raw = 0, 0
        until: int | None = 0
        for offset, size in parts:
            start, end, frame_raw = self._stored.frames_for(offset, size)
            if group and (until is None or start <= until):
                until = None if end is None or until is None else max(until, end)
            else:
                if group:
                    yield begin, until, raw, group
                begin, until, raw, group = start, end, frame_raw, []
            group.append((offset, size))
        if group:
            yield begin, until, raw, group


def _cut_out(chunks: Iterable[bytes], position: int, parts: list[tuple[int, int]]) -> Iterator[bytes]:
    """The given parts (offset, size > 0; ascending) of a stream from `position` on; reads it to its end."""
    waiting = iter(parts)
    part = next(waiting, None)
    for chunk in chunks:
        end = position + len(chunk)
        while part is not None and part[0] < end:
            offset, size = part
            data = chunk[offset - position : offset - position + size]
            if data:
                yield data
            part = (offset + len(data), size - len(data)) if len(data) < size else next(waiting, None)
        position = end
    if part is not None:
        raise ObjectDamagedError("a pack ends before a file that its index places there")
