"""Some files of a backup without the rest: what bringing back one table, or one page, costs."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from knockwood.errors import KnockwoodError, ObjectDamagedError, ObjectMissingError, RefusedError
from knockwood.host import files
from knockwood.host.privileges import Account
from knockwood.postgres.pages import (
    INCREMENTAL_HEAD_BYTES,
    PAGE_BYTES,
    SEGMENT_PAGES,
    incremental_head,
    relation_file,
)
from knockwood.repository import codec
from knockwood.repository.backups.extract import Extractor, Layout
from knockwood.repository.backups.listing import (
    MemberIndex,
    StoredMember,
    StoredPack,
    read_index,
    read_object,
)
from knockwood.repository.backups.model import Backup
from knockwood.repository.backups.tar import Member
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


class Part:
    """Some files of a chain of backups (the full one first): none before `choose`.

    Of all but the last backup only relations' files and what names the backup are taken: PostgreSQL
    combines no others.
    """

    def __init__(self, repository: Repository, chain: Sequence[Backup]) -> None:
        self._repository = repository
        self._last = chain[-1].id
        self._links = [(backup, read_index(repository, backup)) for backup in chain]
        self._indexes = {backup.id: index for backup, index in self._links}
        self._chosen: dict[str, list[StoredMember]] = {}
        self.files = {
            id: frozenset(file.server_path for path in index.members if (file := relation_file(path)))
            for id, index in self._indexes.items()
        }
        """Per backup id the paths (as on the server) of all relation files in it, chosen or not."""
        self.read = 0
        """Stored bytes read so far (compressed)."""

    def choose(self, wanted: Callable[[str], bool]) -> None:
        """Choose by path as on the server (not `INCREMENTAL.`)."""
        for id, index in self._indexes.items():
            chosen = self._chosen[id] = []
            for path, member in index.members.items():
                file = relation_file(path)
                needed = file is not None or id == self._last or member.kind == "folder"
                if (needed or path in _IDENTITY) and wanted(file.server_path if file else path):
                    chosen.append(member)

    @property
    def raw_bytes(self) -> int:
        """The size of all chosen files, uncompressed."""
        return sum(member.size for chosen in self._chosen.values() for member in chosen)

    def blocks(self, path: str, blocks: Collection[int]) -> dict[int, bytes]:
        """Those of some blocks of a relation's main fork that the chain holds, chosen or not."""
        return _read_blocks(self._repository, self._links, path, blocks)

    def pages(self, path: str) -> int:
        """About how many pages the main fork at `path` has in the last backup: of an incremental one at least
        those that it holds."""
        index, total, segment = self._links[-1][1], 0, 0
        while True:
            name = segment_name(path, segment)
            folder, _, base = name.rpartition("/")
            whole = index.members.get(name)
            changed = index.members.get(f"{folder}/INCREMENTAL.{base}")
            if whole is not None:
                total = segment * SEGMENT_PAGES + whole.size // PAGE_BYTES
            elif changed is not None:
                numbers, length = _incremental_blocks(self._repository, *self._links[-1], changed)
                total = segment * SEGMENT_PAGES + max(length, *(number + 1 for number in numbers), 0)
            else:
                return total
            segment += 1

    def extract(self, backup: Backup, extractor: Extractor, workers: int) -> None:
        """Write the chosen files of one backup of the chain."""
        index, chosen = self._indexes[backup.id], self._chosen[backup.id]
        self.read += _extract(self._repository, backup, index, chosen, extractor, workers)


_IDENTITY = frozenset({"PG_VERSION", "global/pg_control", "backup_label"})


def read_block(
    repository: Repository, backup: Backup, path: str, block: int, older: Sequence[Backup] = ()
) -> bytes:
    """One page of a relation's fork; `read_blocks` for one that the backup must have.

    Raises ObjectMissingError where it has no such block.
    """
    found = read_blocks(repository, backup, path, [block], older)
    if block not in found:
        raise ObjectMissingError(f"the backup holds no block {block} of {path}", where=backup.id)
    return found[block]


def read_blocks(
    repository: Repository,
    backup: Backup,
    path: str,
    blocks: Collection[int],
    older: Sequence[Backup] = (),
) -> dict[int, bytes]:
    """Those of some pages of a relation's fork that a backup holds.

    `path` is that of the fork's first segment, blocks are counted within the fork. An incremental backup needs
    the `older` ones that it builds on, the full one first.
    """
    _refuse_incremental((*older, backup)[0])
    folder, _, name = path.rpartition("/")
    under = (path, f"{folder}/INCREMENTAL.{name}")
    chain = [(link, read_index(repository, link, under)) for link in (*older, backup)]
    return _read_blocks(repository, chain, path, blocks)


