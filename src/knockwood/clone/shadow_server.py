"""The server of a shadow, which runs on between two steps: who keeps it, and the proof that it is the one.

It is a child of the process that started it, and ends with that. Any other one that has the shadow's lock may
read from it and feed it; it gives it back running.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from knockwood.clone import goal as goals
from knockwood.clone.follow import redo_position
from knockwood.clone.recovery import Recovery
from knockwood.clone.shadow_state import Serving, ShadowRecord, boot_id
from knockwood.clone.spawn import Clone, control_data
from knockwood.errors import HostError, KnockwoodError
from knockwood.host import others
from knockwood.host.processes import ProcessIdentity
from knockwood.model import Lsn, WalSegment
from knockwood.postgres.connection import Connection, translated
from knockwood.postgres.server import LocalServer

_LOG_BYTES: Final = 1 << 20

_STANDS: Final = """
select (select system_identifier from pg_catalog.pg_control_system()), pg_catalog.pg_is_in_recovery(),
       pg_catalog.pg_last_wal_replay_lsn()::text, pg_catalog.pg_backend_pid()
"""
_END_OTHERS: Final = """
select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity
where backend_type = 'client backend' and pid <> pg_catalog.pg_backend_pid()
"""


@dataclass(slots=True)
class Keeper:
    """Holds the server that this process started, from one step to the next."""

    server: LocalServer | None = None

    def has(self, pid: int) -> LocalServer | None:
        """Our own server, if that is its postmaster."""
        return self.server if self.server is not None and self.server.pid == pid else None

    def keep(self, server: LocalServer) -> None:
        """Have this one from now on. One that somebody stopped meanwhile is reaped (its socket's folder is ours)."""
        if self.server is not None and self.server is not server and self.server.running:
            self.end()
        self.server = server

    def end(self) -> None:
        """Stop it where it stands; what it has not written yet it replays again at its next start."""
        if self.server is not None:
            self.server.stop("immediate")
            self.server = None


def settings_of(clone: Clone, record: ShadowRecord) -> dict[str, str]:
    """The configuration of the shadow's server but for its goal."""
    control = control_data(clone.programs, clone.data_directory)
    at_least = goals.required_at_least(control, record.backup.settings)
    settings = goals.isolation_settings(
        clone.programs.major, clone.workspace.root, f"shadow of {record.cluster}", at_least
    )
    return settings | goals.commit_timestamps(control) | own_settings()


def own_settings() -> dict[str, str]:
    """What differs from a clone that is thrown away."""
    return goals.throw_away_settings(read_only=True) | {
        # It must be whole after a crash of the machine, so it flushes.
        "fsync": "on",
        "max_wal_size": "1GB",
        "checkpoint_timeout": "5min",
        # A standby replays what it finds in pg_wal: nothing may lie there but what it was given.
        "wal_recycle": "off",
        "log_checkpoints": "off",
    }


def serving(server: LocalServer) -> Serving | None:
    """What to write down of a server of ours that runs."""
    if server.pid is None:
        return None
    with suppress(HostError):
        postmaster = ProcessIdentity.of(server.pid)
        return Serving(postmaster.pid, postmaster.started, os.getpid())
    return None


def adopt(recovery: Recovery, record: ShadowRecord, system_identifier: int, keeper: Keeper | None) -> bool:
    """Take over the server that the record tells of; whether it runs, and stands exactly where the record says.

    Whatever else is connected to it (the queries of a process that was killed) is ended: it would hold up replay.
    """
    told, stand = record.serving, record.stand
    if told is None or stand is None or record.stage != "standing":
        return False
    if not record.boot or record.boot != boot_id() or not _is_the_one(told, recovery.workspace.data):
        return False
    own = keeper.has(told.pid) if keeper is not None else None
    if own is not None:
        recovery.server = own
    else:
        recovery.server.adopt(ProcessIdentity(told.pid, told.started), record.sockets)
    try:
        connection = recovery.log_in()
        if connection is None:
            return False
        with connection:
            return _stands(connection, told, system_identifier, stand.reached)
    except KnockwoodError:
        return False


def _is_the_one(told: Serving, data_directory: Path) -> bool:
    """Whether that very process works in this folder, and the one it ends with still lives."""
    one = others.Found(ProcessIdentity(told.pid, told.started))
    return one.poll() is None and one.parent == told.parent and one.works_in(data_directory)


def _stands(connection: Connection, told: Serving, system_identifier: int, reached: Lsn) -> bool:
    with translated():
        row = connection.execute(_STANDS).fetchone()
        assert row is not None
        system, recovering, position, backend = row
        right = (
            recovering
            and system % (1 << 64) == system_identifier
            and position is not None
            and Lsn.parse(position) == reached
            and backend in {child.pid for child in others.children_of(told.pid)}
        )
        if right:
            connection.execute(_END_OTHERS)
    return bool(right)


def prune(clone: Clone, segment_bytes: int) -> None:
    """Remove WAL from the spool that no restart of recovery will ask for, and a log that has grown long."""
    redo = redo_position(clone)
    for path in list(clone.spool.folder.iterdir()):
        try:
            segment = WalSegment.parse(path.name, segment_bytes)
        except ValueError:
            continue
        if segment.end <= redo:
            path.unlink(missing_ok=True)
            clone.spool.sources.pop(path.name, None)
    with suppress(OSError):
        if clone.workspace.log.stat().st_size > _LOG_BYTES:
            # The server appends, whatever is cut away.
            os.truncate(clone.workspace.log, 0)
