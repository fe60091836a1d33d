"""What was proved is kept, and what an earlier version kept is read."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from knockwood.model import Timeline, WalSegment
from knockwood.repository import proved
from knockwood.repository.proved import Proved, State
from knockwood.repository.repository import Repository
from knockwood.repository.route import SegmentFacts
from knockwood.repository.storage.local import LocalStorage

MEGABYTE = 1 << 20
NOW = datetime(2026, 11, 28, tzinfo=UTC)


def repository(folder: Path) -> Repository:
    storage = LocalStorage(folder)
    return Repository.create(storage, cluster="shop", system_identifier=7, segment_bytes=MEGABYTE)


@pytest.mark.parametrize("makes", [True, False, None])
def test_whether_a_segment_makes_a_tablespace_is_remembered(tmp_path: Path, makes: bool | None) -> None:
    store = repository(tmp_path)
    facts = SegmentFacts(WalSegment(Timeline(1), 3, MEGABYTE), makes_tablespace=makes)
    entry = Proved("wal/a.zst", 10, NOW, NOW, facts)
    proved.save(store, State({entry.name: entry}))
    loaded = proved.load(store, store.storage.list(proved.FOLDER))
    assert loaded.objects == {entry.name: entry}


def test_what_an_earlier_version_proved_does_not_tell_of_tablespaces(tmp_path: Path) -> None:
    store = repository(tmp_path)
    facts = SegmentFacts(WalSegment(Timeline(1), 3, MEGABYTE), makes_tablespace=False)
    proved.save(store, State({"wal/a.zst": Proved("wal/a.zst", 10, NOW, NOW, facts)}))
    [path] = (tmp_path / "verified").iterdir()
    value = json.loads(path.read_text())
    del value["objects"][0][4]["tablespace"]
    path.write_text(json.dumps(value))
    loaded = proved.load(store, store.storage.list(proved.FOLDER))
    found = loaded.objects["wal/a.zst"].facts
    assert found is not None
    assert found.makes_tablespace is None
