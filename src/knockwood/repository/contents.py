"""The files inside a backup's packs against the checksums in PostgreSQL's manifest.

CRC-32C is computed for many lanes of the data at once with numpy and the lanes are folded together
(the operator that appends zeros, as in zlib's crc32_combine); its polynomial is Castagnoli's, reflected.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from knockwood.host.files import Chunk
from knockwood.repository.backups.tar import Member, read_tar

_POLYNOMIAL = 0x82F63B78
_ALL = 0xFFFF_FFFF
Words = npt.NDArray[np.uint32]


class _Digest(Protocol):
    def update(self, data: Chunk, /) -> None: ...

    def hexdigest(self) -> str: ...


def _table(bits: int) -> Words:
    """The remainder of each value of `bits` bits, shifted through."""
    values = np.arange(1 << bits, dtype=np.uint32)
    for _ in range(bits):
        values = np.where(values & 1, (values >> 1) ^ _POLYNOMIAL, values >> 1).astype(np.uint32)
    return values


@functools.cache
def _pairs() -> Words:
    return _table(16)


@functools.cache
def _shift(zeros: int) -> tuple[Words, ...]:
    """Tables for each byte of a remainder: what it becomes when `zeros` (a power of two) bytes follow."""
    if zeros == 1:
        columns = np.array([1 << bit for bit in range(32)], dtype=np.uint32)
        once = _table(8)[columns & 0xFF] ^ (columns >> 8)
    else:
        half = _shift(zeros // 2)
        columns = np.array([1 << bit for bit in range(32)], dtype=np.uint32)
        once = _apply(half, _apply(half, columns))
    tables = []
    for byte in range(4):
        table = np.zeros(256, dtype=np.uint32)
        for bit in range(8):
            table[(np.arange(256) >> bit & 1).astype(bool)] ^= once[byte * 8 + bit]
        tables.append(table)
    return tuple(tables)


def _apply(tables: tuple[Words, ...], values: Words) -> Words:
    first, second, third, fourth = tables
    low = first[values & 0xFF] ^ second[values >> 8 & 0xFF]
    result: Words = low ^ third[values >> 16 & 0xFF] ^ fourth[values >> 24]
    return result


def _appended(remainder: int, zeros: int) -> int:
    value = np.array([remainder], dtype=np.uint32)
    bit = 1
    while zeros:
        if zeros & 1:
            value = _apply(_shift(bit), value)
        zeros >>= 1
        bit <<= 1
    return int(value[0])


def _remainder(data: Chunk) -> int:
    """The remainder of the data from a zero start: zeros in front do not change it, so lanes are filled up."""
    size = len(data)
    width = 1 << max(1, size.bit_length() // 2 - 1)
    lanes = 1 << max(0, (-(-size // width) - 1).bit_length())
    padded = np.zeros(lanes * width, dtype=np.uint8)
    padded[lanes * width - size :] = np.frombuffer(data, dtype=np.uint8)
    columns = np.ascontiguousarray(padded.view("<u2").reshape(lanes, width // 2).T).astype(np.uint32)
    table = _pairs()
    state = np.zeros(lanes, dtype=np.uint32)
    for column in columns:
        state = table[(state ^ column) & 0xFFFF] ^ (state >> 16)
    while len(state) > 1:
        state = _apply(_shift(width), state[0::2]) ^ state[1::2]
        width *= 2
    return int(state[0])


class Crc32c:
    """CRC-32C of a stream; `hexdigest` as a manifest prints it (least significant byte first)."""

    def __init__(self) -> None:
        self._state = _ALL

    def update(self, data: Chunk, /) -> None:
        if len(data):
            self._state = _appended(self._state, len(data)) ^ _remainder(data)

    def hexdigest(self) -> str:
        return (self._state ^ _ALL).to_bytes(4, "little").hex()


def digest_of(algorithm: str) -> _Digest:
    """A running digest by the manifest's name of it; raises ValueError for one PostgreSQL has not."""
    if algorithm == "CRC32C":
        return Crc32c()
    if algorithm not in ("SHA224", "SHA256", "SHA384", "SHA512"):
        raise ValueError(f"not a checksum of a manifest: {algorithm}")
    digest: Any = hashlib.new(algorithm.lower())
    return digest  # type: ignore[no-any-return]


def altered(raw: Iterable[Chunk], stated: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The files of a raw tar archive that are not what the manifest says, with what is wrong.

    `stated` holds algorithm and checksum by path; files without one are passed over.
    """
    path, digest = "", None
    for entry in read_tar(raw, terminated=True):
        if isinstance(entry, Member):
            yield from _judged(path, digest, stated)
            path, digest = entry.path, None
            if entry.kind == "file" and path in stated:
                digest = digest_of(stated[path][0])
        elif digest is not None:
            digest.update(entry)
    yield from _judged(path, digest, stated)


def _judged(
    path: str, digest: _Digest | None, stated: Mapping[str, tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    if digest is not None and digest.hexdigest() != stated[path][1]:
        yield path, f"{path} is not what the server sent ({stated[path][0]} in the manifest)"
