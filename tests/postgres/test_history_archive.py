"""The index over archives that grow, have holes, are damaged, encrypted, or go on along a new timeline."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pyrage
import pytest

from fix_archive import Archived, archive_wal, flip, new_archive
from fix_server import ServerFactory
from knockwood.errors import HostError, WrongKeyError
from knockwood.history import store
from knockwood.history.follow import following
from knockwood.history.follow_worker import Following
from knockwood.history.index import ArchiveIndex, Asked
from knockwood.history.transaction import Transaction
from knockwood.host import clock
from knockwood.host.files import Chunk
from knockwood.model import Lsn, WalSegment
from knockwood.postgres.connection import Connection, connect
from knockwood.postgres.server import LocalServer
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository
from knockwood.repository.storage.base import ObjectInfo
from knockwood.repository.storage.local import LocalStorage

MESSAGE = 3 << 20
"""A record of three segments."""


def write(connection: Connection, rounds: int) -> None:
    """Transactions of several segments each, among them one record longer than two."""
    for number in range(rounds):
        connection.execute("insert into t select g, repeat('x', 200) from generate_series(1, 3000) g")
        connection.execute("begin")
        connection.execute("delete from t where a <= 100")
        connection.execute("savepoint s")
        connection.execute("update t set b = 'y' where a between 101 and 2900")
        connection.execute("release s")
        connection.execute("commit")
        if number == 1:
            connection.execute(
                f"select pg_logical_emit_message(true, 'big', repeat('m', {MESSAGE}))".encode()
            )


def server_with_table(new_server: ServerFactory, major: int = 18) -> LocalServer:
    server = new_server(major, segment_megabytes=1, wal_keep_size="1GB")
    with connect(server.dsn()) as connection:
        connection.execute("create table t (a int, b text)")
        connection.execute("select pg_switch_wal()")
    return server


def switched(made: Archived) -> None:
    with connect(made.server.dsn()) as connection:
        connection.execute("select pg_switch_wal()")
    archive_wal(made)


def copy_of(made: Archived, root: Path) -> Repository:
    """The same archive without an index."""
    shutil.copytree(made.root, root)
    shutil.rmtree(root / "history", ignore_errors=True)
    return Repository.open(
        LocalStorage(root), recipients=made.repository.recipients, identities=made.repository.identities
    )


def all_of(repository: Repository, **words: int) -> list[Transaction]:
    index = ArchiveIndex.open(repository, **words)  # type: ignore[arg-type]
    assert index.not_covered == ()
    return list(index.transactions())


def segments_of(made: Archived) -> list[Path]:
    return sorted(made.root.glob("wal/0*/*/*"))


def test_an_archive_that_grows_is_indexed_piece_by_piece(new_server: ServerFactory, tmp_path: Path) -> None:
    server = server_with_table(new_server)
    made = new_archive(server, tmp_path / "grown")
    seen: list[int] = []
    with connect(server.dsn()) as connection:
        for _ in range(3):
            write(connection, 2)
            archive_wal(made)
            index = ArchiveIndex.open(made.repository, workers=1)
            now = [one.xid for one in index.transactions()]
            assert now[: len(seen)] == seen
            seen = now
        switched(made)
        # The unfinished segment, as a receiver stores it: cut anywhere.
        connection.execute("insert into t values (-1, 'partial')")
        row = connection.execute("select pg_current_wal_flush_lsn()::text").fetchone()
        assert row is not None
    archive = WalArchive(made.repository)
    end = Lsn.parse(row[0])
    index = ArchiveIndex.open(made.repository)
    whole = list(index.transactions())
    segment = WalSegment.containing(index.timeline, end, 1 << 20)
    archive.put_partial(segment, server.data_directory / "pg_wal" / segment.name, end)
    longer = list(ArchiveIndex.open(made.repository).transactions())
    assert longer[:-1] == whole
    assert longer[-1].relations[0].inserted == 1
    assert longer == all_of(copy_of(made, tmp_path / "at once"), workers=1)
    assert longer == all_of(copy_of(made, tmp_path / "processes"), workers=2)
    assert len(store.heads(made.repository)) == len(segments_of(made))
    big = next(one for one in longer if one.label == "big")
    assert big.wal_bytes > MESSAGE
    # Only what is asked for is read, and says the same.
    newest = index.newest(5)
    assert newest == whole[-5:]
    ranked = sorted(whole, key=lambda one: (-one.wal_bytes, one.commit_lsn))
    assert all(index.largest(limit) == ranked[:limit] for limit in (0, 1, 3, 50, len(whole), len(whole) + 1))
    since, until = whole[len(whole) // 3].commit_lsn, whole[-len(whole) // 3].commit_lsn
    asked = [one for one in ranked if since <= one.commit_lsn < until]
    assert index.largest(20, Asked(since, until)) == asked[:20]
    for one in (whole[0], whole[len(whole) // 2], big):
        assert index.transaction(one.xid) == one
        assert all(index.transaction(sub) == one for sub in one.subxids)
        assert index.commit_of(one.xid).lsn == one.commit_lsn
    everybody = {xid: one for one in whole for xid in one.xids}
    assert index.writers([*everybody, 2, 1 << 31]) == everybody


def test_a_hole_is_told_and_goes_away_when_it_is_filled(new_server: ServerFactory, tmp_path: Path) -> None:
    server = server_with_table(new_server)
    made = new_archive(server, tmp_path / "repository")
    with connect(server.dsn()) as connection:
        write(connection, 3)
    switched(made)
    whole = all_of(copy_of(made, tmp_path / "whole"), workers=1)
    segments = segments_of(made)
    lost = segments[len(segments) // 2]
    kept = tmp_path / "kept"
    shutil.move(lost, kept)
    for _ in range(2):
        index = ArchiveIndex.open(made.repository, workers=1)
        holed = list(index.transactions())
        assert {one.xid for one in holed} <= {one.xid for one in whole}
        assert lost.name[:24] in index.not_covered[0].reason
        begin, end = index.not_covered[0].range.start, index.not_covered[-1].range.end
        told = [one for one in whole if not begin <= one.commit_lsn < end]
        assert [one.xid for one in holed] == [one.xid for one in told]
        # One that may have begun in the hole says so; all others are what they are.
        assert not all(one.complete for one in holed if one.commit_lsn >= end)
        assert [one for one in holed if one.complete] == [
            one for one in told if one.xid in {other.xid for other in holed if other.complete}
        ]
    shutil.move(kept, lost)
    assert all_of(made.repository, workers=1) == whole


def test_damage_is_told_and_the_rest_is_there(new_server: ServerFactory, tmp_path: Path) -> None:
    server = server_with_table(new_server)
    made = new_archive(server, tmp_path / "repository")
    with connect(server.dsn()) as connection:
        write(connection, 3)
    switched(made)
    whole = all_of(copy_of(made, tmp_path / "whole"), workers=1)
    segments = segments_of(made)
    bad = segments[len(segments) // 2]
    flip(bad, bad.stat().st_size // 2)
    index = ArchiveIndex.open(made.repository, workers=1)
    gaps = index.not_covered
    assert gaps
    assert "missing" not in gaps[0].reason
    begin, end = gaps[0].range.start, gaps[-1].range.end
    assert [one.xid for one in index.transactions()] == [
        one.xid for one in whole if not begin <= one.commit_lsn < end
    ]
    assert bad.name[:24] not in store.heads(made.repository)
    # Damage of the index itself is no loss: it is made again.
    flip(bad, bad.stat().st_size // 2)
    assert all_of(made.repository, workers=1) == whole
    for part in ("head", "transactions"):
        hurt = sorted(made.root.glob(f"history/index/v1/*/*/*.{part}.zst"))[3]
        flip(hurt, hurt.stat().st_size // 2)
        assert all_of(made.repository, workers=1) == whole


def test_an_encrypted_archive_has_an_encrypted_index(new_server: ServerFactory, tmp_path: Path) -> None:
    identity = pyrage.x25519.Identity.generate()
    server = server_with_table(new_server)
    made = new_archive(
        server, tmp_path / "repository", recipients=(str(identity.to_public()),), identities=(str(identity),)
    )
    with connect(server.dsn()) as connection:
        write(connection, 1)
    switched(made)
    found = all_of(made.repository)
    assert found == all_of(copy_of(made, tmp_path / "copy"), workers=1)
    assert {path.suffix for path in made.root.glob("history/**/*") if path.is_file()} == {".age"}
    blind = Repository.open(LocalStorage(made.root), recipients=(str(identity.to_public()),))
    with pytest.raises(WrongKeyError):
        ArchiveIndex.open(blind)


def test_a_new_timeline_goes_on_with_its_parents_history(
    every_version: int, new_server: ServerFactory, tmp_path: Path
) -> None:
    server = server_with_table(new_server, every_version)
    made = new_archive(server, tmp_path / "repository")
    with connect(server.dsn()) as connection:
        write(connection, 2)
        switched(made)
        connection.execute("insert into t values (1, 'before')")
    server.stop("fast")
    (server.data_directory / "standby.signal").touch()
    server.start()
    with connect(server.dsn()) as connection:
        connection.execute("select pg_promote()")
        row = connection.execute("insert into t values (2, 'after') returning xmin::text::bigint").fetchone()
        assert row is not None
        write(connection, 1)
    switched(made)
    index = ArchiveIndex.open(made.repository)
    assert index.not_covered == ()
    assert [one.timeline for one in index.covered] == [1, 2]
    found = list(index.transactions())
    assert index.timeline == 2
    assert index.transaction(row[0]).timeline == 2
    assert {one.timeline for one in found} == {1, 2}
    assert [one.xid for one in found] == sorted({one.xid for one in found})
    before = [one for one in found if one.xid < row[0]]
    assert {one.timeline for one in before} == {1}


class Failing(LocalStorage):
    """A folder that refuses to store an index, from the given number of objects on."""

    def __init__(self, root: Path, after: int) -> None:
        super().__init__(root)
        self.left = after

    def put_new(self, name: str, chunks: Iterable[Chunk]) -> int:
        if name.startswith("history/"):
            self.left -= 1
            if self.left < 0:
                raise HostError("no", where=name)
        return super().put_new(name, chunks)


class Mute(LocalStorage):
    """A folder that does not answer."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        raise HostError("no answer", where=prefix)


