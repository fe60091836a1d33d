"""A repository knows its cluster and its format, and never overwrites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyrage
import pytest

from knockwood.errors import (
    ObjectDamagedError,
    ObjectExistsError,
    ObjectMissingError,
    RepositoryFormatError,
    SettingsError,
    WrongKeyError,
    WrongSystemError,
)
from knockwood.repository.repository import FORMAT, Repository
from knockwood.repository.storage.local import LocalStorage

IDENTITY = pyrage.x25519.Identity.generate()
PUBLIC, SECRET = str(IDENTITY.to_public()), str(IDENTITY)
SYSTEM = 2**64 - 3


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "repository")


def create(storage: LocalStorage, **changes: Any) -> Repository:
    values = {"cluster": "shop", "system_identifier": SYSTEM, "segment_bytes": 1 << 24} | changes
    return Repository.create(storage, **values)


def test_creating_again_opens_it(storage: LocalStorage) -> None:
    first = create(storage)
    assert create(storage, recipients=[PUBLIC]).header == first.header
    assert Repository.open(storage, expected_system=SYSTEM).header == first.header


def test_another_cluster_is_refused(storage: LocalStorage) -> None:
    create(storage)
    for act in (
        lambda: create(storage, system_identifier=8),
        lambda: create(storage, segment_bytes=1 << 20),
        lambda: Repository.open(storage, expected_system=8),
    ):
        with pytest.raises(WrongSystemError):
            act()


def test_what_is_no_repository_is_said(storage: LocalStorage) -> None:
    with pytest.raises(RepositoryFormatError, match="there is no repository here"):
        Repository.open(storage)
    assert not storage.root.exists()


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (b"", "header cannot be read"),
        (b"{", "header cannot be read"),
        (b"[]", "not a Knockwood repository"),
        (b"{}", "not a Knockwood repository"),
        (b'{"knockwood_repository": 1}', "header cannot be read"),
        (b'{"knockwood_repository": true}', "not a Knockwood repository"),
        (b'{"knockwood_repository": 0}', "not a Knockwood repository"),
        (json.dumps({"knockwood_repository": FORMAT + 1}).encode(), "reads up to"),
    ],
)
def test_headers_that_cannot_be_understood(storage: LocalStorage, header: bytes, error: str) -> None:
    storage.put_new("repository.json", [header])
    for act in (lambda: Repository.open(storage), lambda: create(storage)):
        with pytest.raises(RepositoryFormatError, match=error) as refused:
            act()
        assert (refused.value.hint is not None) == (error != "not a Knockwood repository")


def test_unknown_keys_of_the_header_are_kept_for_later_versions(storage: LocalStorage) -> None:
    header = create(storage).header
    value = header.to_json() | {"note": "added by a later version"}
    storage.delete("repository.json")
    storage.put_new("repository.json", [json.dumps(value).encode()])
    assert Repository.open(storage).header == header


@pytest.mark.parametrize("recipients", [(), (PUBLIC,)])
def test_content_is_stored_once_and_found(storage: LocalStorage, recipients: tuple[str, ...]) -> None:
    repository = create(storage, recipients=recipients, identities=[SECRET])
    stored = repository.put("wal/a", [b"abc", b"def"])
    assert stored.raw_bytes == 6
    path = storage.root / stored.name
    assert stored.bytes == path.stat().st_size
    assert b"".join(repository.read(stored.name)) == b"abcdef"
    assert repository.find("wal/a") == stored.name
    assert repository.find("wal/b") is None
    assert (b"abcdef" in path.read_bytes()) is (not recipients)
    for other in ((), (PUBLIC,)):
        with pytest.raises(ObjectExistsError):
            create(storage, recipients=other).put("wal/a", [b"other"])
    assert b"".join(repository.read(stored.name)) == b"abcdef"


def test_errors_of_content_name_the_object(storage: LocalStorage) -> None:
    repository = create(storage, recipients=[PUBLIC])
    stored = repository.put("a", [b"x"])
    with pytest.raises(WrongKeyError) as wrong:
        list(repository.read(stored.name))
    assert str(wrong.value.where).endswith(stored.name)
    with pytest.raises(ObjectMissingError):
        list(repository.read("b.zst"))
    storage.put_new("c.zst", [b"not zstd"])
    with pytest.raises(ObjectDamagedError) as damaged:
        list(repository.read("c.zst"))
    assert str(damaged.value.where).endswith("c.zst")
    with pytest.raises(ObjectDamagedError, match="not the name of encoded content"):
        list(repository.read("c.json"))


def test_json_is_plain_and_exact(storage: LocalStorage) -> None:
    repository = create(storage, recipients=[PUBLIC])
    value = {"b": [1, None, "é\n"], "a": {"x": 1.5}}
    repository.put_json("v.json", value)
    assert repository.get_json("v.json") == value
    assert json.loads((storage.root / "v.json").read_text()) == value
    with pytest.raises(ObjectExistsError):
        repository.put_json("v.json", value)
    with pytest.raises(ValueError):
        repository.put_json("w.json", float("nan"))
    storage.put_new("x.json", [b"\xff"])
    with pytest.raises(ObjectDamagedError):
        repository.get_json("x.json")


def test_bad_keys_are_told_at_once(storage: LocalStorage) -> None:
    with pytest.raises(SettingsError):
        create(storage, recipients=["age1x"])
    assert not storage.root.exists()
    create(storage)
    with pytest.raises(SettingsError):
        Repository.open(storage, identities=["nonsense"])


def test_secrets_are_not_shown(storage: LocalStorage) -> None:
    assert SECRET not in repr(create(storage, identities=[SECRET]))


class Overwriting(LocalStorage):
    """A store that does not know conditional writes, as some S3 servers do not."""

    def put_new(self, name: str, chunks: Any) -> int:
        self.delete(name)
        return super().put_new(name, chunks)


def test_a_storage_that_overwrites_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RepositoryFormatError, match="overwrites"):
        create(Overwriting(tmp_path))
