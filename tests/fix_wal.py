"""WAL as a server writes it, byte by byte, for tests that need its records in certain places."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from knockwood.model.wal import Timeline, WalSegment
from knockwood.postgres.walreader import PAGE_BYTES

SIZE = 1 << 16
"""Eight pages: not a size PostgreSQL allows, but nothing here depends on it."""

BASE = SIZE * 5
_MAGIC = 0xD118


def _reduced(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_REDUCED = [_reduced(byte) for byte in range(256)]


def crc(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ _REDUCED[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


@dataclass
class Writer:
    """Writes WAL as a server does, page header by page header."""

    wal: bytearray = field(default_factory=bytearray)
    previous: int = 0
    lsns: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        return BASE + len(self.wal)

    def _header(self, remaining: int) -> None:
        long = self.position % SIZE == 0
        info = (1 if remaining else 0) | (2 if long else 0)
        self.wal += struct.pack("<HHIQI4x", _MAGIC, info, 1, self.position, remaining)
        if long:
            self.wal += struct.pack("<QII", 77, SIZE, PAGE_BYTES)

    def record(self, payload: int, *, xid: int = 0, info: int = 0, manager: int = 10) -> int:
        """Append a record with so many bytes of main data; its LSN."""
        if self.position % PAGE_BYTES == 0:
            self._header(0)
        lsn = self.position
        if payload < 256:
            body = struct.pack("<BB", 255, payload) + bytes(payload) if payload else b""
        else:
            body = struct.pack("<BI", 254, payload) + bytes(payload)
        head = struct.pack("<IIQBB2x", 24 + len(body), xid, self.previous, info, manager)
        data = head + struct.pack("<I", crc(body + head)) + body
        self.previous = lsn
        self.lsns.append(lsn)
        data += bytes(-len(data) % 8)
        length = 24 + len(body)
        written = 0
        while written < len(data):
            if self.position % PAGE_BYTES == 0:
                self._header(max(length - written, 0))
            room = PAGE_BYTES - self.position % PAGE_BYTES
            self.wal += data[written : written + room]
            written += min(room, len(data) - written)
        return lsn

    def segments(self) -> list[tuple[WalSegment, np.ndarray]]:
        filled = self.wal + bytes(-len(self.wal) % SIZE)
        return [
            (
                WalSegment(Timeline(1), (BASE + begin) // SIZE, SIZE),
                np.frombuffer(bytes(filled[begin : begin + SIZE]), np.uint8),
            )
            for begin in range(0, len(filled), SIZE)
        ]
