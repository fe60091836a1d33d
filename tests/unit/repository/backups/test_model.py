"""What a backup says about itself survives JSON; chains are followed or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fix_archive import a_backup
from knockwood.errors import (
    ObjectDamagedError,
    ObjectMissingError,
    RepositoryFormatError,
    TargetUnreachableError,
)
from knockwood.model import Lsn, Verdict
from knockwood.repository.backups.model import Backup, BackupHealth, BadPage, Pack, Tablespace, chain

NOW = datetime(2026, 6, 1, 12, 30, tzinfo=UTC)


def example(id: str = "a", parent: str | None = None) -> Backup:
    return a_backup(id, 1, Lsn(5), Lsn(9), NOW, parent=parent)


@given(
    st.lists(st.builds(BadPage, st.text(), st.integers(0, 2**32), st.text()), max_size=4),
    st.lists(st.builds(Tablespace, st.integers(1, 2**32), st.text()), max_size=3),
    st.dictionaries(st.text(), st.text(), max_size=3),
    st.sampled_from(list(Verdict)),
    st.integers(0, 2**64 - 1),
)
def test_a_backup_survives_json(
    bad: list[BadPage],
    spaces: list[Tablespace],
    settings: dict[str, str],
    verdict: Verdict,
    system: int,
) -> None:
    backup = replace(
        example(),
        health=BackupHealth(verdict, tuple(bad), len(bad) + 3, "why"),
        tablespaces=tuple(spaces),
        settings=settings,
        system_identifier=system,
        packs=(Pack("p", 1, 2, "00"),),
    )
    assert Backup.from_json(json.loads(json.dumps(backup.as_json()))) == backup


@pytest.mark.parametrize("key", sorted(example().as_json().keys() - {"sha256"}))
def test_a_description_that_lacks_something_is_refused(key: str) -> None:
    value = example().as_json()
    del value[key], value["sha256"]
    with pytest.raises(RepositoryFormatError):
        Backup.from_json(value)


def test_a_description_of_the_first_versions_has_no_sha256_of_its_own() -> None:
    value = example().as_json()
    del value["sha256"]
    assert Backup.from_json(value) == example()


@pytest.mark.parametrize("key", ["stop_lsn", "checksums", "health", "sha256", "raw_bytes"])
def test_a_description_that_was_changed_is_damaged(key: str) -> None:
    value = example().as_json()
    value[key] = {"stop_lsn": "0/1", "checksums": not value["checksums"], "raw_bytes": -1}.get(key, "x")
    with pytest.raises(ObjectDamagedError, match="does not have its own sha256"):
        Backup.from_json(value)


@pytest.mark.parametrize("value", [None, [], 3, {}, "x", {"format": "x"}])
def test_what_is_no_description_is_refused(value: object) -> None:
    with pytest.raises(RepositoryFormatError):
        Backup.from_json(value)


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(RepositoryFormatError, match="newer"):
        Backup.from_json(example().as_json() | {"format": 2})


def test_a_chain_begins_with_its_full_backup() -> None:
    backups = [example("c", "b"), example("a"), example("b", "a"), example("z")]
    assert [backup.id for backup in chain(backups, "c")] == ["a", "b", "c"]
    assert [backup.id for backup in chain(backups, "z")] == ["z"]


def test_a_chain_with_a_hole_or_a_loop_is_refused() -> None:
    with pytest.raises(TargetUnreachableError):
        chain([example("c", "b")], "c")
    with pytest.raises(TargetUnreachableError):
        chain([example("c", "b"), example("b", "c")], "c")
    with pytest.raises(ObjectMissingError):
        chain([example("a")], "nothing")
