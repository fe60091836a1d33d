"""Heads of many segments in one object: fewer reads, and the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fix_archive import Archived, archive_wal, flip, new_archive
from fix_server import ServerFactory
from knockwood.history import store
from knockwood.history.index import ArchiveIndex
from knockwood.history.transaction import Transaction
from knockwood.model import WalSegment
from knockwood.postgres.connection import connect
from knockwood.repository.backups.expire import _remove_derived
from knockwood.repository.repository import Repository
from knockwood.repository.storage.local import LocalStorage

SEGMENTS = 70


class Counting(LocalStorage):
    """Remembers what was read of the index."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []

    def read(self, name: str, *words: int | None) -> Iterator[bytes]:
        if name.startswith(store.ROOT):
            self.reads.append(name)
        return super().read(name, *words)


@pytest.fixture
def made(new_server: ServerFactory, tmp_path: Path) -> Archived:
    """An archive of many segments, most of them with one transaction."""
    server = new_server(18, segment_megabytes=1, wal_keep_size="1GB")
    archived = new_archive(server, tmp_path / "repository")
    with connect(server.dsn()) as connection:
        connection.execute("create table t (a int)")
        for number in range(SEGMENTS):
            connection.execute("insert into t values (%s)", [number])
            connection.execute("select pg_switch_wal()")
    archive_wal(archived)
    return archived


def packs_of(made: Archived) -> list[Path]:
    return sorted(made.root.glob("history/index/v1/heads/*"))


def opened(root: Path) -> tuple[ArchiveIndex, list[str], int]:
    """The index, what was read of it, and how many segments had to be indexed."""
    storage = Counting(root)
    steps: list[int] = []
    index = ArchiveIndex.open(
        Repository.open(storage), workers=1, progress=lambda done, _total: steps.append(done)
    )
    assert index.not_covered == ()
    return index, storage.reads, len(steps)


def segment_of(one: Transaction) -> str:
    return WalSegment.containing(one.timeline, one.commit_lsn, 1 << 20).name


def test_a_long_index_is_opened_with_few_reads(made: Archived) -> None:
    first, _, built = opened(made.root)
    assert built >= SEGMENTS
    [pack] = packs_of(made)
    again, reads, built = opened(made.root)
    # The head of the archive's first segment begins after it: what lies before may come yet.
    assert (built, len(reads)) == (0, 2)
    assert again.heads == first.heads
    assert list(again.transactions()) == list(first.transactions())
    # The heads themselves are copies by now, but for the first one.
    for head in made.root.glob("history/index/v1/0*/*/*.head.*"):
        head.unlink()
    assert opened(made.root)[2] == 1
    # Without the pack all is as it was before there were any.
    pack.unlink()
    assert list(opened(made.root)[0].transactions()) == list(first.transactions())


def test_the_largest_are_found_without_reading_all(made: Archived) -> None:
    opened(made.root)
    index, reads, _ = opened(made.root)
    del reads[:]
    found = index.largest(3)
    assert 1 <= len(reads) < SEGMENTS // 4
    assert found == sorted(index.transactions(), key=lambda one: (-one.wal_bytes, one.commit_lsn))[:3]


def test_a_damaged_pack_is_passed_over(made: Archived) -> None:
    whole = list(opened(made.root)[0].transactions())
    [pack] = packs_of(made)
    flip(pack, pack.stat().st_size // 2)
    index, reads, built = opened(made.root)
    assert built == 0
    assert len(reads) > SEGMENTS
    assert list(index.transactions()) == whole


def test_what_is_gone_beneath_a_pack_is_made_again(made: Archived) -> None:
    whole = list(opened(made.root)[0].transactions())
    [transactions] = list(made.root.glob(f"history/index/v1/0*/*/{segment_of(whole[30])}*.transactions.*"))
    transactions.unlink()
    index, _, _ = opened(made.root)
    assert list(index.transactions()) == whole
    assert transactions.exists()


def test_packs_go_with_what_they_tell_of(made: Archived) -> None:
    index, _, _ = opened(made.root)
    segments = [head.segment.name for head in index.heads]
    store.delete(made.repository, {segments[30]})
    assert packs_of(made) == []
    index, _, built = opened(made.root)
    assert built == 1
    [pack] = packs_of(made)
    # Expiry keeps a pack as long as its last segment is there.
    for path in made.root.glob(f"wal/0*/*/{segments[0]}*"):
        path.unlink()
    _remove_derived(made.repository)
    assert packs_of(made) == [pack]
    assert opened(made.root)[0].heads == index.heads[1:]
    for path in made.root.glob("wal/0*/*/*"):
        path.unlink()
    _remove_derived(made.repository)
    assert packs_of(made) == []
