"""What every storage promises, on a folder and on a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fix_s3 import READER_KEY, READER_SECRET, S3Server
from knockwood.errors import (
    KnockwoodError,
    ObjectExistsError,
    ObjectMissingError,
    RepositoryError,
    SettingsError,
)
from knockwood.repository.repository import Repository
from knockwood.repository.storage import Storage, open_storage

MIB = 1 << 20


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "repository"))
    server: S3Server = request.getfixturevalue("s3_server")
    return server.storage(single_bytes=6 * MIB, part_bytes=5 * MIB)


def content(storage: Storage, name: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(storage.read(name, start, end))


def test_an_object_comes_back_as_it_was_put(storage: Storage) -> None:
    assert storage.put_new("a/b", [b"one", bytearray(b"two"), memoryview(b"three")]) == 11
    assert content(storage, "a/b") == b"onetwothree"
    info = storage.info("a/b")
    assert info is not None
    assert (info.name, info.bytes) == ("a/b", 11)
    assert abs(datetime.now(UTC) - info.modified) < timedelta(minutes=1)


def test_an_empty_object_is_an_object(storage: Storage) -> None:
    assert storage.put_new("empty", []) == 0
    assert content(storage, "empty") == b""
    assert storage.info("empty") is not None


def test_nothing_is_overwritten(storage: Storage) -> None:
    storage.put_new("a", [b"first"])
    with pytest.raises(ObjectExistsError):
        storage.put_new("a", [b"second"])
    assert content(storage, "a") == b"first"


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 3, b"012"), (4, None, b"456789"), (4, 4, b""), (8, 99, b"89"), (10, None, b""), (12, 15, b"")],
)
def test_a_range_is_read_as_of_a_file(storage: Storage, start: int, end: int | None, expected: bytes) -> None:
    storage.put_new("a", [b"0123456789"])
    assert content(storage, "a", start, end) == expected


def test_what_is_not_there_is_missing(storage: Storage) -> None:
    storage.put_new("a/b", [b"x"])
    for name in ("nothing", "a", "a/b/c"):
        assert storage.info(name) is None
        with pytest.raises(ObjectMissingError):
            content(storage, name)
        with pytest.raises(ObjectMissingError):
            content(storage, name, 3, 3 if name == "nothing" else 5)
        storage.delete("nothing")


def test_listing_is_by_prefix_in_the_order_of_names(storage: Storage) -> None:
    names = ["w/a-c", "w/a.json", "w/a/a", "w/a/b", "w/a0", "w/b", "wa", "x/y"]
    for name in reversed(names):
        storage.put_new(name, [b"x"])
    assert names == sorted(names)
    for prefix in ("", "w", "w/", "w/a", "w/a/", "w/a/b", "x/", "none/", "none"):
        assert [info.name for info in storage.list(prefix)] == [n for n in names if n.startswith(prefix)]


def test_a_deleted_object_is_gone_and_may_be_put_again(storage: Storage) -> None:
    storage.put_new("a", [b"1"])
    storage.delete("a")
    assert storage.info("a") is None
    storage.put_new("a", [b"2"])
    assert content(storage, "a") == b"2"


@pytest.mark.parametrize(
    "name", ["", "/a", "a/../b", "..", "a//b", "a/", ".tmp-1", "a/.b", "a\nb", "a\0", "x" * 999]
)
def test_no_name_leads_outside(storage: Storage, name: str) -> None:
    for act in (
        lambda: storage.put_new(name, [b"x"]),
        lambda: content(storage, name),
        lambda: storage.info(name),
        lambda: storage.delete(name),
    ):
        with pytest.raises(RepositoryError, match="not a name"):
            act()
    if name not in ("", "a/"):
        with pytest.raises(RepositoryError, match="not a name"):
            list(storage.list(name))


def test_a_source_that_fails_leaves_nothing(storage: Storage) -> None:
    def source(size: int) -> Iterator[bytes]:
        yield b"x" * size
        raise ZeroDivisionError

    for size in (10, 17 * MIB):
        with pytest.raises(ZeroDivisionError):
            storage.put_new("a", source(size))
        assert storage.info("a") is None
        assert list(storage.list()) == []


def test_a_big_object_is_whole(storage: Storage) -> None:
    pieces = [bytes([number]) * MIB for number in range(17)]
    assert storage.put_new("big", pieces) == 17 * MIB
    assert content(storage, "big") == b"".join(pieces)
    assert content(storage, "big", 5 * MIB - 1, 5 * MIB + 1) == b"\x04\x05"
    assert [info.name for info in storage.list()] == ["big"]
    with pytest.raises(ObjectExistsError):
        storage.put_new("big", pieces)


@pytest.mark.parametrize("size", [1000, 7 * MIB])
def test_of_many_writers_one_wins(storage: Storage, size: int) -> None:
    together = threading.Barrier(6)
    won: list[int] = []

    def write(number: int) -> None:
        together.wait()
        try:
            storage.put_new("a", [bytes([number]) * size])
            won.append(number)
        except KnockwoodError:
            pass

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(won) == 1
    assert content(storage, "a") == bytes(won) * size


def test_a_repository_lives_on_it(storage: Storage) -> None:
    made = Repository.create(storage, cluster="shop", system_identifier=2**63 + 7, segment_bytes=MIB)
    assert Repository.open(storage).header == made.header
    stored = made.put("wal/x", [b"abc"])
    assert b"".join(made.read(stored.name)) == b"abc"


def test_access_denied_and_a_missing_bucket_are_said_clearly(s3_server: S3Server) -> None:
    reader = s3_server.storage(key=(READER_KEY, READER_SECRET))
    with pytest.raises(RepositoryError, match="denies access") as denied:
        reader.put_new("a", [b"x"])
    assert "s3:PutObject" in str(denied.value.hint)
    for key in (("nobody", "x"), (READER_KEY, "wrong")):
        with pytest.raises(RepositoryError, match="does not accept the credentials"):
            list(s3_server.storage(key=key).list())
    nowhere = s3_server.storage("no-such-bucket")
    for act in (lambda: nowhere.info("a"), lambda: list(nowhere.list()), lambda: content(nowhere, "a")):
        with pytest.raises(RepositoryError, match="the bucket does not exist") as missing:
            act()
        assert not isinstance(missing.value, ObjectMissingError)


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("", "empty"),
        ("ftp://host/x", "no storage is known by ftp://"),
        ("file://relative", "whole path"),
        ("s3://key:secret@bucket/x", "no credentials"),
        ("az://container/x?sig=secret", "no credentials"),
    ],
)
def test_addresses_that_cannot_be_meant(address: str, error: str) -> None:
    with pytest.raises(SettingsError, match=error) as refused:
        open_storage(address)
    assert "secret" not in str(refused.value)


def test_addresses_of_folders(tmp_path: Path) -> None:
    assert open_storage(f"file://{tmp_path}/with%20space").url == f"{tmp_path}/with space"
    assert open_storage("s3://bucket/some/prefix/").url == "s3://bucket/some/prefix"


def test_a_missing_client_is_said_with_the_remedy() -> None:
    program = (
        "import sys; sys.modules['obstore'] = None\n"
        "from knockwood.errors import SettingsError\n"
        "from knockwood.repository.storage import open_storage\n"
        "open_storage('/tmp')\n"
        "try: open_storage('s3://bucket/x')\n"
        "except SettingsError as error: print(error.hint)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("pip install 'knockwood[s3]'\n", "")
