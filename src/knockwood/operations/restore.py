"""Restore a cluster to an exact point, into a folder of its own, ready to be started by its user."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from knockwood.clone import goal as goals
from knockwood.clone.goal import Goal
from knockwood.clone.spawn import Clone, Timings, control_data, fetch, make, require_room
from knockwood.clone.workspace import Workspace
from knockwood.errors import RecoveryFailedError
from knockwood.host import clock, files, memory, privileges
from knockwood.host.privileges import Account
from knockwood.model import Commit, Lsn, Timeline
from knockwood.operations import half_done
from knockwood.operations.recoveries import aware
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import connect, translated
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.model import Progress
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan, Target, resolve
from knockwood.repository.walk import Kept

SPOOL = "knockwood_wal"
_ARCHIVING_OFF = """
# knockwood restore, {moment}: this cluster was restored beside another. If it archived as the other did,
# both would write into one archive. Switch archiving on again once it has an archive of its own, or once
# the other is gone for good: ALTER SYSTEM RESET archive_mode, and restart.
archive_mode = 'off'
"""
_NO_CONFIG = """# The restored backup holds no {name}: it lay outside the data directory (as on Debian, in
# /etc/postgresql). knockwood restore wrote this one so that the cluster can start; put yours here.
"""
_LOCAL_ONLY = "local all all peer\n"


@dataclass(frozen=True, slots=True)
class RestoreOutcome:
    """A restored cluster. `reached_lsn` is the last position replayed; `seconds` from start to end.

    `how_to_start` holds shell lines; `warnings` what to know before. `timeline` is the cluster's own
    new one, or the target's where it was not promoted.
    """

    into: Path
    reached_lsn: Lsn
    last_commit: Commit | None
    plan: RestorePlan
    timeline: Timeline
    promoted: bool
    seconds: float
    timings: Timings
    how_to_start: tuple[str, ...]
    warnings: tuple[str, ...]


def restore(
    repository: Repository,
    target: Target,
    into: Path,
    *,
    backup: str | None = None,
    timeline: Timeline | None = None,
    accept_loss: bool = False,
    promote: bool = True,
    again: bool = False,
    tablespaces: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    programs_for: Callable[[int], Programs] = find_programs,
    account: Account | None = None,
    workers: int = 4,
) -> RestoreOutcome:
    """Restore the cluster as of `target` into `into`, which must be empty or not exist.

    With `promote` it ends shut down, on a timeline of its own; without, it waits at the target when it
    is started. Tablespaces go to `tablespaces` (by default `INTO-tablespaces`). `again` first removes what
    a killed restore left in `into`. Raises DirectoryNotEmptyError before anything is written, and
    TargetUnreachableError, NoSpaceError, RefusedError, RecoveryFailedError with everything removed again.
    """
    began = clock.monotonic()
    into = into.absolute()
    account = account or privileges.server_account()
    existed = into.exists()
    sockets = Path(tempfile.gettempdir()) / f"kw-{secrets.token_hex(4)}"
    work = half_done.begin(into, str(target), account=account, sockets=sockets, again=again)
    try:
        kept = _room_for_wal(work)
        plan = resolve(
            repository,
            target,
            backup=backup,
            timeline=timeline,
            accept_loss=accept_loss,
            programs_for=programs_for,
            keep=kept,
        )
        place = _claim_tablespaces(into, tablespaces, plan)
        plan = aware(repository, plan)
        require_room(into, plan, there=len(kept.sources) * repository.header.segment_bytes)
        workspace = Workspace(work / "cluster", account)
        workspace.create()
        programs = programs_for(plan.backup.major)
        clone = make(repository, plan, workspace, programs, sockets, "promote" if promote else "fail")
        clone.spool.adopt(kept, plan.wal)
        try:
            outcome = _bring_up(clone, into, place, promote, progress, workers)
        finally:
            clone.server.stop("immediate")
        half_done.finish(into, workspace.data)
    except BaseException:
        half_done.abandon(into, existed=existed)
        raise
    return replace(outcome, seconds=clock.monotonic() - began)


def _room_for_wal(work: Path) -> Kept:
    """Where WAL stays that is read to find the target: it need not be fetched and unpacked twice."""
    folder = work / "wal"
    with files.translated(folder):
        folder.mkdir(mode=0o700)
    return Kept(folder, files.free_bytes(folder) // 4)


def _claim_tablespaces(into: Path, wanted: Path | None, plan: RestorePlan) -> Path | None:
    if not plan.backup.tablespaces:
        return None
    place = wanted or into.with_name(f"{into.name}-tablespaces")
    half_done.claim_tablespaces(into, place)
    return place


def _bring_up(
    clone: Clone,
    into: Path,
    tablespaces: Path | None,
    promote: bool,
    progress: Callable[[Progress], None] | None,
    workers: int,
) -> RestoreOutcome:
    """Fetch, replay to the target, promote or not, shut down, and leave the data directory as its user's."""
    began = clock.monotonic()
    place = tablespaces or clone.workspace.tablespaces
    fetch(clone, "restore", tablespaces=place, progress=progress, workers=workers, flushing=True)
    # Nothing may be lost by a crash once the restore is complete: all is flushed at the end, at once.
    clone.recovery.settings |= {
        "fsync": "off",
        "max_wal_size": "4GB",
        "checkpoint_timeout": "30min",
        "shared_buffers": f"{_buffer_megabytes()}MB",
    }
    # One that waits at its target replays again when it is started; one that is promoted never does.
    clone.recovery.linked = promote
    _reserve_timelines(clone)
    reached = clone.replay(progress)
    warnings = _subscriptions(clone)
    if promote:
        clone.promote()
    timeline = _timeline(clone) if promote else clone.plan.timeline
    clone.stop()
    _require_state(clone, "shut down" if promote else "shut down in recovery")
    _settle(clone, into, timeline, promote)
    warnings += _complete_configuration(clone)
    _flush(clone, place)
    return RestoreOutcome(
        into=into,
        reached_lsn=reached,
        last_commit=clone.plan.last_commit,
        plan=clone.plan,
        timeline=timeline,
        promoted=promote,
        seconds=clock.monotonic() - began,
        timings=clone.timings,
        how_to_start=_how_to_start(into, clone.programs, clone.workspace.account, promote),
        warnings=(*clone.plan.warnings, *warnings),
    )


