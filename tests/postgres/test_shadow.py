"""A shadow follows its archive, stands still before what was called damaged, and lends itself to repairs."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_clones import Protected, one, protected, rows
from knockwood.clone import Clone, spawn
from knockwood.clone.shadow_state import read_record, write_record
from knockwood.errors import HostError, LockHeldError, NoSpaceError, RefusedError
from knockwood.host import files, reflink
from knockwood.model import Finding, Location, Lsn, Severity, Timeline, Verdict, WalSegment
from knockwood.operations import shadow, shadow_steps
from knockwood.operations.cluster import Cluster
from knockwood.operations.restore_table import restore_table
from knockwood.operations.warm import clone_to_read
from knockwood.postgres.connection import connect
from knockwood.recover.table_definition import TableName
from knockwood.repository.archive import WalArchive
from knockwood.repository.targets import BeforeXid, RestorePlan
from knockwood.settings import parse

if TYPE_CHECKING:
    from fix_server import ServerFactory

_RULE = """
[[cluster.shop.invariant]]
name = "none below zero"
sql = "select a from t where a < 0"
"""
_RUN = """
import sys
from pathlib import Path
from knockwood.operations import shadow_steps
from knockwood.operations.cluster import Cluster
from knockwood.postgres.connection import connect
from knockwood.recover.table_definition import TableName
from knockwood.repository.archive import WalArchive
from knockwood.repository.targets import BeforeXid, RestorePlan
from knockwood.settings import parse
cluster = Cluster.of(parse(Path(sys.argv[1]).read_text()), "shop")
repository = cluster.repository()
print("ready", flush=True)
shadow_steps.step(cluster, repository, check=True)
print("done", flush=True)
"""


def settings_of(made: Protected, shadow_keys: str = "", rest: str = _RULE) -> str:
    return f"""
