"""COPY between servers."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Full, Queue
from typing import Final

from knockwood.postgres.connection import Connection

_BATCH_BYTES: Final = 256 * 1024
_AHEAD: Final = 16
"""Batches that are read before they are written."""
_LOOK_SECONDS: Final = 0.1


def copy_rows(source: Connection, live: Connection, read_from: str, write_to: str, columns: str) -> None:
    """Copy rows from one server to another as they are stored; both are at work at once.

    Where either fails nothing arrives: the COPY into `write_to` ends with that error.
    """
    read = f"copy (select {columns} from {read_from}) to stdout (format binary)".encode()
    write = f"copy {write_to} ({columns}) from stdin (format binary)".encode()
    batches: Queue[bytes | None] = Queue(_AHEAD)
    unwanted = threading.Event()

    def put(batch: bytes | None) -> None:
        while not unwanted.is_set():
            with suppress(Full):
                batches.put(batch, timeout=_LOOK_SECONDS)
                return

    def fetch() -> None:
        try:
            with source.cursor().copy(read) as rows:
                for batch in _batched(rows):
                    put(batch)
                    if unwanted.is_set():
                        return
        finally:
            put(None)

    with ThreadPoolExecutor(1, thread_name_prefix="copy") as pool, live.cursor().copy(write) as sink:
        fetching = pool.submit(fetch)
        try:
            while (batch := batches.get()) is not None:
                sink.write(batch)
            fetching.result()
        finally:
            unwanted.set()


def _batched(rows: Iterable[bytes | bytearray | memoryview]) -> Iterator[bytes]:
    """The bytes of a COPY, many rows at once: what the driver costs is by call, and it reads row by row."""
    held = bytearray()
    for row in rows:
        held += row
        if len(held) >= _BATCH_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)