def test_an_index_that_cannot_be_stored_still_answers(new_server: ServerFactory, tmp_path: Path) -> None:
    server = server_with_table(new_server)
    made = new_archive(server, tmp_path / "repository")
    with connect(server.dsn()) as connection:
        write(connection, 1)
    switched(made)
    whole = all_of(copy_of(made, tmp_path / "whole"), workers=1)
    # Stopped after each object in turn, as a kill would: what is half there counts for nothing.
    for after in range(0, 9, 2):
        storage = Failing(made.root, after)
        assert all_of(Repository.open(storage), workers=1) == whole
    assert all_of(made.repository, workers=1) == whole


def test_following_indexes_what_arrives_also_after_a_kill(new_server: ServerFactory, tmp_path: Path) -> None:
    server = server_with_table(new_server)
    made = new_archive(server, tmp_path / "repository")
    told: list[str] = []
    with following(made.repository, told.append, patient=False) as archived:
        for number in range(3):
            with connect(server.dsn()) as connection:
                write(connection, 2)
            before = {path.name for path in segments_of(made)}
            switched(made)
            names = sorted(path.name[:24] for path in segments_of(made) if path.name not in before)
            # What was archived while nobody said so is found by the next one.
            for name in names if number else names[-1:]:
                archived(WalSegment.parse(name, made.repository.header.segment_bytes))
            wait_for_heads(made)
            kill_followers()
    assert 1 <= len(told) <= 2
    assert all("status -9" in text or "Broken pipe" in text for text in told)
    followed = all_of(made.repository, build=False)  # nothing is left to make
    assert followed == all_of(copy_of(made, tmp_path / "copy"), workers=1)
    assert followers() == []