state = "{made.folder / "state"}"
[cluster.shop]
dsn = "{made.server.dsn()}"
repository = "{made.folder / "repository"}"
[cluster.shop.shadow]
enabled = true
behind = "0s"
checks = ["invariants"]
{shadow_keys}
{rest}"""


def cluster_of(made: Protected, shadow_keys: str = "", rest: str = _RULE) -> Cluster:
    return Cluster.of(parse(settings_of(made, shadow_keys, rest)), "shop")


def step(cluster: Cluster, made: Protected) -> shadow_steps.Step:
    made.flush()
    return shadow_steps.step(cluster, made.repository, check=True)


def reached(cluster: Cluster) -> Lsn:
    record = read_record(shadow.shadow_folder(cluster))
    assert record is not None
    assert record.stand is not None
    return record.stand.reached


def contents(cluster: Cluster, made: Protected) -> list[int]:
    """What the shadow holds where it stands."""
    with shadow.open_shadow(cluster, made.repository) as held:
        return rows(held.standing().dsn())


@pytest.mark.parametrize(
    "version", [pytest.param(15, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow), 18]
)
def test_it_follows_is_held_and_goes_on(new_server: ServerFactory, version: int) -> None:
    server = new_server(version, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        cluster = cluster_of(made)
        made.insert(1)
        made.backup()
        first = step(cluster, made)
        assert first.did == "made"
        assert first.proof is not None
        assert first.proof.verdict is Verdict.HELD
        assert contents(cluster, made) == [1]
        assert step(cluster, made).did in ("stood", "advanced")  # the end of the backup is a commit, or not
        made.insert(2)
        assert step(cluster, made).did == "advanced"
        assert contents(cluster, made) == [1, 2]
        clean = reached(cluster)
        # The next commit breaks a rule: the shadow goes back to before it and stays there.
        made.insert(-3)
        made.insert(4)
        broken = step(cluster, made)
        assert broken.did == "rebuilt"
        assert broken.proof is not None
        assert broken.proof.verdict is Verdict.BROKEN
        assert [hold.check for hold in broken.holds] == ["invariants"]
        assert reached(cluster) <= clean
        assert contents(cluster, made) == [1, 2]
        assert step(cluster, made).did == "held"
        assert contents(cluster, made) == [1, 2]
        told = shadow.status(cluster, made.repository)
        assert told.verdict is Verdict.BROKEN
        assert told.behind_bytes
        assert not told.past_hold
        # Mended, and released: it goes on over the bad commit, since what it was for is known.
        made.execute("delete from t where a < 0")
        shadow.release(cluster, broken.holds[0].id)
        assert step(cluster, made).did == "advanced"
        assert contents(cluster, made) == [1, 2, 4]
        assert shadow.status(cluster).verdict is Verdict.HELD
        assert shadow.remove(cluster, made.repository)
        assert shadow.status(cluster).record is None
        assert not (shadow.shadow_folder(cluster) / "clone").exists()
        with pytest.raises(HostError, match="no hold"):
            shadow.release(cluster, "x")


def test_damage_found_on_the_live_server_holds_it_where_the_finding_says(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        cluster = cluster_of(made)
        made.backup()
        made.insert(1)
        step(cluster, made)
        before = reached(cluster)
        made.insert(2)
        position = Lsn.parse(made.execute("select pg_current_wal_insert_lsn()::text")[0][0])
        made.insert(3)
        found = Finding("lost_writes", Severity.CRITICAL, Location(relation="t", lsn=position), "stale page")
        [set_] = shadow.hold_findings(cluster, [found, replace(found, severity=Severity.LOW)])
        assert set_.lsn == position
        assert shadow.hold_findings(cluster, [found]) == ()
        assert step(cluster, made).did == "advanced"
        assert contents(cluster, made) == [1, 2]
        assert before < reached(cluster) <= position
        assert step(cluster, made).did == "held"
        # One lower down, where it already is: everything of it is good for nothing, and it is made anew.
        lower = replace(found, location=Location(relation="t", lsn=before))
        shadow.hold_findings(cluster, [lower])
        assert shadow.status(cluster).past_hold
        shares = reflink.can_share(made.folder)
        plan = made.plan("latest")
        assert shares or shadow.warm_clone(cluster, made.repository, plan) is None
        assert step(cluster, made).did == "rebuilt"
        assert contents(cluster, made) == [1]
        unknown = replace(found, check="segment_files", location=Location(file="base/5/1"))
        assert shadow.hold_findings(cluster, [replace(unknown, check="page_checksums")]) == ()
        [stands] = shadow.hold_findings(cluster, [unknown])
        assert stands.lsn == reached(cluster)
        configuration = replace(found, check="configuration")
        assert shadow.hold_findings(cluster, [configuration]) == ()
        off = cluster_of(made, rest="").settings.model_copy(
            update={"shadow": cluster.settings.shadow.model_copy(update={"enabled": False})}
        )
        assert shadow.hold_findings(replace(cluster, settings=off), [unknown]) == ()


def test_it_is_lent_moved_copied_and_refused(
    new_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        cluster = cluster_of(made)
        made.backup()
        made.insert(1)
        step(cluster, made)
        made.insert(2)
        xid = made.insert(3)
        made.insert(4)
        before, latest = made.plan(f"before-{xid}"), made.plan("latest")
        with monkeypatch.context() as nothing_shared:
            nothing_shared.setattr(reflink, "can_share", lambda folder: False)
            warm = shadow.warm_clone(cluster, made.repository, before, registry=made.registry)
        assert warm is not None
        with warm:
            assert rows(warm.dsn()) == [1, 2]
            assert one(warm.dsn(), "select pg_is_in_recovery()")
            with pytest.raises(RefusedError, match="never promoted"):
                warm.promote()
            with pytest.raises(LockHeldError):
                shadow.open_shadow(cluster, made.repository)
            assert shadow.warm_clone(cluster, made.repository, latest, wait=0.1) is None
            assert shadow.status(cluster).busy
            warm.advance(replace(before, inclusive=True))
            assert rows(warm.dsn()) == [1, 2, 3]
        assert made.registry.records() == []
        assert shadow.warm_clone(cluster, made.repository, before) is None  # it stands past that now
        writable = shadow.warm_clone(cluster, made.repository, latest, writable=True, registry=made.registry)
        assert writable is not None
        with writable:
            assert rows(writable.dsn()) == [1, 2, 3, 4]
            writable.promote()
            assert len(made.registry.records()) == 1
        assert made.registry.records() == []
        assert contents(cluster, made) == [1, 2, 3]
        assert latest.target_lsn is not None
        shadow.hold(cluster, latest.target_lsn, "by hand")
        assert reflink.can_share(made.folder) or shadow.warm_clone(cluster, made.repository, latest) is None
        assert step(cluster, made).did == "held"


def test_a_kill_at_any_moment_is_made_good(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        cluster = cluster_of(made)
        config = tmp_path / "knockwood.toml"
        config.write_text(settings_of(made))
        made.backup()
        for number in range(1, 4):
            made.insert(number)
            made.flush()
            for seconds in (0.3 * number, 1.1 * number):
                child = subprocess.Popen([sys.executable, "-c", _RUN, config], stdout=subprocess.PIPE)
                assert child.stdout is not None
                with child.stdout:
                    assert child.stdout.readline() == b"ready\n"
                    try:
                        child.wait(seconds)
                    except subprocess.TimeoutExpired:
                        child.send_signal(signal.SIGKILL)
                    assert child.wait() in (0, -signal.SIGKILL)
            done = step(cluster, made)
            assert done.record.stage == "standing"
            assert contents(cluster, made) == list(range(1, number + 1))


def test_no_room_is_refused_before_anything_is_written(
    new_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        cluster = cluster_of(made)
        made.backup()
        made.insert(1)
        with monkeypatch.context() as full:
            full.setattr(files, "free_bytes", lambda path: 1000)
            with pytest.raises(NoSpaceError):
                step(cluster, made)
        assert shadow.status(cluster).record is None
        assert not (shadow.shadow_folder(cluster) / "clone").exists()
        step(cluster, made)
        made.insert(2)
        stood = reached(cluster)
        with monkeypatch.context() as full:
            full.setattr(files, "free_bytes", lambda path: 1000)
            with pytest.raises(NoSpaceError):
                step(cluster, made)
        assert reached(cluster) == stood
        assert step(cluster, made).did == "advanced"
        assert contents(cluster, made) == [1, 2]


def test_it_stays_behind(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.insert(1)
        made.backup()
        made.insert(2)
        far = cluster_of(made, 'folder = "' + str(made.folder / "far") + '"')
        far = replace(
            far,
            settings=far.settings.model_copy(
                update={"shadow": parse(settings_of(made).replace('"0s"', '"1h"')).cluster["shop"].shadow}
            ),
        )
        assert step(far, made).did == "made"
        assert contents(far, made) == [1]
        assert step(far, made).did == "stood"
        assert contents(far, made) == [1]


def test_wal_is_fetched_again_after_the_machine_was_started_anew(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        cluster = cluster_of(made)
        made.backup()
        made.insert(1)
        step(cluster, made)
        folder = shadow.shadow_folder(cluster)
        record = read_record(folder)
        assert record is not None
        assert record.spool
        # What was not flushed is lost: files of the right size that hold nothing.
        clone = folder / "clone"
        for path in (*(clone / "spool").iterdir(), *(clone / "data" / "pg_wal").iterdir()):
            if path.is_file():
                path.write_bytes(bytes(path.stat().st_size))
        write_record(folder, replace(record, boot="another"))
        made.insert(2)
        assert step(cluster, made).did == "advanced"
        assert contents(cluster, made) == [1, 2]


@pytest.mark.slow
def test_it_is_made_anew_after_a_failover_to_before_it(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        cluster = cluster_of(made)
        made.backup()
        made.insert(1)
        early = made.plan("latest")
        made.insert(2)
        step(cluster, made)
        assert contents(cluster, made) == [1, 2]
        # Somebody promotes a copy that had only the first row, and its WAL comes into the archive.
        with spawn(made.repository, early, purpose="failover", registry=made.registry) as other:
            other.promote()
            with connect(other.dsn()) as connection:
                connection.execute("set default_transaction_read_only = off")
                connection.execute("insert into t values (7)")
                connection.execute("select pg_switch_wal()")
            archive = WalArchive(made.repository)
            history = (other.data_directory / "pg_wal" / "00000002.history").read_text()
            archive.put_history(Timeline(2), history)
            for path in sorted((other.data_directory / "pg_wal").glob("00000002????????????????")):
                segment = WalSegment.parse(path.name, archive.segment_bytes)
                with connect(other.dsn()) as connection:
                    [(flushed,)] = connection.execute("select pg_current_wal_flush_lsn()::text").fetchall()
                if segment.end <= Lsn.parse(flushed):
                    archive.put_segment(segment, path)
        done = shadow_steps.step(cluster, made.repository, check=True)
        assert done.did == "rebuilt"
        assert "branched off" in done.waits_for
        assert done.record.timeline == 2
        assert contents(cluster, made) == [1, 7]


def test_a_repair_reads_from_it_unless_a_table_is_locked_there(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        cluster = cluster_of(made)
        made.execute("create table u as select 1 as a")
        made.backup()
        made.insert(1)
        step(cluster, made)
        with connect(server.dsn()) as connection, connection.transaction():
            connection.execute("drop table u")
            dropped = connection.execute("select pg_current_xact_id()::text").fetchone()
        assert dropped is not None
        made.insert(2)
        later = made.insert(3)
        # The DROP holds its lock just before its commit: whoever reads u there would wait for ever.
        assert clone_to_read(cluster, made.repository, made.plan(f"before-{dropped[0]}")) is None
        lent: list[Clone | None] = []

        def warm(plan: RestorePlan) -> Clone | None:
            lent.append(clone_to_read(cluster, made.repository, plan, registry=made.registry))
            return lent[-1]

        made.plan("latest")
        done = restore_table(
            made.repository,
            BeforeXid(later),
            TableName.parse("postgres.public.t"),
            live_dsn=server.dsn(),
            apply=True,
            registry=made.registry,
            warm=warm,
        )
        assert [clone is not None for clone in lent] == [True]
        assert made.execute(f"select a from {done.destination} order by 1") == [(1,), (2,)]
        assert made.registry.records() == []
        assert not shadow.status(cluster).busy
