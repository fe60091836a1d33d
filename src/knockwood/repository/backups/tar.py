"""Plain tar as a stream: what a server sends, and what packs are made of."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from knockwood.errors import ObjectDamagedError, RefusedError
from knockwood.host.files import Chunk

BLOCK: Final = 512
TERMINATOR: Final = bytes(2 * BLOCK)

_KINDS: Final = {
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "link",
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
}
_TYPES: Final = {"folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "file": tarfile.REGTYPE}


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar: `path` is relative with `/`, `size` the bytes of a file's content."""

    path: str
    size: int = 0
    mode: int = 0o600
    mtime: int = 0
    kind: Literal["file", "folder", "link"] = "file"
    target: str = ""

    @property
    def padding(self) -> int:
        """Zeros between the content and the next header."""
        return -self.size % BLOCK

    def header(self) -> bytes:
        """The entry's header block; raises RefusedError for a path that plain tar cannot hold."""
        info = tarfile.TarInfo(self.path + ("/" if self.kind == "folder" else ""))
        info.size, info.mode, info.mtime = self.size, self.mode, self.mtime
        info.type, info.linkname = _TYPES[self.kind], self.target
        try:
            short = len(info.name.encode("utf-8", "surrogateescape")) <= 100
            # GNU's form for sizes of 8 GB and more, ustar's for the path: neither needs further blocks.
            block = info.tobuf(
                tarfile.GNU_FORMAT if short else tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"
            )
        except ValueError as error:
            raise RefusedError(
                f"the path does not fit into a tar archive: {error}", where=self.path
            ) from error
        if len(block) != BLOCK:
            raise RefusedError("the path does not fit into a tar archive", where=self.path)
        return block


def read_tar(chunks: Iterable[Chunk], *, terminated: bool = False) -> Iterator[Member | memoryview]:
    """Yield each member, and after a file the pieces of its content, as they come.

    Chunks may be cut anywhere. A server's archive ends without the usual two zero blocks; with
    `terminated` their absence, like every cut elsewhere, raises ObjectDamagedError.
    """
    header = bytearray()
    content = skip = 0
    ended = False
    for chunk in chunks:
        view = memoryview(chunk)
        position, size = 0, len(view)
        while position < size and not ended:
            if content:
                taken = min(content, size - position)
                yield view[position : position + taken]
                content -= taken
            elif skip:
                taken = min(skip, size - position)
                skip -= taken
            else:
                taken = min(BLOCK - len(header), size - position)
                header += view[position : position + taken]
                if len(header) == BLOCK:
                    member = parse_header(bytes(header))
                    header.clear()
                    if member is None:
                        ended = True
                    else:
                        yield member
                        content, skip = member.size, member.padding
            position += taken
    if content or skip or header or (terminated and not ended):
        raise ObjectDamagedError("a tar archive ends in the middle")


def parse_header(block: bytes) -> Member | None:
    """The member a header block describes, or None for the zero block that ends an archive."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if not any(block):
            return None
        raise ObjectDamagedError(f"not a tar header: {error}") from error
    kind: Any = _KINDS.get(info.type)
    if kind is None or info.size < 0:
        raise ObjectDamagedError(
            f"a tar entry of a kind that backups do not have: {info.type!r}", where=info.name
        )
    path = info.name.removeprefix("./").rstrip("/")
    size = info.size if kind == "file" else 0
    return Member(path, size, info.mode & 0o7777, int(info.mtime), kind, info.linkname)
