"""A cluster's shadow: how it stands, what holds it back, and how repairs borrow it."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from knockwood.clone.registry import Registry
from knockwood.clone.shadow import LOCK, Shadow
from knockwood.clone.shadow_server import Keeper
from knockwood.clone.shadow_state import Hold, Holds, ShadowRecord, read_record
from knockwood.clone.spawn import Clone, Report
from knockwood.errors import (
    KnockwoodError,
    LockHeldError,
    NoSpaceError,
    RefusedError,
)
from knockwood.host import clock, files, privileges, reflink
from knockwood.host.locks import file_lock
from knockwood.model import Finding, Lsn, Severity, Verdict
from knockwood.operations.cluster import Cluster
from knockwood.operations.examination import ABOUT_THE_SERVER
from knockwood.repository.archive import WalArchive
from knockwood.repository.onward import newest_timeline
from knockwood.repository.repository import Repository
from knockwood.repository.route import Route
from knockwood.repository.targets import RestorePlan

NOT_DAMAGE: Final = ABOUT_THE_SERVER | {"collations", "wraparound"}
"""Checks whose findings say nothing about what is in the pages and rows of the archive."""

_NOT_IN_WAL: Final = frozenset({"page_checksums"})

_POLL: Final = 0.1

_START_BYTES: Final = 4 << 30
"""Reading so much WAL for some blocks takes as long as it takes the shadow to start: docs/repair-speed.md."""
_REPLAY: Final = 4
"""How many times as long a byte of WAL takes the shadow, which replays it for all tables."""


@dataclass(frozen=True, slots=True)
class ShadowStatus:
    """A shadow as it is written down. `behind_bytes` is the WAL in the archive that it has not replayed."""

    folder: Path
    enabled: bool
    record: ShadowRecord | None
    holds: tuple[Hold, ...]
    busy: bool
    behind_bytes: int | None
    shares_bytes: bool | None

    @property
    def past_hold(self) -> bool:
        """Whether it has replayed what was called damaged since."""
        if self.record is None or self.record.stand is None:
            return False
        return any(hold.active and self.record.stand.reached > hold.lsn for hold in self.holds)

    @property
    def verdict(self) -> Verdict:
        """Of the last checks; broken while a hold is active, not checked where nothing was."""
        if any(hold.active for hold in self.holds):
            return Verdict.BROKEN
        proof = self.record.proof if self.record is not None else None
        return proof.verdict if proof is not None else Verdict.NOT_CHECKED


def shadow_folder(cluster: Cluster) -> Path:
    return (cluster.settings.shadow.folder or cluster.state / cluster.name / "shadow").absolute()


def open_shadow(
    cluster: Cluster, repository: Repository, keeper: Keeper | None = None, *, wait: float = 0
) -> Shadow:
    """The cluster's shadow, ours until it is closed; LockHeldError while another process has it for `wait` s."""
    _open_up(cluster)
    deadline = clock.monotonic() + wait
    while True:
        try:
            return _open_now(cluster, repository, keeper)
        except LockHeldError:
            if clock.monotonic() >= deadline:
                raise
            clock.sleep(_POLL)


def _open_now(cluster: Cluster, repository: Repository, keeper: Keeper | None) -> Shadow:
    return Shadow.open(
        repository,
        shadow_folder(cluster),
        programs_for=cluster.programs,
        account=privileges.server_account(),
        keeper=keeper,
    )


def _open_up(cluster: Cluster) -> None:
    """Let the account of root's servers pass through (not list) our own folders on the way to the shadow."""
    if cluster.settings.shadow.folder is not None or not privileges.is_root():
        return
    folder = shadow_folder(cluster)
    files.make_folder(folder, 0o711)
    for each in (folder, *folder.parents[:2]):
        mode = stat.S_IMODE(each.stat().st_mode)
        if mode & 0o111 != 0o111:
            each.chmod(mode | 0o111)


# --- holds -------------------------------------------------------------------------------------------------


def hold_for(holds: Holds, findings: Iterable[Finding], at: Lsn) -> tuple[Hold, ...]:
    """Holds for what says that data are damaged: where the finding says, or else at `at`."""
    made = []
    for found in findings:
        if found.check in NOT_DAMAGE or found.severity not in (Severity.CRITICAL, Severity.HIGH):
            continue
        place = str(replace(found.location, lsn=None, key=None))
        if found.check == "invariants":
            place = str(found.evidence.get("invariant", place))
        lsn = found.location.lsn if found.location.lsn is not None else at
        hold = holds.add(lsn, found.summary, found.check, place)
        if hold is not None:
            made.append(hold)
    return tuple(made)


def hold_findings(cluster: Cluster, findings: Iterable[Finding]) -> tuple[Hold, ...]:
    """Set holds for damage that was found on the live server; nothing without a shadow in the settings.

    A finding that does not say since when holds the shadow where it stands, or is going. A page that fails
    its checksum holds nothing: PostgreSQL cannot read it, so it never comes into the WAL.
    """
    if not cluster.settings.shadow.enabled:
        return ()
    folder = shadow_folder(cluster)
    record = read_record(folder)
    stand = record.position if record is not None else None
    damage = [
        found
        for found in findings
        if found.check not in _NOT_IN_WAL and (found.location.lsn is not None or stand is not None)
    ]
    return hold_for(Holds(folder), damage, stand if stand is not None else Lsn(0))


def hold(cluster: Cluster, lsn: Lsn, reason: str) -> Hold:
    """Set a hold by hand: the shadow may replay no record that starts at or after `lsn`."""
    made = Holds(shadow_folder(cluster)).add(lsn, reason)
    assert made is not None
    return made


def release(cluster: Cluster, id: str) -> Hold:
    """Release a hold; HostError for an unknown one."""
    return Holds(shadow_folder(cluster)).release(id)