def wait_for_heads(made: Archived) -> None:
    deadline = clock.monotonic() + 60
    while len(store.heads(made.repository)) < len(segments_of(made)):
        assert clock.monotonic() < deadline
        clock.sleep(0.01)


def followers() -> list[psutil.Process]:
    """Those of this process."""
    return [
        process
        for process in psutil.Process().children()
        if process.status() != psutil.STATUS_ZOMBIE and "follow_worker" in " ".join(process.cmdline())
    ]


def kill_followers() -> None:
    (one,) = followers()
    one.kill()


def test_following_tells_what_is_wrong_and_never_raises(new_server: ServerFactory, tmp_path: Path) -> None:
    server = server_with_table(new_server)
    made = new_archive(server, tmp_path / "repository")
    with connect(server.dsn()) as connection:
        write(connection, 1)
    switched(made)
    *_, last = segments_of(made)
    segment = WalSegment.parse(last.name[:24], made.repository.header.segment_bytes)
    mute = Following(Repository(Mute(made.root), made.repository.header))
    with pytest.raises(HostError):
        mute.archived(segment)
    flip(last, last.stat().st_size // 2)
    told: list[str] = []
    heard = threading.Event()

    def tell(text: str) -> None:
        told.append(text)
        heard.set()

    with following(made.repository, tell, patient=False) as archived:
        archived(segment)
        assert heard.wait(60)
        archived(WalSegment(segment.timeline, segment.number + 9, segment.bytes))
    assert segment.name in told[0]
    assert len(store.heads(made.repository)) == len(segments_of(made)) - 1
