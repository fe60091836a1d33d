"""What is written down about a shadow comes back as it was; holds are durable, and unreadable ones hold all."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fix_archive import a_backup
from knockwood.clone.shadow_state import (
    HOLDS,
    RECORD,
    Holds,
    ProofSoFar,
    Serving,
    ShadowRecord,
    Stand,
    read_record,
    write_record,
)
from knockwood.errors import HostError
from knockwood.model import Commit, Lsn, Timeline, Verdict

NOW = datetime(2026, 11, 21, 4, 45, tzinfo=UTC)


def record() -> ShadowRecord:
    stand = Stand(Lsn(300), True, Lsn(340), Commit(757, Lsn(300), NOW))
    return ShadowRecord(
        cluster="shop",
        chain=(a_backup("20261121T000000Z-full", 1, Lsn(100), Lsn(200), NOW),),
        timeline=Timeline(1),
        stage="moving",
        sockets=Path("/tmp/kw-x"),
        made_at=NOW,
        updated_at=NOW,
        stand=stand,
        going_to=Lsn(400),
        good=Stand(None, True, Lsn(200), None),
        proof=ProofSoFar(Lsn(340), Verdict.HELD, NOW, (("invariants", Verdict.HELD, ""),)),
        spool={"000000010000000000000001": None},
        boot="b",
        serving=Serving(4711, 12.25, 4700),
    )


def test_a_record_comes_back(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    write_record(tmp_path, record())
    assert read_record(tmp_path) == record()


def test_a_record_from_before_servers_ran_on_tells_of_none(tmp_path: Path) -> None:
    value = record().as_json()
    del value["serving"]
    (tmp_path / RECORD).write_text(json.dumps(value))
    assert read_record(tmp_path) == replace(record(), serving=None)


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2}', "[]", '{"format": 1}'])
def test_a_record_that_cannot_be_understood_is_no_missing_one(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(HostError, match="cannot be read"):
        read_record(tmp_path)


def test_the_lowest_active_hold_bounds(tmp_path: Path) -> None:
    holds = Holds(tmp_path)
    assert holds.bound() is None
    high = holds.add(Lsn(500), "a stale page", "lost_writes", "relation t")
    assert high is not None
    assert holds.add(Lsn(600), "again, higher", "lost_writes", "relation t") is None
    low = holds.add(Lsn(400), "again, lower", "lost_writes", "relation t")
    assert low is not None
    assert holds.bound() == low
    by_hand = [holds.add(Lsn(450), "by hand"), holds.add(Lsn(450), "by hand")]
    assert None not in by_hand
    holds.release(low.id)
    bound = Holds(tmp_path).bound()
    assert bound is not None
    assert bound.lsn == Lsn(450)
    assert holds.add(Lsn(300), "the same, known", "lost_writes", "relation t") is None
    holds.forget(frozenset({"invariants"}))
    assert len(holds.all()) == 4
    holds.forget(frozenset({"lost_writes"}))
    assert len(holds.all()) == 3
    with pytest.raises(HostError, match="no hold"):
        holds.release("nobody")


def test_an_unreadable_hold_holds_everything(tmp_path: Path) -> None:
    holds = Holds(tmp_path)
    holds.add(Lsn(500), "by hand")
    (tmp_path / HOLDS / "20261121T000000Z-aaaaaa.json").write_text('{"id"')
    bound = holds.bound()
    assert bound is not None
    assert bound.lsn == Lsn(0)
