"""An object store that fails, answers slowly, cuts connections and loses answers."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import obstore.exceptions
import pytest

from fix_s3 import BUCKET, Proxy, S3Server
from knockwood.errors import (
    LockHeldError,
    ObjectExistsError,
    StorageUnavailableError,
)
from knockwood.repository.leases import lease
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage
from knockwood.repository.storage.failures import translate
from knockwood.repository.storage.objects import ObjectStorage

SPAWN = multiprocessing.get_context("spawn")
MIB = 1 << 20


@pytest.fixture
def storage(s3_server: S3Server, s3_proxy: Proxy) -> ObjectStorage:
    return s3_server.storage(
        port=s3_proxy.port, timeout=1, retries=3, single_bytes=6 * MIB, part_bytes=5 * MIB
    )


def content(storage: ObjectStorage, name: str) -> bytes:
    return b"".join(storage.read(name))


@pytest.mark.parametrize("what", [500, 503, 429, "reset", "hang"])
def test_a_passing_failure_passes(storage: ObjectStorage, s3_proxy: Proxy, what: object) -> None:
    s3_proxy.fail(what, 1, "PUT")
    storage.put_new("a", [b"abc"])
    s3_proxy.fail(what, 1)
    assert content(storage, "a") == b"abc"
    s3_proxy.fail(what, 1)
    assert [info.name for info in storage.list()] == ["a"]
    s3_proxy.fail(what, 1)
    assert storage.info("a") is not None


@pytest.mark.parametrize("what", [500, 503, "reset", "hang"])
def test_a_lasting_failure_is_unavailable_and_leaves_nothing(
    storage: ObjectStorage, s3_proxy: Proxy, what: object
) -> None:
    storage.put_new("there", [b"x"])
    s3_proxy.fail(what, 10**6)
    for act in (
        lambda: storage.put_new("a", [b"abc"]),
        lambda: content(storage, "there"),
        lambda: storage.info("there"),
        lambda: list(storage.list()),
        lambda: storage.delete("there"),
    ):
        with pytest.raises(StorageUnavailableError) as failed:
            act()
        assert failed.value.retry_safe
    s3_proxy.fail(what, 0)
    assert [info.name for info in storage.list()] == ["there"]


def test_a_server_that_is_not_there_is_unavailable(s3_server: S3Server, s3_proxy: Proxy) -> None:
    storage = s3_server.storage(port=1, timeout=1, retries=1)
    with pytest.raises(StorageUnavailableError, match="does not answer") as failed:
        storage.info("a")
    assert "AWS_ENDPOINT_URL" in str(failed.value.hint)


def test_a_creation_whose_answer_was_lost_is_known_as_ours(storage: ObjectStorage, s3_proxy: Proxy) -> None:
    s3_proxy.fail("lost answer", 1, "PUT")
    assert storage.put_new("a", [b"abc"]) == 3
    assert content(storage, "a") == b"abc"
    with pytest.raises(ObjectExistsError):
        storage.put_new("a", [b"abc"])


def test_a_creation_that_another_won_meanwhile_is_not_ours(
    s3_server: S3Server, storage: ObjectStorage, s3_proxy: Proxy
) -> None:
    other = s3_server.storage(prefix=storage.url.rpartition("/")[2])
    first = [True]

    def plan(method: str, _path: str) -> object:
        if method == "PUT" and first.pop() if first else False:
            other.put_new("a", [b"theirs"])
            return 500
        return None

    s3_proxy.plan = plan
    with pytest.raises(ObjectExistsError):
        storage.put_new("a", [b"ours"])
    assert content(storage, "a") == b"theirs"


@pytest.mark.parametrize("times", [1, 3])
def test_a_read_that_breaks_goes_on_where_it_ended(
    storage: ObjectStorage, s3_proxy: Proxy, times: int
) -> None:
    data = random.Random(3).randbytes(5 * MIB)
    storage.put_new("a", [data])
    s3_proxy.fail("cut body", times, "GET", "/a")
    assert content(storage, "a") == data
    s3_proxy.fail("cut body", times, "GET", "/a")
    assert b"".join(storage.read("a", 100, 4 * MIB)) == data[100 : 4 * MIB]


@pytest.mark.parametrize("what", [500, "reset", "lost answer"])
@pytest.mark.parametrize(
    ("method", "part"), [("POST", "?uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId=")]
)
def test_a_big_object_survives_passing_failures(
    storage: ObjectStorage, s3_proxy: Proxy, what: object, method: str, part: str
) -> None:
    pieces = [bytes([number]) * MIB for number in range(17)]
    s3_proxy.fail(what, 1, method, part)
    storage.put_new("big", pieces)
    assert content(storage, "big") == b"".join(pieces)
    assert sum(method == seen[0] and part in seen[1] for seen in s3_proxy.seen) >= 2
    assert [info.name for info in storage.list()] == ["big"]


def test_a_big_object_that_cannot_be_stored_is_not_there(storage: ObjectStorage, s3_proxy: Proxy) -> None:
    s3_proxy.fail(500, 10**6, part="uploadId")
    with pytest.raises(StorageUnavailableError):
        storage.put_new("big", [bytes(MIB)] * 17)
    s3_proxy.fail(500, 0)
    assert list(storage.list()) == []
    storage.put_new("big", [bytes(MIB)] * 17)


def test_a_claim_of_another_machine_holds_off_and_a_dead_one_here_does_not(
    storage: ObjectStorage, s3_proxy: Proxy
) -> None:
    with storage._claim("big"), pytest.raises(LockHeldError, match="stores the same object"):
        storage.put_new("big", [bytes(MIB)] * 17)
    assert storage.info("big") is None
    storage.put_new("claims/big.json", [b"not json"])
    with pytest.raises(LockHeldError):
        storage.put_new("big", [bytes(MIB)] * 17)


def _upload_forever(address: str) -> None:
    storage = open_storage(address, single_bytes=6 * MIB, part_bytes=5 * MIB)
    for number in range(10_000):
        storage.put_new(f"small/{number}", [bytes([number % 256]) * 1000])
        storage.put_new(f"big/{number}", [bytes([number % 256]) * MIB] * 12)


@pytest.mark.slow
def test_a_killed_uploader_leaves_whole_objects_or_none(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    chance = random.Random(9)
    for kill in range(15):
        address = f"s3://{BUCKET}/kill-{kill}-{os.getpid()}"
        storage = open_storage(address, single_bytes=6 * MIB, part_bytes=5 * MIB)
        uploader = SPAWN.Process(target=_upload_forever, args=(address,))
        uploader.start()
        while not list(storage.list("small/")):
            assert uploader.is_alive()
            time.sleep(0.01)
        time.sleep(chance.random() * 0.4)
        assert uploader.pid is not None
        os.kill(uploader.pid, signal.SIGKILL)
        uploader.join()
        for info in storage.list():
            kind, _, number = info.name.partition("/")
            if kind in ("small", "big"):
                size = 1000 if kind == "small" else 12 * MIB
                assert b"".join(storage.read(info.name)) == bytes([int(number) % 256]) * size
        # What was on its way can be stored again at once, although its claim is still there.
        done = sum(1 for _ in storage.list("big/"))
        storage.put_new(f"big/{done}", [bytes(MIB)] * 12)


def test_leases_hold_across_clients_and_failures(
    s3_server: S3Server, storage: ObjectStorage, s3_proxy: Proxy
) -> None:
    mine = Repository.create(storage, cluster="shop", system_identifier=7, segment_bytes=MIB)
    theirs = Repository.open(s3_server.storage(prefix=storage.url.rpartition("/")[2]))
    with lease(mine, "backup", "base backup") as held:
        with pytest.raises(LockHeldError, match="base backup"), lease(theirs, "backup", "other"):
            pass
        s3_proxy.fail("lost answer", 1, "PUT")
        held.assert_held()
        s3_proxy.fail(500, 10**6)
        with pytest.raises(StorageUnavailableError):
            held.assert_held()
        s3_proxy.fail(500, 0)
        held.assert_held()
    with lease(theirs, "backup", "other"):
        pass


def test_of_many_clients_one_gets_the_lease(s3_server: S3Server, s3_proxy: Proxy) -> None:
    prefix = f"race-{s3_proxy.port}"
    together = threading.Barrier(6)
    holding: list[int] = []

    def work(number: int) -> None:
        repository = Repository.create(
            s3_server.storage(prefix=prefix), cluster="shop", system_identifier=7, segment_bytes=MIB
        )
        together.wait()
        try:
            with lease(repository, "backup", "race"):
                holding.append(number)
                together.wait()
        except LockHeldError:
            together.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holding) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("status code: 501 Not Implemented: <Code>NotImplemented</Code>", "only if it is absent"),
        ("status code: 301 Moved Permanently", "another region"),
        ("error performing token request http://169.254.169.254/latest: timed out", "no credentials"),
        ("status code: 403: <Code>RequestTimeTooSkewed</Code>", "clock differs"),
        ("error sending request kind: Builder, source: BadScheme", "not encrypted"),
        ("status code: 418 teapot", "refused"),
    ],
)
def test_answers_are_put_into_words(text: str, expected: str, tmp_path: Path) -> None:
    error = translate(obstore.exceptions.GenericError(f"Generic S3 error: {text}"), "s3://b/a")
    assert expected in str(error)
    assert not isinstance(error, StorageUnavailableError)
