"""The WAL records of some blocks: the same whether one process reads all of it or several a part each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from knockwood.errors import ProgramFailedError
from knockwood.host import privileges
from knockwood.model import Lsn, Timeline, WalSegment
from knockwood.postgres.connection import connect
from knockwood.recover import pages_wal
from knockwood.recover.pages_wal import block_records

if TYPE_CHECKING:
    from fix_server import ServerFactory

SIZE = 1 << 20
ONE = Timeline(1)
BLOCKS = range(400)


def test_read_in_parts_it_is_the_same_and_damage_in_any_part_is_told(
    new_server: ServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server(18, segment_megabytes=1, wal_keep_size="64MB", autovacuum="off")
    with connect(server.dsn()) as connection:
        connection.execute("create table t as select i, repeat('x', 100) v from generate_series(1, 6000) i")
        row = connection.execute(
            "select t.dattablespace::int, t.oid::int, pg_relation_filenode('t')::int,"
            " pg_current_wal_insert_lsn()::text from pg_database t where datname = 'postgres'"
        ).fetchone()
        assert row is not None
        node, start = (int(row[0]), int(row[1]), int(row[2])), Lsn.parse(row[3])
        for step in range(8):
            connection.execute(f"update t set v = repeat('{step}', 100 + {step})")
            connection.execute("checkpoint")
        row = connection.execute("select pg_current_wal_insert_lsn()::text, pg_switch_wal()::text").fetchone()
        assert row is not None
        end = Lsn.parse(row[0])
    folder = tmp_path / "wal"
    folder.mkdir()
    for path in (server.data_directory / "pg_wal").glob("0*"):
        shutil.copy(path, folder)
    privileges.give_tree(folder, None)

    def read(processes: int, since: Lsn = start) -> dict[int, list[pages_wal.BlockRecord]]:
        monkeypatch.setattr(pages_wal, "_PART_BYTES", SIZE)
        monkeypatch.setattr(pages_wal.os, "cpu_count", lambda: processes)
        return block_records(server.programs, folder, ONE, since, end, SIZE, node, BLOCKS)

    whole = read(1)
    assert sum(map(len, whole.values())) > 4000
    assert end - start > 6 * SIZE
    borders = range(start.value // SIZE + 1, end.value // SIZE)
    crossing = [r for some in whole.values() for r in some if r.lsn.value // SIZE != r.end.value // SIZE]
    assert len(crossing) > 5
    for count in (2, 5):
        assert read(count) == whole
    # From the first byte of a segment, and in the middle of one.
    assert read(4, Lsn(borders[0] * SIZE)) == read(1, Lsn(borders[0] * SIZE))
    for number in borders[::11]:
        path = folder / WalSegment(ONE, number, SIZE).name
        content = path.read_bytes()
        for offset in (9, 30_000, SIZE - 30_000):
            path.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
            with pytest.raises(ProgramFailedError, match="WAL cannot be read"):
                read(4)
        path.write_bytes(content)
    path.unlink()
    with pytest.raises(ProgramFailedError, match="is missing"):
        read(4)
