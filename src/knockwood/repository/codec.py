"""How content is stored: zstd with a content checksum, then age where there are recipients.

Both are the plain formats: `zstd -d` and `age -d` open what was stored when Knockwood is gone.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from knockwood.errors import ObjectDamagedError
from knockwood.host.files import Chunk
from knockwood.repository import age

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PLAIN_SUFFIX: Final = ".zst"
ENCRYPTED_SUFFIX: Final = ".zst.age"

_PIECE: Final = 1 << 20

_BLOCK: Final = 1 << 17
"""What zstd decodes at once: pieces of this size are a quarter cheaper than larger ones, which are put together."""


def suffix(recipients: Sequence[str]) -> str:
    """What is appended to the name of an object stored for these recipients."""
    return ENCRYPTED_SUFFIX if recipients else PLAIN_SUFFIX


def encode(
    chunks: Iterable[Chunk], recipients: Sequence[str] = (), *, level: int = 1, workers: int = 0
) -> Iterator[bytes]:
    """Compress a stream, and encrypt it to every recipient if there are any.

    `workers` is the number of further threads that compress (0: the caller's own). A few MB are
    held per worker, whatever the size of the content. Raises SettingsError for a bad recipient.
    """
    compressed = _compress(chunks, level, workers)
    return age.encrypt(compressed, recipients) if recipients else compressed


def decode(chunks: Iterable[Chunk], *, encrypted: bool, identities: Sequence[str] = ()) -> Iterator[bytes]:
    """The content of what `encode` wrote, in pieces of at most 128 KiB.

    Raises ObjectDamagedError where it was changed or cut short, and WrongKeyError. Both may come
    after pieces were handed out: only the normal end of the iterator says that all is there.
    """
    stored = (bytes(chunk) for chunk in chunks)
    return _decompress(age.decrypt(stored, identities) if encrypted else stored)


def _compress(chunks: Iterable[Chunk], level: int, workers: int) -> Iterator[bytes]:
    parameter = zstd.CompressionParameter
    options: dict[int, int] = {parameter.compression_level: level, parameter.checksum_flag: 1}
    if workers:
        options[parameter.nb_workers] = workers
    compressor = zstd.ZstdCompressor(options=options)
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), _PIECE):
            if data := compressor.compress(view[start : start + _PIECE]):
                yield data
    yield compressor.flush()


def _decompress(chunks: Iterable[bytes]) -> Iterator[bytes]:
    # Several frames in a row are one content to `zstd -d`, so they are to us.
    decompressor = zstd.ZstdDecompressor()
    whole = False
    try:
        for chunk in chunks:
            data = chunk
            while data or not decompressor.needs_input:
                piece = decompressor.decompress(data, _BLOCK)
                whole, data = decompressor.eof, b""
                if whole:
                    data = decompressor.unused_data
                    decompressor = zstd.ZstdDecompressor()
                if piece:
                    yield piece
    except zstd.ZstdError as error:
        raise ObjectDamagedError(f"not valid zstd: {error}".lower()) from error
    if not whole:
        raise ObjectDamagedError("compressed content is cut short")


class Counted:
    """An iterator that passes chunks on and keeps their `bytes` and `sha256` (hexadecimal) so far."""

    def __init__(self, chunks: Iterable[Chunk], *, digest: bool = True) -> None:
        self._chunks = iter(chunks)
        self._digest = hashlib.sha256() if digest else None
        self.bytes = 0

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = next(self._chunks)
        if self._digest is not None:
            self._digest.update(chunk)
        self.bytes += memoryview(chunk).nbytes
        return chunk

    @property
    def sha256(self) -> str:
        if self._digest is None:
            raise ValueError("made without a digest")
        return self._digest.hexdigest()