# --- status, removal ----------------------------------------------------------------------------------------


def status(cluster: Cluster, repository: Repository | None = None) -> ShadowStatus:
    """How the shadow stands; starts and waits for nothing."""
    folder = shadow_folder(cluster)
    record = read_record(folder)
    behind = None
    if repository is not None and record is not None and record.stand is not None:
        inventory = WalArchive(repository).inventory()
        end = Route(inventory, newest_timeline(inventory)).archive_end()
        behind = max(0, end - record.stand.reached)
    sharing = reflink.can_share(folder) if folder.is_dir() else None
    holds = Holds(folder).all()
    return ShadowStatus(
        folder, cluster.settings.shadow.enabled, record, holds, _busy(folder), behind, sharing
    )


def _busy(folder: Path) -> bool:
    if not (folder / LOCK).exists():
        return False
    try:
        with file_lock(folder / LOCK, "process with this shadow"):
            return False
    except LockHeldError:
        return True


def remove(cluster: Cluster, repository: Repository) -> bool:
    """Remove the shadow, its holds too; whether there was one. LockHeldError while a process works on it."""
    folder = shadow_folder(cluster)
    there = folder.is_dir()
    if not there:
        return False
    with file_lock(folder / LOCK, "process with this shadow"):
        Shadow(repository, folder, cluster.programs, None).remove()
        with files.translated(folder):
            files.remove_tree(Holds(folder).folder)
    return there


# --- lending ------------------------------------------------------------------------------------------------


def warm_clone(
    cluster: Cluster,
    repository: Repository,
    plan: RestorePlan,
    *,
    writable: bool = False,
    wait: float = 30,
    registry: Registry | None = None,
    progress: Report | None = None,
) -> Clone | None:
    """A clone at the plan's target in seconds, from the shadow; None where it cannot give one.

    It is a copy where the caller will open it for writes (`writable`), or where the file system shares bytes and
    the shadow is to stay where it is (it is kept `behind`, or a hold is in between); else the shadow itself, moved
    on to the target, without a restart where its server runs: `promote` is refused, `destroy` gives it back. Use
    it as any clone, as a context manager; `advance` goes on. None: no shadow, it stands past the target or
    on another timeline, another process keeps it for `wait` seconds, or anything else that a cold clone
    (`clone.spawn`) may not be troubled by. The shadow itself never passes a hold; a copy may, since at one
    target it is no worse than a cold clone.
    """
    if not cluster.settings.shadow.enabled or plan.target_lsn is None:
        return None
    try:
        shadow = open_shadow(cluster, repository, wait=wait)
    except KnockwoodError:
        return None
    lent = False
    try:
        if not _can_serve(shadow, plan):
            return None
        stays = bool(cluster.settings.shadow.behind) or not _may_move(shadow, plan)
        if writable or (stays and reflink.can_share(shadow.root)):
            with suppress(NoSpaceError):
                return shadow.copy(plan, "warm clone", registry or _registry(cluster), progress)
            if writable:
                return None
        if not _may_move(shadow, plan):
            return None
        clone = shadow.lend(plan, progress)
        lent = True
        return clone
    except KnockwoodError:
        return None
    finally:
        if not lent:
            with suppress(KnockwoodError):
                shadow.close()


def beats_some_blocks(cluster: Cluster, plan: RestorePlan) -> bool:
    """Whether the shadow would give some blocks of a table sooner than a clone of them is made.

    That one has to read the plan's WAL; the shadow has to replay all that it lacks, and to start where it is down.
    """
    record = read_record(shadow_folder(cluster)) if cluster.settings.shadow.enabled else None
    if record is None or record.stand is None or plan.target_lsn is None:
        return False
    lacks = max(0, plan.target_lsn - record.stand.reached)
    start = 0 if record.serving is not None else _START_BYTES
    return sum(piece.segment.bytes for piece in plan.wal) > start + _REPLAY * lacks


def _registry(cluster: Cluster) -> Registry:
    return Registry(cluster.settings.proof.clones or cluster.state)


def _can_serve(shadow: Shadow, plan: RestorePlan) -> bool:
    if not shadow.ready or plan.target_lsn is None:
        return False
    record = shadow.record
    assert record is not None
    stand = record.stand
    assert stand is not None
    same = record.going_to is None and (stand.lsn, stand.inclusive) == (plan.target_lsn, plan.inclusive)
    # While it was moving it may be anywhere up to where it went; the very commit it went to is fine.
    floor = record.going_to if record.going_to is not None else stand.reached
    if not same and plan.target_lsn < floor:
        return False
    if record.going_to is not None and plan.target_lsn == record.going_to and not plan.inclusive:
        return False
    return shadow.follows(plan)


def _may_move(shadow: Shadow, plan: RestorePlan) -> bool:
    try:
        shadow.require_allowed(plan)
    except RefusedError:
        return False
    return not shadow.past_hold


def as_json(status: ShadowStatus) -> dict[str, Any]:
    """The JSON keys of a status."""
    record = status.record
    value: dict[str, Any] = {
        "folder": str(status.folder),
        "enabled": status.enabled,
        "busy": status.busy,
        "holds": [hold.as_json() for hold in status.holds if hold.active],
        "past_hold": status.past_hold,
        "behind_bytes": status.behind_bytes,
        "shares_bytes": status.shares_bytes,
    }
    if record is not None:
        value |= {
            "backup": record.backup.id,
            "timeline": record.timeline,
            "stage": record.stage,
            "reached_lsn": str(record.stand.reached) if record.stand else None,
            "last_commit": record.stand.commit.as_json() if record.stand and record.stand.commit else None,
            "proof": record.proof.as_json() if record.proof else None,
            "updated_at": record.updated_at.isoformat(),
        }
    return value
