"""Targets in archives of real servers: each leads to the right commit, or is refused with the last one."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_archive import (
    Archived,
    six_commits,
)
from fix_clones import protected
from knockwood.errors import TargetUnreachableError
from knockwood.model import Commit, Lsn, Timeline, WalSegment
from knockwood.repository.targets import BeforeXid, Latest, ToLsn, ToTime, resolve

if TYPE_CHECKING:
    from fix_server import ServerFactory


def _server(new_server: ServerFactory, major: int = 18) -> object:
    return new_server(major, segment_megabytes=1, wal_keep_size="200MB")


@pytest.fixture
def made(new_server: ServerFactory, tmp_path: Path) -> Archived:
    return six_commits(_server(new_server), tmp_path / "repository")  # type: ignore[arg-type]


def _xids(made: Archived) -> list[int]:
    return [commit.xid for commit in made.commits]


def _found(made: Archived) -> list[Commit]:
    """The six commits as the archive knows them."""
    return [commit for xid in _xids(made) if (commit := _commit_at(made, xid)) is not None]


def _commit_at(made: Archived, xid: int) -> Commit | None:
    plan = resolve(made.repository, BeforeXid(xid))
    assert plan.target_lsn is not None
    assert not plan.inclusive
    last = resolve(made.repository, ToLsn(plan.target_lsn)).last_commit
    assert last is not None
    assert last.xid == xid
    assert last.lsn == plan.target_lsn
    return last


def test_targets_lead_to_their_commits_on_every_version(
    new_server: ServerFactory, every_version: int, tmp_path: Path
) -> None:
    made = six_commits(_server(new_server, every_version), tmp_path / "r")  # type: ignore[arg-type]
    commits = _found(made)
    latest = resolve(made.repository, Latest())
    assert latest.last_commit == commits[-1]
    assert latest.target_lsn == commits[-1].lsn
    assert latest.inclusive
    assert latest.missing is None
    assert latest.backup == made.backups[0]
    assert [p.segment for p in latest.wal] == [
        WalSegment(Timeline(1), n, 1 << 20)
        for n in range(made.backups[0].start_lsn.value >> 20, (commits[-1].lsn.value >> 20) + 1)
    ]
    for before, commit in pairwise(commits):
        plan = resolve(made.repository, ToTime(before.time))
        assert (plan.target_lsn, plan.inclusive, plan.last_commit) == (commit.lsn, False, before)
        plan = resolve(made.repository, ToLsn(Lsn(commit.lsn.value - 1)))
        assert (plan.target_lsn, plan.inclusive) == (before.lsn, True)
    first = resolve(made.repository, ToLsn(made.backups[0].stop_lsn))
    assert first.target_lsn is None


def test_a_target_past_the_end_is_refused(made: Archived) -> None:
    last = resolve(made.repository, Latest()).last_commit
    assert last is not None
    with pytest.raises(TargetUnreachableError, match=f"transaction {last.xid}"):
        resolve(made.repository, ToTime(last.time + timedelta(seconds=1)))
    with pytest.raises(TargetUnreachableError, match=f"transaction {last.xid}"):
        resolve(made.repository, ToLsn(last.lsn + (10 << 20)))
    with pytest.raises(TargetUnreachableError, match="no commit of transaction"):
        resolve(made.repository, BeforeXid(last.xid + 1))
    plan = resolve(made.repository, ToTime(last.time + timedelta(seconds=1)), accept_loss=True)
    assert plan.last_commit == last
    assert plan.missing is not None
    assert resolve(made.repository, ToTime(last.time)).last_commit == last


def test_latest_is_refused_at_a_gap_and_names_the_last_commit(made: Archived) -> None:
    commits = _found(made)
    made.object(made.segments[3]).unlink()
    with pytest.raises(TargetUnreachableError) as refused:
        resolve(made.repository, Latest())
    text = str(refused.value)
    assert f"{made.segments[3]} is missing" in text
    assert f"transaction {commits[2].xid} at {commits[2].lsn}" in text
    assert "later WAL" in text
    plan = resolve(made.repository, Latest(), accept_loss=True)
    assert plan.last_commit == commits[2]
    assert plan.target_lsn == commits[2].lsn
    assert plan.missing is not None
    assert plan.missing.start == made.segments[3].start
    assert plan.missing.commits == 2
    assert plan.missing.end_time == commits[5].time
    assert resolve(made.repository, ToLsn(commits[2].lsn)).last_commit == commits[2]
    for target in (
        ToLsn(commits[3].lsn),
        ToLsn(commits[5].lsn),
        ToTime(commits[4].time),
        BeforeXid(commits[5].xid),
    ):
        with pytest.raises(TargetUnreachableError, match=f"transaction {commits[2].xid} at"):
            resolve(made.repository, target)


def test_wal_is_read_once_through_one_repository_object(made: Archived) -> None:
    """The second question reads nothing anew, unless an object is no longer the one that was read."""
    told: list[int] = []

    def progress(done: int, total: int) -> None:
        told.append(total)

    latest = resolve(made.repository, Latest(), progress=progress)
    assert told
    told.clear()
    assert resolve(made.repository, Latest(), progress=progress) == latest
    commit = latest.last_commit
    assert commit is not None
    assert resolve(made.repository, BeforeXid(commit.xid), progress=progress).target_lsn == commit.lsn
    assert told == []
    [path] = [
        path
        for path in (made.root / "wal").rglob(f"{latest.wal[0].segment.name}*")
        if "partial" not in path.parts
    ]
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(content[:-9] + bytes(9))
    with pytest.raises(TargetUnreachableError):
        resolve(made.repository, Latest(), progress=progress)


def test_wal_that_came_since_the_last_look_counts_unread_too(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        made.insert(1)
        made.execute("select pg_switch_wal()")
        # What was read ends with a segment, and is remembered.
        before = made.plan("latest")
        xid = made.insert(2)
        after = made.plan("latest", unread=True)
        assert before.last_commit is not None
        assert after.last_commit is not None
        assert (after.last_commit.xid, after.target_lsn) == (xid, after.last_commit.lsn)
        assert len(after.wal) > len(before.wal)
