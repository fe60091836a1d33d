"""The receiver while its repository does not answer, and while its spool's disk is full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fix_receive import commit, first_lsn, new_repository
from fix_server import ServerFactory
from knockwood.errors import NoSpaceError, StorageUnavailableError
from knockwood.host import clock
from knockwood.host.files import Chunk
from knockwood.model.wal import Timeline, WalRange
from knockwood.repository.archive import WalArchive
from knockwood.repository.receive import EventKind, Receiver, ReceiverEvent, receiving
from knockwood.repository.storage import ObjectInfo, Storage

ONE = Timeline(1)


class Outage:
    """A storage that can be switched off."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.off = False

    def _on(self) -> Storage:
        if self.off:
            raise StorageUnavailableError("switched off", where=self.url)
        return self.storage

    @property
    def url(self) -> str:
        return self.storage.url

    def put_new(self, name: str, chunks: Iterable[Chunk]) -> int:
        return self._on().put_new(name, chunks)

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        return self._on().read(name, start, end)

    def info(self, name: str) -> ObjectInfo | None:
        return self._on().info(name)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._on().list(prefix)

    def delete(self, name: str) -> None:
        self._on().delete(name)


def wait_for(events: list[ReceiverEvent], kind: EventKind, error: type[Exception]) -> None:
    deadline = clock.monotonic() + 60
    while not any(e.kind == kind and isinstance(e.error, error) for e in events):
        assert clock.monotonic() < deadline, events
        clock.sleep(0.05)


def test_the_repository_is_away_for_a_while(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    outage = Outage(repository.storage)
    events: list[ReceiverEvent] = []
    receiver = Receiver(
        replace(repository, storage=outage), server.dsn(), tmp_path / "spool", on_event=events.append
    )
    with receiving(receiver):
        commit(server, switch=True)
        receiver.flush()
        outage.off = True
        for _ in range(12):
            last = commit(server, switch=True)
        wait_for(events, EventKind.REPOSITORY_PROBLEM, StorageUnavailableError)
        with pytest.raises(StorageUnavailableError):
            receiver.flush(timeout=0.5)
        outage.off = False
        assert receiver.flush(timeout=60) >= last
        # Said once, not once a try.
        assert sum(event.kind == EventKind.REPOSITORY_PROBLEM for event in events) <= 2
    stock = WalArchive(repository).inventory()
    assert stock.gaps() == ()
    assert stock.covers(WalRange(ONE, first_lsn(repository), last))
    # What is safe in the repository has left the spool, but for the last whole segment.
    assert len([file for file in receiver.spool.files() if not file.partial]) <= 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few segments of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("making a small file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_the_spools_disk_is_full(new_server: ServerFactory, small_disk: Path, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    outage = Outage(repository.storage)
    events: list[ReceiverEvent] = []
    receiver = Receiver(
        replace(repository, storage=outage), server.dsn(), small_disk / "spool", on_event=events.append
    )
    with receiving(receiver):
        commit(server, switch=True)
        receiver.flush()
        outage.off = True
        for _ in range(10):
            last = commit(server, switch=True)
        wait_for(events, EventKind.SERVER_PROBLEM, NoSpaceError)
        outage.off = False
        assert receiver.flush(timeout=90) >= last
    stock = WalArchive(repository).inventory()
    assert stock.gaps() == ()
    assert stock.covers(WalRange(ONE, first_lsn(repository), last))
