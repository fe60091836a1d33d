"""WAL read by pg_waldump on every version: commits, where valid WAL ends, what records touch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from knockwood.errors import ProgramFailedError
from knockwood.host import privileges
from knockwood.model import Lsn, Timeline
from knockwood.postgres.connection import connect
from knockwood.postgres.waldump import WalStop, commit_of, first_record, tells_tablespaces, walk
from knockwood.postgres.walreader import record_end
from knockwood.postgres.walrefs import block_references, relation_events

if TYPE_CHECKING:
    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer

SIZE = 1 << 20
ONE = Timeline(1)


def _lsn(server: LocalServer) -> Lsn:
    with connect(server.dsn()) as connection:
        row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    return Lsn.parse(row[0])


def test_wal_that_ends_behind_a_pages_header(
    new_server: ServerFactory, every_version: int, tmp_path: Path
) -> None:
    """As before a checkpoint right after a switch: there the next record would begin, and none is there yet."""
    server = new_server(every_version, segment_megabytes=1)
    folder = server.data_directory / "pg_wal"
    with connect(server.dsn()) as connection:
        connection.execute("create table t as select i from generate_series(1, 100) i")
        start = _lsn(server)
        connection.execute("insert into t select i from generate_series(1, 30000) i")
        connection.execute("select pg_switch_wal()")
        switched = _lsn(server)
        connection.execute("insert into t values (1)")
        connection.execute("select pg_switch_wal()")
    assert switched.value % SIZE == 40
    found = walk(server.programs, folder, ONE, start, switched, SIZE)
    assert (found.stop, len(found.commits)) == (WalStop.COMPLETE, 1)
    assert list(relation_events(server.programs, folder, ONE, start, switched, SIZE)) == []
    assert any(block_references(server.programs, folder, ONE, start, switched, SIZE))


def test_commits_of_every_kind_are_read(
    new_server: ServerFactory, every_version: int, tmp_path: Path
) -> None:
    server = new_server(every_version, segment_megabytes=1, max_prepared_transactions="2")
    with connect(server.dsn()) as connection:
        connection.execute("create table t (a int)")
        start = _lsn(server)
        number = "select pg_current_xact_id()::text::bigint"
        with connection.transaction():
            connection.execute("insert into t values (1)")
            plain = connection.execute(number).fetchone()
            connection.execute("savepoint s")
            child = connection.execute("insert into t values (2) returning xmin::text::bigint").fetchone()
        connection.execute("begin")
        connection.execute("insert into t values (3)")
        prepared = connection.execute(number).fetchone()
        connection.execute("prepare transaction 'two\nrmgr: lines'")
        connection.execute("commit prepared 'two\nrmgr: lines'")
        connection.execute("begin")
        connection.execute("insert into t values (4)")
        connection.execute("rollback")
        relation = connection.execute("select oid::int, relfilenode::int from pg_class where relname = 't'")
        oid = relation.fetchone()
        connection.execute("truncate t")
        end = _lsn(server)
        connection.execute("select pg_switch_wal()")
    assert plain is not None
    assert child is not None
    assert prepared is not None
    assert oid is not None
    folder = server.data_directory / "pg_wal"
    found = walk(server.programs, folder, ONE, start, end, SIZE, exact_end=True)
    assert found.stop is WalStop.COMPLETE
    assert [c.xid for c in found.commits][:2] == [plain[0], prepared[0]]
    assert len(found.commits) == 3
    assert found.end_lsn == end
    assert all(c.time.tzinfo is not None and start <= c.lsn < end for c in found.commits)
    assert commit_of(server.programs, folder, ONE, child[0], start, end, SIZE) == found.commits[0]
    assert commit_of(server.programs, folder, ONE, prepared[0], start, end, SIZE) == found.commits[1]
    assert commit_of(server.programs, folder, ONE, 4_000_000, start, end, SIZE) is None
    stretches = block_references(server.programs, folder, ONE, start, end, SIZE)
    references = [reference for stretch in stretches for reference in stretch]
    assert any((r.fork[2:], r.block, r.touch, r.image) == ((oid[1], "main"), 0, 0, -1) for r in references)
    assert all(r.following is None or r.lsn < r.following <= end.value for r in references)
    assert [r.lsn for r in references] == sorted(r.lsn for r in references)
    kinds = {event.kind for event in relation_events(server.programs, folder, ONE, start, end, SIZE)}
    assert {"create", "drop"} <= kinds


def test_zeroes_at_the_tail_are_not_damage_and_flipped_bytes_are(
    new_server: ServerFactory, every_version: int, tmp_path: Path
) -> None:
    server = new_server(every_version, segment_megabytes=1, wal_keep_size="100MB")
    with connect(server.dsn()) as connection:
        connection.execute("select pg_switch_wal()")
        start = Lsn(_lsn(server).value // SIZE * SIZE)
        connection.execute("create table big as select g, repeat('x', 200) from generate_series(1, 20000) g")
        connection.execute("select pg_switch_wal()")
        connection.execute("create table last (a int)")
        end = _lsn(server)
    server.stop("immediate")
    folder = tmp_path / "wal"
    folder.mkdir()
    first, last = start.value // SIZE, end.value // SIZE
    for number in range(first, last + 1):
        name = f"00000001{0:08X}{number:08X}"
        shutil.copy(server.data_directory / "pg_wal" / name, folder / name)
    tail = folder / f"00000001{0:08X}{last:08X}"
    os.truncate(tail, end.value - last * SIZE)
    os.truncate(tail, SIZE)
    found = walk(server.programs, folder, ONE, start, None, SIZE)
    assert found.stop is WalStop.ZEROES
    assert found.end_lsn <= end
    assert walk(server.programs, folder, ONE, start, end + 5 * SIZE, SIZE).sound
    middle = folder / f"00000001{0:08X}{first + 1:08X}"
    data = bytearray(middle.read_bytes())
    data[SIZE // 2 + 300] ^= 0xFF
    middle.write_bytes(data)
    broken = walk(server.programs, folder, ONE, start, None, SIZE)
    assert broken.stop is WalStop.DAMAGED
    assert broken.end_lsn.value // SIZE == first + 1
    assert broken.error
    again = first_record(server.programs, folder, ONE, broken.end_lsn + 8192, end, SIZE)
    assert again is not None
    assert again > broken.end_lsn
    with pytest.raises(ProgramFailedError, match="damaged at"):
        list(block_references(server.programs, folder, ONE, start, None, SIZE))
    middle.unlink()
    missing = walk(server.programs, folder, ONE, start, end, SIZE)
    assert missing.stop is WalStop.MISSING
    assert missing.error == f"segment {middle.name} is missing"
    assert walk(server.programs, folder, ONE, Lsn((first + 1) * SIZE), end, SIZE).stop is WalStop.MISSING


def test_a_records_end_counts_the_page_headers_in_between() -> None:
    assert record_end(Lsn(SIZE + 40), 34, SIZE) == Lsn(SIZE + 80)
    assert record_end(Lsn(SIZE + 8192 - 32), 34, SIZE) == Lsn(SIZE + 8192 + 32)
    assert record_end(Lsn(2 * SIZE - 32), 34, SIZE) == Lsn(2 * SIZE + 48)


def test_a_walk_tells_of_tablespaces_at_a_path(
    new_server: ServerFactory, every_version: int, shared_folder: Path
) -> None:
    server = new_server(every_version, segment_megabytes=1)
    place = server.data_directory.parent / "space"
    place.mkdir()
    privileges.give(place, server.account)
    with connect(server.dsn()) as connection:
        connection.execute("create table t (a int)")
        start = _lsn(server)
        if every_version >= 15:
            connection.execute("set allow_in_place_tablespaces = on")
            connection.execute("create tablespace inside location ''")
        before = _lsn(server)
        connection.execute(f"create tablespace space location '{place}'")
        connection.execute("drop tablespace space")
        end = _lsn(server)
        connection.execute("select pg_switch_wal()")
    told: list[Lsn] = []
    tells = tells_tablespaces(server.programs)
    done = walk(
        server.programs, server.data_directory / "pg_wal", ONE, start, end, SIZE,
        on_tablespace=told.append if tells else None,
    )  # fmt: skip
    assert done.sound
    assert len(done.commits) == (3 if every_version >= 15 else 2)
    assert tells == (every_version >= 15)
    assert len(told) == tells
    assert all(before <= lsn < end for lsn in told)
