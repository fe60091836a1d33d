"""Where the page-LSN audit takes its WAL from, and what it says of WAL that it did not read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_archive import archive_wal, new_archive
from fix_checks import SHOP, check, found, path_of, silent, sql, subject_of
from fix_server import VERSIONS
from knockwood.drill import faults
from knockwood.errors import ProgramFailedError
from knockwood.integrity.staged_wal import StagedWal, WalRecycledError, with_wal
from knockwood.model import Lsn
from knockwood.postgres.pages import decode_header

if TYPE_CHECKING:
    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer

NAME = "lost_writes"
NEWEST_BY_DEFAULT = pytest.mark.parametrize(
    "every_version", [18, *(pytest.param(major, marks=pytest.mark.slow) for major in VERSIONS if major != 18)]
)


def shop(new_server: ServerFactory, major: int = 18) -> LocalServer:
    server = new_server(major, segment_megabytes=1, wal_keep_size="200MB", max_wal_size="1GB")
    sql(server, SHOP)
    return server


def make_stale(server: LocalServer) -> str:
    """Update a row of block 3 of the shop, and put the block back as it was before."""
    table = path_of(server, "shop")
    with faults.offline(server) as folder:
        old = faults.read_block(folder, table, 3)
    sql(server, "update shop set amount = amount + 1 where ctid in (select ctid from shop limit 400)")
    with faults.offline(server) as folder:
        faults.stale_block(folder, table, 3, old)
    return table


@NEWEST_BY_DEFAULT
def test_wal_of_a_repository_will_do(new_server: ServerFactory, every_version: int, tmp_path: Path) -> None:
    server = shop(new_server, every_version)
    made = new_archive(server, tmp_path / "archive")
    sql(server, "checkpoint; select pg_switch_wal()")
    archive_wal(made)
    silent(server, NAME, local=False, repository=made.repository)
    table = make_stale(server)
    sql(server, "select pg_switch_wal()")
    archive_wal(made)
    findings = found(server, NAME, local=False, repository=made.repository)
    assert {(f.location.file, f.location.block) for f in findings} == {(table, 3)}
    # The archive stops here: what is written from now on is not passed over in silence.
    sql(
        server, "update other set body = 'y'; select pg_switch_wal(); update other set body = 'z'; checkpoint"
    )
    report = check(server, NAME, local=False, repository=made.repository)
    assert [gap.reason for gap in report.not_checked if "not archived yet" in gap.reason]


@NEWEST_BY_DEFAULT
def test_after_a_promotion_the_new_timeline_is_read(new_server: ServerFactory, every_version: int) -> None:
    server = shop(new_server, every_version)
    server.stop()
    (server.data_directory / "standby.signal").touch()
    server.start(until="standby")
    sql(server, "select pg_promote()")
    sql(server, "update other set body = 'y'; checkpoint")
    silent(server, NAME)
    table = make_stale(server)
    [finding] = found(server, NAME)
    assert (finding.location.file, finding.location.block) == (table, 3)
    assert str(finding.evidence["wal"]).endswith("timeline 2")


def test_an_old_page_that_was_changed_once_more_is_found(new_server: ServerFactory) -> None:
    """Its LSN is new. What it had before is in the image that the change logged."""
    server = shop(new_server)
    sql(server, "create extension pg_buffercache; checkpoint")
    table = make_stale(server)
    rows_there = "select count(*) from shop where ctid >= '(3,0)' and ctid < '(4,0)'"
    assert sql(server, rows_there) > 1
    sql(server, "select 1 from shop where ctid >= '(3,0)' and ctid < '(4,0)' for key share")
    sql(
        server,
        "select pg_buffercache_evict(bufferid) from pg_buffercache"
        " where relfilenode = pg_relation_filenode('shop')",
    )
    image = faults.read_block(server.data_directory, table, 3)
    redo = Lsn.parse(sql(server, "select redo_lsn::text from pg_control_checkpoint()"))
    assert decode_header(image).lsn > redo
    [finding] = found(server, NAME)
    assert (finding.location.file, finding.location.block, finding.evidence["kind"]) == (table, 3, "stale")


def test_wal_that_held_is_not_read_again_and_damage_is(new_server: ServerFactory, tmp_path: Path) -> None:
    server = shop(new_server)
    sql(server, "checkpoint")
    silent(server, NAME, state=tmp_path)
    [path] = (tmp_path / "audited").glob("*.json")
    held = path.read_text()
    silent(server, NAME, state=tmp_path)
    assert path.read_text() == held
    sql(server, "update shop set amount = 2; checkpoint")
    silent(server, NAME, state=tmp_path)
    assert path.read_text() != held
    make_stale(server)
    for _ in range(2):
        [finding] = found(server, NAME, state=tmp_path)
        assert finding.location.block == 3


def test_what_one_run_does_not_read_is_said_and_read_by_the_next(
    new_server: ServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knockwood.integrity.checks.lost_writes.RUN_BYTES", 3 << 20)
    server = shop(new_server)
    make_stale(server)
    sql(server, "create table more as select i, repeat('x', 900) from generate_series(1, 6000) i; checkpoint")
    told: list[str] = []
    for _ in range(8):
        report = check(server, NAME, state=tmp_path)
        told += [gap.reason for gap in report.not_checked]
        assert report.findings or report.not_checked
        if report.findings:
            break
    assert {f.location.block for f in report.findings} == {3}
    assert told
    assert all("was not compared with the disk: one run reads 3 MB" in reason for reason in told)


def test_what_the_server_recycles_meanwhile_is_read_from_the_archive(
    new_server: ServerFactory, tmp_path: Path
) -> None:
    server = shop(new_server)
    made = new_archive(server, tmp_path / "archive")
    start = Lsn.parse(sql(server, "select pg_current_wal_insert_lsn()::text"))
    for _ in range(3):
        sql(server, "update other set body = 'y'; select pg_switch_wal()")
    archive_wal(made)
    end = Lsn.parse(sql(server, "checkpoint; select redo_lsn::text from pg_control_checkpoint()"))
    readings: list[list[bool]] = []

    def read(wal: StagedWal | None) -> bytes:
        assert wal is not None
        paths = sorted(wal.folder.iterdir())
        readings.append([path.is_symlink() for path in paths])
        # As if a checkpoint had come to its end just now.
        if len(readings) == 1:
            paths[0].resolve().unlink()
            raise ProgramFailedError("a file is not there")
        return paths[0].read_bytes()

    subject = subject_of(server, repository=made.repository)
    content = with_wal(subject, end, 1 << 30, read, since=start)
    assert len(content) == 1 << 20
    first, second = readings
    assert all(first)
    assert not any(second[:3])
    # Without an archive nothing can be said.
    readings.clear()
    with pytest.raises(WalRecycledError):
        with_wal(subject_of(server), end, 1 << 30, read, since=start + (1 << 20))
