"""A clone that is fed goes from commit to commit on one running server, and never stands in silence."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fix_clones import one, protected, rows
from knockwood.clone import feed
from knockwood.clone.partial import PartialClone, RelationKey, spawn_for, spawn_partial
from knockwood.clone.recovery import UnreadableError
from knockwood.postgres.connection import connect

if TYPE_CHECKING:
    from fix_server import ServerFactory

KEYS = [RelationKey("postgres", "public", "t")]


@pytest.mark.parametrize("version", [15, pytest.param(17, marks=pytest.mark.slow), 18])
def test_it_stops_before_and_after_every_commit_without_a_restart(
    new_server: ServerFactory, version: int
) -> None:
    server = new_server(version, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        xids = []
        for number in range(1, 31):
            xids.append(made.insert(number))
            if number % 10 == 0:
                # Over the border of a segment, and with a checkpoint to restart from.
                made.execute("select pg_logical_emit_message(false, 'x', repeat('y', 400000))")
                made.execute("checkpoint; select pg_switch_wal()")
        with spawn_partial(
            made.repository, made.plan(f"before-{xids[0]}"), KEYS, purpose="test", registry=made.registry
        ) as clone:
            pid = clone.server.pid
            for number, xid in enumerate(xids, 1):
                plan = made.plan(f"before-{xid}")
                clone.advance(plan)
                assert rows(clone.dsn(), "select count(*) from t") == [number - 1]
                assert plan.target_lsn is not None
                clone.advance(replace(plan, inclusive=True))
                assert rows(clone.dsn(), "select max(a) from t") == [number]
            assert clone.server.pid == pid
            assert one(clone.dsn(), "select pg_is_in_recovery()") is True


def test_where_nobody_may_read_the_whole_backup_is_restored(
    new_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "_SILENT_SECONDS", 2.0)
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made, connect(server.dsn()) as busy:
        # More subtransactions than a snapshot holds, open when the backup begins: a standby cannot know them.
        with busy.transaction():
            for number in range(70):
                with busy.transaction():
                    busy.execute("insert into t values (%s)", [-number])
            made.backup()
            xid = made.insert(1)
            made.insert(2)
            plan = made.plan(f"before-{xid}")
            with pytest.raises(UnreadableError, match="stands still"):
                spawn_partial(made.repository, plan, KEYS, purpose="test", registry=made.registry)
            with spawn_for(made.repository, plan, KEYS, purpose="test", registry=made.registry) as clone:
                assert not isinstance(clone, PartialClone)
                assert clone.promoted
                assert rows(clone.dsn(), "select a from t") == []
        assert made.registry.records() == []
