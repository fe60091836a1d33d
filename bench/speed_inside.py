"""The sections of the speed bench that call Knockwood's own functions: pages and fingerprints, one core each."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import psycopg

from knockwood.integrity.fingerprint import Blocks, totals_query
from knockwood.integrity.tables import open_pinned, tables_of
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES, bad_pages, relation_file
from measure import Series
from sandbox import must
from speed_sections import Section
from speed_site import Site

CHUNK = 4 << 20
GB = 1e9


def pages(site: Site) -> Section:
    """Page checksums of all relation files, from the page cache, by one thread."""
    files = _relation_files(site.source.server.data_directory)
    _read_all(files)  # into the cache
    wall, processor = [], []
    size = 0
    for _ in range(site.options.runs):
        begun, used = time.monotonic(), time.process_time()
        size = _check_all(files)
        wall.append(size / GB / (time.monotonic() - begun))
        processor.append(size / GB / (time.process_time() - used))
    by_core = Series(tuple(processor))
    rows = [
        ("GB per second of processor time, reading included", by_core.text()),
        ("GB/s by the clock", Series(tuple(wall)).text()),
    ]
    rows += _check_command(site, size)
    notes = (f"{size / GB:.2f} GB in {len(files)} files, {CHUNK >> 20} MiB at a time",)
    missed = (f"{by_core.median:.2f} GB/s a core, not 1.5",) if by_core.median < 1.5 else ()
    return Section("Page verification", ("pages", "median (least to most)"), tuple(rows), notes, missed)


def _check_command(site: Site, size: int) -> list[tuple[str, str]]:
    seconds = []
    for _ in range(site.options.runs):
        answer = json.loads(must(site.knockwood.run("check", "page_checksums", "--json")).out)
        seconds += [float(check["seconds"]) for check in answer["checks"]]
    return [("GB/s of `check page_checksums` online", Series(tuple(size / GB / s for s in seconds)).text())]


def _relation_files(data: Path) -> list[tuple[Path, int]]:
    """Each relation file and the block number that it begins with."""
    found = []
    for path in sorted([*data.glob("base/*/*"), *data.glob("global/*")]):
        file = relation_file(str(path.relative_to(data)))
        if file is not None and path.stat().st_size:
            found.append((path, file.segment * SEGMENT_PAGES))
    return found


def _read_all(files: list[tuple[Path, int]]) -> None:
    for path, _ in files:
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK):
                pass


def _check_all(files: list[tuple[Path, int]]) -> int:
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    size = 0
    for path, block in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(view):
                whole = count // PAGE_BYTES * PAGE_BYTES
                if bad := bad_pages(view[:whole], block, True):
                    raise RuntimeError(f"a healthy cluster has bad pages in {path.name}: {bad[:3]}")
                block += whole // PAGE_BYTES
                size += whole
    return size


def fingerprint(site: Site) -> Section:
    """The fingerprint of pgbench_accounts, by one connection, from the server's cache."""
    connection = open_pinned(site.dsn, None)
    try:
        [table] = [t for t in tables_of(connection, "postgres") if t.name.endswith("pgbench_accounts")]
        sql = totals_query(table.name, table.hashed, Blocks(0, None)).encode()
        count = _count(connection, sql)
        backend = psutil.Process(connection.info.backend_pid)
        by_clock, by_core = [], []
        for _ in range(site.options.runs):
            begun, used = time.monotonic(), sum(backend.cpu_times()[:2])
            if _count(connection, sql) != count:
                raise RuntimeError("the number of rows changed")
            by_clock.append(count / 1e6 / (time.monotonic() - begun))
            by_core.append(count / 1e6 / max(sum(backend.cpu_times()[:2]) - used, 0.01))
    finally:
        connection.close()
    series = Series(tuple(by_core))
    rows = (
        ("million rows per second of processor time", series.text()),
        ("million rows/s by the clock", Series(tuple(by_clock)).text()),
    )
    notes = (f"{count / 1e6:.1f} million rows of pgbench_accounts, one connection, no parallel workers",)
    missed = (f"{series.median:.2f} million rows/s a core, not 1.5",) if series.median < 1.5 else ()
    return Section("Whole-table fingerprint", ("fingerprint", "median (least to most)"), rows, notes, missed)


def _count(connection: psycopg.Connection, sql: bytes) -> int:
    row = connection.execute(sql).fetchone()
    if row is None:
        raise RuntimeError("no answer")
    return int(row[0])