def _buffer_megabytes() -> int:
    # With few buffers replay writes and reads the same pages again and again.
    return max(64, min(512, memory.available() // 8 >> 20))


def _reserve_timelines(clone: Clone) -> None:
    """Make promotion choose a timeline that the archive has not seen, also one without a history."""
    archive = WalArchive(clone.repository)
    inventory = archive.inventory()
    later = {t for t in (*inventory.timelines, *inventory.histories) if t > clone.plan.timeline}
    clone.spool.fetch_histories(archive, sorted(later & set(inventory.histories)))
    for timeline in later - set(inventory.histories):
        clone.workspace.write(clone.spool.folder / f"{timeline:08X}.history", "# taken\n")


def _subscriptions(clone: Clone) -> list[str]:
    with connect(clone.dsn(clone.entrance)) as connection, translated():
        rows = connection.execute(
            "select subname from pg_catalog.pg_subscription where subenabled order by subname"
        ).fetchall()
    if not rows:
        return []
    names = ", ".join(row[0] for row in rows)
    return [
        (
            f"subscriptions would connect to their publishers ({names}): "
            "start with max_logical_replication_workers=0 unless this cluster replaces the other"
        )
    ]


def _timeline(clone: Clone) -> Timeline:
    with connect(clone.dsn(clone.entrance)) as connection, translated():
        row = connection.execute(
            "select pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8)"
        ).fetchone()
    assert row is not None
    return Timeline(int(row[0], 16))


def _require_state(clone: Clone, wanted: str) -> None:
    state = control_data(clone.programs, clone.data_directory).get("Database cluster state")
    if state != wanted:
        raise RecoveryFailedError(
            f"the restored cluster ended as {state!r} and not as {wanted!r}: {clone.server.log_tail(3)}",
            where=str(clone.data_directory),
        )


def _settle(clone: Clone, into: Path, timeline: Timeline, promote: bool) -> None:
    """The user's own configuration again, archiving off, and no trace of how it got here."""
    data = clone.data_directory
    kept = clone.workspace.kept_auto_config
    text = kept.read_text(errors="surrogateescape") if kept.exists() else ""
    text += _ARCHIVING_OFF.format(moment=clock.stamp(clock.now()))
    with files.translated(data):
        for name in ("backup_label.old", "tablespace_map.old", "backup_manifest", "postmaster.opts"):
            (data / name).unlink(missing_ok=True)
        if promote:
            _drop_old_wal(data / "pg_wal", timeline)
            # With archiving off nobody queued the history; an archive needs it before the first segment.
            ready = data / "pg_wal" / "archive_status" / f"{timeline:08X}.history.ready"
            clone.workspace.write(ready, "")
        else:
            spool = data / SPOOL
            clone.spool.folder.rename(spool)
            settings = goals.recovery_settings(Goal.of(clone.plan), into / SPOOL)
            text += "\n# It waits at its target, read-only, until it is promoted.\n" + goals.config_text(
                settings
            )
    path = data / "postgresql.auto.conf"
    files.replace(path, text.encode(errors="surrogateescape"))
    privileges.give(path, clone.workspace.account)


def _drop_old_wal(folder: Path, timeline: Timeline) -> None:
    # After a clean shutdown they are needed no more. Left here, the last one of the old timeline, cut
    # off at the target, would be archived under the name of the whole one.
    for name in os.listdir(folder):
        if len(name) == 24 and int(name[:8], 16) < timeline:
            (folder / name).unlink()


def _complete_configuration(clone: Clone) -> list[str]:
    """Write what a cluster cannot start without where the backup lacks it; says which."""
    written = []
    needed = goals.config_text(
        {k: v for k, v in clone.recovery.settings.items() if k in goals.REQUIRED_AT_LEAST}
    )
    for name, text in (("postgresql.conf", needed), ("pg_hba.conf", _LOCAL_ONLY), ("pg_ident.conf", "")):
        path = clone.data_directory / name
        if not path.exists():
            clone.workspace.write(path, _NO_CONFIG.format(name=name) + text)
            written.append(name)
    if not written:
        return []
    return [
        (
            f"the backup does not hold {', '.join(written)} (they lay outside the data directory):"
            " minimal ones were written; put yours in their place"
        )
    ]


def _flush(clone: Clone, tablespaces: Path) -> None:
    roots = (clone.data_directory, tablespaces) if clone.plan.backup.tablespaces else (clone.data_directory,)
    with files.translated(clone.data_directory):
        files.sync_trees(roots)


def _how_to_start(into: Path, programs: Programs, account: Account | None, promoted: bool) -> tuple[str, ...]:
    prefix = f"sudo -u {account.name} " if account else ""
    start = f"{prefix}{programs.path('pg_ctl')} -D {into} -l {into}.log start"
    lines = [start, f"{start} -o '-p 5433'    # while the other server runs on this machine"]
    if not promoted:
        lines.append(
            f"touch {into / SPOOL}/promote && psql -c 'select pg_promote()'    # to open it for writes"
        )
    return tuple(lines)
