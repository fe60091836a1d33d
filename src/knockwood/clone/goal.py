"""Where recovery has to stop, and the settings that make a restored cluster stop there and nowhere else."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from knockwood.model.wal import Lsn, Timeline

if TYPE_CHECKING:
    from knockwood.repository.targets import RestorePlan

GUARD_STATUS: Final = 200
"""Exit status of restore_command that stops a promotion nobody asked for."""
COPY_FAILED_STATUS: Final = 201
"""Exit status of restore_command where copying a file failed (a full disk, a bad one)."""

REQUIRED_AT_LEAST: Final = {
    "max_connections": "max_connections setting",
    "max_worker_processes": "max_worker_processes setting",
    "max_wal_senders": "max_wal_senders setting",
    "max_prepared_transactions": "max_prepared_xacts setting",
    "max_locks_per_transaction": "max_locks_per_xact setting",
}
"""Settings a hot standby may not have lower than its primary had, and their names in pg_controldata."""


@dataclass(frozen=True, slots=True)
class Goal:
    """The stop of a recovery: before or after the record that starts at `lsn`.

    `lsn` None stops as soon as the backup is consistent. `consistent` is where that is.
    """

    timeline: Timeline
    lsn: Lsn | None
    inclusive: bool
    consistent: Lsn

    @classmethod
    def of(cls, plan: RestorePlan) -> Self:
        return cls(plan.timeline, plan.target_lsn, plan.inclusive, plan.chain[-1].stop_lsn)

    def __str__(self) -> str:
        if self.lsn is None:
            return "the end of the backup"
        side = "after" if self.inclusive else "before"
        return f"{side} the record at {self.lsn} on timeline {self.timeline}"


def restore_command(spool: Path, timeline: Timeline, *, linked: bool = False) -> str:
    """A shell line that copies WAL from the spool, and no more: no interpreter starts for each segment.

    With `linked` a segment is the very file of the spool where both lie on one file system: what is
    written into it once the server is promoted is written into the spool too.

    Promotion begins by asking for the history of the timeline after `timeline`. Until the file
    `promote` lies in the spool that question ends the server instead, with nothing changed on disk:
    PostgreSQL promotes in silence, whatever recovery_target_action says, where it reaches the target
    before it could let anyone in (more than 64 open subtransactions are enough).
    """
    folder = shlex.quote(str(spool)).replace("%", "%%")
    asked = f"{timeline + 1:08X}.history"
    link = f"ln {folder}/%f %p 2>/dev/null || " if linked else ""
    return (
        f"if test %f = {asked} && ! test -f {folder}/promote; then exit {GUARD_STATUS}; fi; "
        f"test -f {folder}/%f || exit 1; {link}cp {folder}/%f %p || exit {COPY_FAILED_STATUS}"
    )


def recovery_settings(goal: Goal, spool: Path, *, linked: bool = False) -> dict[str, str]:
    """What leads recovery to the goal and pauses it there; `linked` as for `restore_command`."""
    settings = {
        "restore_command": restore_command(spool, goal.timeline, linked=linked),
        "recovery_target_timeline": str(goal.timeline),
        "recovery_target_action": "pause",
        "hot_standby": "on",
    }
    if goal.lsn is None:
        settings["recovery_target"] = "immediate"
    else:
        settings["recovery_target_lsn"] = str(goal.lsn)
        settings["recovery_target_inclusive"] = "on" if goal.inclusive else "off"
    return settings


def isolation_settings(major: int, work: Path, purpose: str, at_least: Mapping[str, int]) -> dict[str, str]:
    """What keeps a restored cluster away from production: its archive, standbys, ports, publishers.

    `at_least` holds the primary's values of REQUIRED_AT_LEAST.
    """
    settings = {
        "listen_addresses": "",
        "hba_file": str(work / "hba.conf"),
        "ident_file": str(work / "ident.conf"),
        "external_pid_file": "",
        "unix_socket_permissions": "0700",
        "unix_socket_group": "",
        "ssl": "off",
        "cluster_name": cluster_name(purpose),
        # Nothing may leave for the archive, and nothing may come from a primary or a publisher.
        "archive_mode": "off",
        "archive_command": "",
        "archive_cleanup_command": "",
        "recovery_end_command": "",
        "primary_conninfo": "",
        "primary_slot_name": "",
        "recovery_min_apply_delay": "0",
        "synchronous_standby_names": "",
        "max_logical_replication_workers": "0",
        # No slot exists here; the number also bounds the origins of a subscriber's commits, which replay
        # must find room for.
        "max_replication_slots": "1000",
        # Libraries of the production server may not exist here, and their workers must not run.
        "shared_preload_libraries": "",
        "session_preload_libraries": "",
        "local_preload_libraries": "",
        "jit": "off",
        "autovacuum": "off",
        "max_standby_archive_delay": "-1",
        "shared_buffers": "64MB",
        "huge_pages": "try",
        "logging_collector": "off",
        "log_destination": "stderr",
        "log_line_prefix": "%m [%p] ",
        "log_min_messages": "warning",
        "log_statement": "none",
        "lc_messages": "C",
        "wal_level": "replica",
    }
    if major >= 15:
        settings["archive_library"] = ""
    else:
        settings["stats_temp_directory"] = "pg_stat_tmp"
    if major <= 15:
        settings["promote_trigger_file"] = ""
    if major >= 18:
        settings["max_active_replication_origins"] = "1000"
    if major >= 17:
        settings |= {"summarize_wal": "off", "sync_replication_slots": "off", "event_triggers": "off"}
    return settings | {name: str(at_least[name]) for name in REQUIRED_AT_LEAST if name in at_least}


def commit_timestamps(control: Mapping[str, str]) -> dict[str, str]:
    """Keep commit times where the primary kept them: promotion deletes them where the setting is off."""
    return {"track_commit_timestamp": "on"} if control.get("track_commit_timestamp setting") == "on" else {}


def throw_away_settings(read_only: bool) -> dict[str, str]:
    """What a cluster may set that nobody needs after a crash."""
    settings = {
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "max_wal_size": "4GB",
        "checkpoint_timeout": "30min",
    }
    return settings | ({"default_transaction_read_only": "on"} if read_only else {})


def cluster_name(purpose: str) -> str:
    """A cluster_name that shows in process lists: printable ASCII, at most 63 bytes."""
    clean = "".join(letter if 32 <= ord(letter) < 127 else "?" for letter in purpose)
    return f"knockwood {clean}"[:63].strip()


def config_text(settings: Mapping[str, str]) -> str:
    """The settings as a configuration file; raises ValueError for a value that cannot stand in one."""
    lines = []
    for name, value in settings.items():
        if "\n" in value or "\0" in value:
            raise ValueError(f"a line break in {name}")
        escaped = value.replace("\\", "\\\\").replace("'", "''")
        lines.append(f"{name} = '{escaped}'\n")
    return "".join(lines)


def parse_control_data(text: str) -> dict[str, str]:
    """What pg_controldata printed, by label."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {label.strip(): value.strip() for label, colon, value in pairs if colon}


def required_at_least(control: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, int]:
    """The primary's values of REQUIRED_AT_LEAST: the larger of control file and backup."""
    needed: dict[str, int] = {}
    for name, label in REQUIRED_AT_LEAST.items():
        known = [value for value in (control.get(label), settings.get(name)) if value and value.isdigit()]
        if known:
            needed[name] = max(int(value) for value in known)
    return needed
