"""A folder as storage: kills, full disks, closed folders."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from knockwood.errors import HostError, KnockwoodError, NoSpaceError, ObjectMissingError
from knockwood.host import privileges
from knockwood.repository.repository import Repository
from knockwood.repository.storage.local import LocalStorage

SPAWN = multiprocessing.get_context("spawn")
MIB = 1 << 20


def content(number: int) -> bytes:
    """Between nothing and some MB, different for each number, and known to the test."""
    noise = random.Random(number)
    return noise.randbytes(noise.choice((0, 1, 1000, 100_000, 3 * MIB)))


def _write_forever(folder: str, first: int) -> None:
    storage = LocalStorage(Path(folder))
    for number in range(first, first + 100_000):
        data = content(number)
        pieces = (data[start : start + 65536] for start in range(0, len(data), 65536))
        storage.put_new(f"a/{number % 7}/{number}", pieces)


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_whole_objects_or_none(tmp_path: Path, kills: int) -> None:
    storage = LocalStorage(tmp_path / "repository")
    chance = random.Random(4)
    for kill in range(kills):
        first = kill * 1_000_000
        before = sum(1 for _ in storage.list("a/"))
        writer = SPAWN.Process(target=_write_forever, args=(str(storage.root), first))
        writer.start()
        while sum(1 for _ in storage.list("a/")) == before:
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    seen = 0
    for info in storage.list():
        expected = content(int(info.name.rpartition("/")[2]))
        assert info.bytes == len(expected)
        assert hashlib.sha256(b"".join(storage.read(info.name))).digest() == hashlib.sha256(expected).digest()
        seen += 1
    assert seen >= kills
    # The next run goes on, also under the names that were being written.
    for leftover in storage.root.rglob(".tmp-*"):
        os.utime(leftover, (0, 0))
    assert all(not info.name.rpartition("/")[2].startswith(".") for info in storage.list())
    assert list(storage.root.rglob(".tmp-*")) == []


def test_a_young_unfinished_write_is_left_alone(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / ".tmp-0123").write_bytes(b"at work")
    (tmp_path / "stranger").mkdir()
    assert list(storage.list()) == []
    assert (tmp_path / ".tmp-0123").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; only root can make one."""
    if not privileges.is_root():
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_said_and_leaves_nothing(small_disk: Path) -> None:
    storage = LocalStorage(small_disk / "repository")
    repository = Repository.create(storage, cluster="shop", system_identifier=7, segment_bytes=MIB)
    names = [info.name for info in storage.list()]
    noise = random.Random(1)
    with pytest.raises(NoSpaceError, match="the disk is full") as full:
        repository.put("wal/a", (noise.randbytes(MIB) for _ in range(8)))
    assert full.value.retry_safe
    assert [info.name for info in storage.list()] == names
    assert list(storage.root.rglob(".tmp-*")) == []
    repository.put("wal/a", [noise.randbytes(MIB)])


def _in_child(work: Callable[[], None]) -> int:
    """Run `work` in a fork of its own and return its status: limits and identities stay there."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _expect(error: type[KnockwoodError], text: str, act: Callable[[], object]) -> None:
    with pytest.raises(error, match=text):
        act()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    """The limit on file sizes stops a write half-way for an ordinary user, as a full disk does."""
    storage = LocalStorage(tmp_path)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
        _expect(HostError, "file too large", lambda: storage.put_new("a/b", [bytes(MIB)] * 3))
        storage.put_new("a/c", [bytes(1000)])

    assert _in_child(work) == 0
    assert [info.name for info in storage.list()] == ["a/c"]
    assert list(tmp_path.rglob(".tmp-*")) == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_closed_folders_are_said_and_read_on(shared_folder: Path) -> None:
    root = shared_folder / "closed"
    storage = LocalStorage(root)
    storage.put_new("a/b", [b"x"])
    storage.put_new("secret/b", [b"x"])
    account = privileges.server_account()
    privileges.give_tree(root, account)
    (root / "secret").chmod(0)
    (root / "a").chmod(0o500)

    def work() -> None:
        if account is not None:
            os.setgroups([])
            os.setgid(account.gid)
            os.setuid(account.uid)
        assert b"".join(storage.read("a/b")) == b"x"
        _expect(HostError, "permission denied", lambda: storage.put_new("a/c", [b"x"]))
        _expect(HostError, "permission denied", lambda: storage.delete("a/b"))
        # Not "there is none": nobody can know.
        _expect(HostError, "permission denied", lambda: storage.info("secret/b"))
        _expect(HostError, "permission denied", lambda: list(storage.read("secret/b")))
        _expect(HostError, "permission denied", lambda: list(storage.list()))

    try:
        assert _in_child(work) == 0
    finally:
        (root / "secret").chmod(0o700)
        (root / "a").chmod(0o700)


def test_an_object_that_vanishes_is_missing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put_new("a", [b"x"])
    pieces = storage.read("a")
    (tmp_path / "a").unlink()
    with pytest.raises(ObjectMissingError):
        next(pieces)


def test_what_lies_in_the_way_is_said(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put_new("a", [b"x"])
    with pytest.raises(HostError):
        storage.put_new("a/b", [b"x"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(KnockwoodError):
        storage.put_new("folder", [b"x"])
