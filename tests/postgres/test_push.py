"""archive_command and restore_command with real servers."""

from __future__ import annotations

import shutil
from pathlib import Path

import psycopg
import pytest

from fix_receive import commit, fetch_range, first_lsn, new_repository, waldump
from fix_server import ServerFactory
from knockwood.errors import ObjectDamagedError, ObjectExistsError, ObjectMissingError, UsageError
from knockwood.model.wal import Lsn, Timeline, WalRange, WalSegment
from knockwood.repository import push as push_module
from knockwood.repository.archive import WalArchive
from knockwood.repository.push import Fetched, Pushed, fetch, push
from knockwood.repository.repository import Repository
from knockwood.repository.walfile import valid_end

ONE = Timeline(1)


def archived(new_server: ServerFactory, tmp_path: Path, version: int = 18) -> tuple[Repository, Path]:
    """A repository with one pushed segment, and the segment's file."""
    server = new_server(version, segment_megabytes=1, wal_keep_size="1GB")
    repository = new_repository(server, tmp_path / "repository")
    lsn = commit(server, switch=True)
    name = WalSegment.containing(ONE, lsn, 1 << 20).name
    path = tmp_path / name
    shutil.copyfile(server.data_directory / "pg_wal" / name, path)
    assert push(repository, path) == Pushed.STORED
    return repository, path


def test_a_server_archives_by_command(every_version: int, new_server: ServerFactory, tmp_path: Path) -> None:
    """The archiver hands its files over; they are pushed here, because its account cannot run our Python."""
    server = new_server(
        every_version,
        segment_megabytes=1,
        archive_mode="on",
        archive_command="cp %p ../handed-%f.tmp && mv ../handed-%f.tmp ../handed-%f",
    )
    repository = new_repository(server, tmp_path / "repository")
    for _ in range(4):
        last = commit(server, switch=True)
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        wanted = WalSegment.containing(ONE, last, 1 << 20).name
        row = None
        while row != (wanted,):
            row = connection.execute("select last_archived_wal from pg_stat_archiver").fetchone()
    for handed in sorted(server.data_directory.parent.glob("handed-*")):
        path = tmp_path / handed.name.removeprefix("handed-")
        shutil.copyfile(handed, path)
        assert push(repository, path) == Pushed.STORED
        assert push(repository, path) == Pushed.KNOWN
    stock = WalArchive(repository).inventory()
    everything = WalRange(ONE, first_lsn(repository), last)
    assert stock.covers(everything)
    fetch_range(repository, everything, tmp_path / "wal")
    assert waldump(server, tmp_path / "wal", everything).returncode == 0


def test_other_content_of_the_same_name_is_refused(new_server: ServerFactory, tmp_path: Path) -> None:
    repository, path = archived(new_server, tmp_path)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ObjectExistsError):
        push(repository, path)


def test_a_file_that_is_not_what_its_name_says_is_refused(new_server: ServerFactory, tmp_path: Path) -> None:
    repository, path = archived(new_server, tmp_path)
    other = path.with_name(WalSegment.parse(path.name, 1 << 20).next().name)
    path.rename(other)
    with pytest.raises(ObjectDamagedError):
        push(repository, other)
    other.write_bytes(other.read_bytes()[:-1])
    with pytest.raises(ObjectDamagedError):
        push(repository, other)
    with pytest.raises(UsageError):
        push(repository, tmp_path / "postgresql.conf")


def test_a_partial_is_stored_up_to_its_end(new_server: ServerFactory, tmp_path: Path) -> None:
    """A server's file of a timeline it left may hold older pages after its end."""
    repository, path = archived(new_server, tmp_path)
    segment = WalSegment.parse(path.name, 1 << 20).next()
    data = bytearray(path.read_bytes())
    # The long header's page address, so that the first page is that of the next segment.
    data[8:16] = segment.start.value.to_bytes(8, "little")
    partial = tmp_path / f"{segment.name}.partial"
    partial.write_bytes(data)
    end = valid_end(partial, segment)
    assert segment.start < end <= segment.start + 8192
    assert push(repository, partial) == Pushed.STORED
    assert push(repository, partial) == Pushed.KNOWN
    assert fetch(repository, segment.name, tmp_path / "out") == Fetched.WRITTEN
    got = (tmp_path / "out").read_bytes()
    assert len(got) == 1 << 20
    count = end - segment.start
    assert got[:count] == bytes(data[:count])
    assert not any(got[count:])


def test_fetch_tells_the_end_from_damage_and_from_a_hole(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1, wal_keep_size="1GB")
    repository = new_repository(server, tmp_path / "repository")
    lsns = [commit(server, switch=True) for _ in range(4)]
    segments = [WalSegment.containing(ONE, lsn, 1 << 20) for lsn in lsns]
    for segment in segments:
        path = tmp_path / segment.name
        shutil.copyfile(server.data_directory / "pg_wal" / segment.name, path)
        push(repository, path)
    out = tmp_path / "out"
    assert fetch(repository, segments[0].name, out) == Fetched.WRITTEN
    assert out.read_bytes() == (tmp_path / segments[0].name).read_bytes()
    out.unlink()
    end = fetch(repository, segments[-1].next().name, out)
    assert end == Fetched.NOT_IN_ARCHIVE
    assert 1 <= end.exit_status <= 125
    assert fetch(repository, "00000002.history", out) == Fetched.NOT_IN_ARCHIVE
    names = [info.name for info in repository.storage.list("wal/00000001/")]
    repository.storage.delete(names[1])
    with pytest.raises(ObjectMissingError) as hole:
        fetch(repository, segments[1].name, out)
    assert push_module.exit_status_of(hole.value) > 125
    stored = tmp_path / "repository" / names[2]
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 0x40
    stored.chmod(0o600)
    stored.write_bytes(data)
    with pytest.raises(ObjectDamagedError) as damage:
        fetch(repository, segments[2].name, out)
    assert push_module.exit_status_of(damage.value) > 125
    assert not out.exists()


def test_histories_and_labels(new_server: ServerFactory, tmp_path: Path) -> None:
    repository, path = archived(new_server, tmp_path)
    history = tmp_path / "00000002.history"
    history.write_text("1\t0/3000148\tno recovery target specified\n")
    assert push(repository, history) == Pushed.STORED
    assert push(repository, history) == Pushed.KNOWN
    assert fetch(repository, history.name, tmp_path / "out") == Fetched.WRITTEN
    assert (tmp_path / "out").read_text() == history.read_text()
    assert WalArchive(repository).history(Timeline(2)).switches == ((ONE, Lsn.parse("0/3000148")),)
    history.write_text("1\t0/4000148\tanother\n")
    with pytest.raises(ObjectExistsError):
        push(repository, history)
    label = tmp_path / f"{path.name}.00000028.backup"
    label.write_text("START WAL LOCATION: 0/2000028\n")
    assert push(repository, label) == Pushed.STORED
    assert push(repository, label) == Pushed.KNOWN