def _read_blocks(
    repository: Repository, chain: Sequence[tuple[Backup, MemberIndex]], path: str, blocks: Collection[int]
) -> dict[int, bytes]:
    """From the newest backup on, each block where it was written last."""
    found: dict[int, bytes] = {}
    wanted: dict[int, set[int]] = {}
    for block in blocks:
        wanted.setdefault(block // SEGMENT_PAGES, set()).add(block % SEGMENT_PAGES)
    for link, index in reversed(chain):
        places: dict[int, list[tuple[int, int]]] = {}
        for segment, left in wanted.items():
            for within, pack, offset in _places_in(
                repository, link, index, segment_name(path, segment), left
            ):
                places.setdefault(pack, []).append((offset, segment * SEGMENT_PAGES + within))
        for number, some in places.items():
            found |= _read_pages(repository, link, index.packs[number], sorted(some))
    return found


def segment_name(path: str, segment: int) -> str:
    """The file of a fork's segment, as PostgreSQL names it."""
    return f"{path}.{segment}" if segment else path


def _places_in(
    repository: Repository, link: Backup, index: MemberIndex, name: str, left: set[int]
) -> list[tuple[int, int, int]]:
    """Which of the blocks `left` of a segment this backup holds: block, pack, offset. They are taken out of
    `left`, and so are those that no older backup can have either."""
    if not left:
        return []
    whole = index.members.get(name)
    if whole is not None:
        held = [block for block in left if (block + 1) * PAGE_BYTES <= whole.size]
        left.clear()
        return [(block, whole.pack, whole.offset + block * PAGE_BYTES) for block in held]
    folder, _, base = name.rpartition("/")
    changed = index.members.get(f"{folder}/INCREMENTAL.{base}")
    if changed is None:
        left.clear()
        return []
    numbers, length = _incremental_blocks(repository, link, index, changed)
    # The pages are the end of the file, whatever the padding before them.
    first = changed.offset + changed.size - len(numbers) * PAGE_BYTES
    places = [
        (block, changed.pack, first + at * PAGE_BYTES) for at, block in enumerate(numbers) if block in left
    ]
    left.difference_update(numbers)
    # Blocks past this backup's length are gone, whatever earlier ones say.
    left.difference_update([block for block in left if block >= length])
    return places


def _read_pages(
    repository: Repository, backup: Backup, pack: StoredPack, places: list[tuple[int, int]]
) -> dict[int, bytes]:
    reader = _Reader(repository, backup, pack)
    data = b"".join(reader.read([(offset, PAGE_BYTES) for offset, _ in places]))
    if len(data) != PAGE_BYTES * len(places):
        raise ObjectDamagedError("the backup's pack ends too early", where=pack.name)
    return {block: data[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] for at, (_, block) in enumerate(places)}


def _refuse_incremental(backup: Backup) -> None:
    if backup.kind != "full":
        raise RefusedError(
            "an incremental backup holds only the blocks that changed",
            where=backup.id,
            hint="fetch from its whole chain, the full backup first",
        )


def _incremental_blocks(
    repository: Repository, backup: Backup, index: MemberIndex, member: StoredMember
) -> tuple[tuple[int, ...], int]:
    """The blocks in an incremental file, in the order of its pages, and the length in blocks that it states."""
    head = incremental_head(_read_part(repository, backup, index, member, 0, INCREMENTAL_HEAD_BYTES))
    if head is None or head.bytes > member.size:
        raise ObjectDamagedError("not an incremental file", where=member.path)
    listed = _read_part(repository, backup, index, member, INCREMENTAL_HEAD_BYTES, 4 * head.blocks)
    return struct.unpack(f"<{head.blocks}I", listed), head.length


def _read_part(
    repository: Repository, backup: Backup, index: MemberIndex, member: StoredMember, start: int, size: int
) -> bytes:
    reader = _Reader(repository, backup, index.packs[member.pack])
    return b"".join(reader.read([(member.offset + start, size)]))


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
    with files.translated(into):
        files.make_folder(into)
    extractor = Extractor(layout, account=account, hold_control_file=False)
    read = _extract(repository, backup, index, chosen, extractor, workers)
    names = tuple(sorted(member.path for member in chosen if member.kind == "file"))
    return PartialFetch(names, total, read)


def _extract(
    repository: Repository,
    backup: Backup,
    index: MemberIndex,
    chosen: Collection[StoredMember],
    extractor: Extractor,
    workers: int,
) -> int:
    """Write members; the stored bytes that were read."""
    by_pack: dict[int, list[StoredMember]] = {}
    with files.translated(extractor.layout.root):
        for member in chosen:
            if member.kind == "folder":
                extractor.folder(extractor.layout.place(member.path))
            elif member.kind == "file":
                by_pack.setdefault(member.pack, []).append(member)
        readers = []
        with ThreadPoolExecutor(workers) as pool:
            jobs = []
            for number, members in by_pack.items():
                members.sort(key=lambda member: member.offset)
                for some in _apart(members, index.packs[number]):
                    readers.append(_Reader(repository, backup, index.packs[number]))
                    jobs.append(pool.submit(_write, readers[-1], some, extractor))
            for job in jobs:
                job.result()
    return sum(reader.stored_bytes for reader in readers)


def _apart(members: list[StoredMember], stored: StoredPack) -> Iterator[list[StoredMember]]:
    """Members of a pack, in its order, cut where frames lie in between that none of them needs."""
    if stored.name.endswith(codec.ENCRYPTED_SUFFIX):
        yield members  # read as one object
        return
    some: list[StoredMember] = []
    until: int | None = 0
    for member in members:
        start, end, _ = stored.frames_for(member.offset, member.size)
        if some and until is not None and start > until:
            yield some
            some = []
        until = None if end is None or until is None else max(until, end)
        some.append(member)
    yield some


def _write(reader: _Reader, members: list[StoredMember], extractor: Extractor) -> None:
    pieces = reader.read([(member.offset, member.size) for member in members])
    rest = b""
    for member in members:
        handle = extractor.open(Member(member.path, member.size, member.mode))
        with open(handle if handle is not None else os.devnull, "wb") as file:
            left = member.size
            while left:
                data = rest or next(pieces)
                rest = data[left:]
                file.write(data[:left])
                extractor.wrote(min(left, len(data)), member.path)
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
