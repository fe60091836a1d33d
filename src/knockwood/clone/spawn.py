"""Make a clone: a restored cluster at an exact LSN, paused, isolated, and proven to be all that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from knockwood.clone import goal as goals
from knockwood.clone.goal import Goal
from knockwood.clone.partial_wal import LockFilter
from knockwood.clone.recovery import Recovery, UnreadableError
from knockwood.clone.registry import Entry, Registry, sign
from knockwood.clone.spool import Spool, refuse_new_tablespaces
from knockwood.clone.workspace import Workspace
from knockwood.errors import KnockwoodError, RefusedError, UnsupportedVersionError, WrongSystemError
from knockwood.host import clock, files, privileges, processes
from knockwood.host.privileges import Account
from knockwood.model.wal import Lsn, WalSegment
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.server import LocalServer
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.fetch import fetch_chain
from knockwood.repository.backups.model import Progress
from knockwood.repository.backups.partial import Part
from knockwood.repository.repository import Repository
from knockwood.repository.targets import read_through

if TYPE_CHECKING:
    from knockwood.repository.plans import WalPiece
    from knockwood.repository.targets import RestorePlan

Report = Callable[[Progress], None]
Unreadable = Literal["promote", "fail"]

_MARGIN = 128 * 1024 * 1024
_REPLAY_WAL = 4 * 1024 * 1024 * 1024


@dataclass(slots=True)
class Timings:
    """Seconds: files of the backup, WAL into the spool, replay to the goal."""

    fetch: float = 0.0
    wal: float = 0.0
    replay: float = 0.0


@dataclass(slots=True)
class Clone:
    """A restored cluster that stands at `reached_lsn`, read-only and paused unless `promoted`.

    Its server is a child of this process. As a context manager it is destroyed at the end.
    """

    repository: Repository
    plan: RestorePlan
    workspace: Workspace
    recovery: Recovery
    spool: Spool
    unreadable: Unreadable = "promote"
    keep: bool = False
    entry: Entry | None = None
    reached_lsn: Lsn = field(default_factory=lambda: Lsn(0))
    promoted: bool = False
    timings: Timings = field(default_factory=Timings)
    lock_filter: LockFilter | None = None
    harmless_to: Lsn = field(default_factory=lambda: Lsn(0))
    """Up to where the WAL was seen to make no tablespace."""
    whole_because: str = ""
    """Why this is a clone of everything where one of some relations was asked for."""

    @property
    def server(self) -> LocalServer:
        return self.recovery.server

    @property
    def entrance(self) -> str:
        """The database to log in to where none is meant."""
        return self.recovery.entrance

    @property
    def data_directory(self) -> Path:
        return self.workspace.data

    @property
    def programs(self) -> Programs:
        return self.server.programs

    def held(self, relation: tuple[int, int, int]) -> frozenset[int] | None:
        """Which blocks of a relation (tablespace, database, file) can be read: None, all of them."""
        return None

    def dsn(self, database: str = "postgres") -> str:
        """A connection string, as a superuser of the restored cluster whatever its name."""
        return self.recovery.dsn(database)

    def advance(self, plan: RestorePlan, progress: Report | None = None) -> Lsn:
        """Replay on to a later goal of the same cluster; the position reached.

        Raises RefusedError for an earlier goal or a promoted clone: those need a clone of their own.
        """
        self._require_onward(plan)
        plan = read_through(self.repository, plan, lambda _: self.programs)
        if self.server.running:
            self.recovery.settle()
        self.fill_spool(plan, progress)
        self.plan = plan
        return self.replay(progress)

    def _require_onward(self, plan: RestorePlan) -> None:
        if self.promoted:
            raise RefusedError("a promoted clone cannot replay on", hint="make a new clone instead")
        system = self.plan.backup.system_identifier
        if plan.backup.system_identifier != system:
            raise WrongSystemError("the plan is for another cluster")
        if plan.target_lsn is None or plan.target_lsn < self.reached_lsn:
            raise RefusedError(
                f"the clone has replayed to {self.reached_lsn} already, past {Goal.of(plan)}",
                hint="make a new clone for the earlier point",
            )

    def fill_spool(self, plan: RestorePlan, progress: Report | None = None, workers: int = 4) -> None:
        """Fetch the plan's WAL and histories, and refuse WAL that would write outside of the clone."""
        began = clock.monotonic()
        archive = WalArchive(self.repository)
        missing = self.spool.missing(plan.wal)
        needed = len(missing) * archive.segment_bytes
        files.require_space(self.workspace.root, needed + min(needed, _REPLAY_WAL) + _MARGIN, "the WAL")
        self.spool.fetch_histories(archive, plan.histories)
        with closing(self.spool.arriving(archive, plan.wal, workers=workers, progress=progress)) as segments:
            self._look_through(plan, missing, segments)
        self.timings.wal = clock.monotonic() - began

    def _look_through(
        self, plan: RestorePlan, missing: Sequence[WalPiece], segments: Iterator[WalSegment]
    ) -> None:
        """Look through the plan's WAL as it comes into the spool; `missing` came anew."""
        for _ in segments:
            pass
        self._refuse_tablespaces(plan, missing)
        if self.lock_filter is not None:
            start = plan.backup.start_lsn
            if self.lock_filter.reached is not None:
                # A record that crosses into a segment that came anew may have its kind in that one.
                anew = (Lsn(piece.segment.start.value - piece.segment.bytes) for piece in missing)
                start = max(start, min([self.lock_filter.reached, *anew]))
            self.lock_filter.apply([piece.segment for piece in plan.wal], start)

    def _refuse_tablespaces(self, plan: RestorePlan, missing: Iterable[WalPiece]) -> None:
        end = plan.target_lsn or plan.backup.stop_lsn
        # Whoever read the WAL to find the target has seen most often that there is none.
        if not all(piece.makes_tablespace is False for piece in plan.wal):
            # A goal is a record's start, so going on from the last one skips none.
            begin = min([self.harmless_to, *(piece.segment.start for piece in missing)])
            refuse_new_tablespaces(
                self.programs,
                self.spool.folder,
                (piece.segment for piece in plan.wal),
                max(plan.backup.start_lsn, begin),
                end,
            )
        self.harmless_to = max(self.harmless_to, end)

    def replay(self, progress: Report | None = None) -> Lsn:
        """Run recovery to the plan's goal; the position reached, asserted."""
        began = clock.monotonic()
        goal = Goal.of(self.plan)
        order = {piece.segment.name: number for number, piece in enumerate(self.plan.wal)}

        def watch(segment: str) -> None:
            if progress is not None and segment in order:
                size = self.plan.wal[0].segment.bytes
                progress(Progress(order[segment] * size, len(order) * size, "replay"))

        try:
            self.reached_lsn = self.recovery.run(goal, watch=watch)
        except UnreadableError:
            if self.unreadable == "fail":
                raise
            # The data is exactly what was asked for; only the pause cannot be had.
            self.reached_lsn = self.recovery.run(goal, promote=True, watch=watch)
            self.promoted = True
        self.timings.replay = clock.monotonic() - began
        return self.reached_lsn

    def promote(self) -> None:
        """Open the clone for writes, on a timeline of its own; it can never replay on after that."""
        if not self.promoted:
            self.recovery.promote()
            self.promoted = True

    def stop(self) -> None:
        """Shut the server down and keep the files."""
        self.server.stop("fast")

    def destroy(self) -> None:
        """Stop the server and remove everything, or with `keep` only what the registry knows of it."""
        self.server.stop("fast" if self.keep else "immediate")
        if self.entry is None:
            return
        if self.keep:
            self.entry.close()
        else:
            self.entry.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()


def make(
    repository: Repository,
    plan: RestorePlan,
    workspace: Workspace,
    programs: Programs,
    sockets: Path,
    unreadable: Unreadable = "promote",
) -> Clone:
    """A clone of which nothing is fetched yet; UnsupportedVersionError for programs of another version."""
    major = plan.backup.major
    if programs.major != major:
        raise UnsupportedVersionError(
            f"the backup is of PostgreSQL {major}, the programs are of {programs.major}",
            where=str(programs.folder),
        )
    server = LocalServer(
        programs,
        workspace.data,
        account=workspace.account,
        settings={"config_file": str(workspace.config)},
        log_path=workspace.log,
    )
    recovery = Recovery(workspace, server, {}, sockets)
    return Clone(repository, plan, workspace, recovery, Spool(workspace.spool, workspace.account), unreadable)


def require_room(root: Path, plan: RestorePlan, there: int = 0) -> None:
    """Raise NoSpaceError unless the backup, its WAL and some room to work fit where `root` is or will be.

    `there`: bytes that lie there already, and are used or go before more comes. An incremental chain is
    unpacked before it is combined, so it needs the full backup's size once more.
    """
    chain = plan.chain
    backup = sum(link.raw_bytes for link in chain) + (chain[0].raw_bytes if len(chain) > 1 else 0)
    wal = sum(piece.segment.bytes for piece in plan.wal)
    needed = backup + wal + min(wal, _REPLAY_WAL) + _MARGIN
    files.require_space(root, max(0, needed - there), "the restored cluster")


def fetch(
    clone: Clone,
    purpose: str,
    *,
    tablespaces: Path,
    progress: Report | None = None,
    workers: int = 4,
    part: Part | None = None,
    flushing: bool = False,
    after_files: Callable[[], None] = lambda: None,
) -> None:
    """Bring backup and WAL into the workspace and settle the server's configuration but for the goal.

    With `part` only those files of the backup, with `flushing` on their way to the disk already. `after_files`
    is called when the files are there.
    """
    if clone.plan.backup.tablespaces:
        files.make_folder(tablespaces, 0o711)
        privileges.give(tablespaces, clone.workspace.account)
    with ThreadPoolExecutor(1, thread_name_prefix="clone-wal") as beside:
        wal = beside.submit(clone.fill_spool, clone.plan, None, workers)
        _fetch_files(clone, purpose, tablespaces, progress, workers, part, flushing)
        after_files()
    wal.result()


def _fetch_files(
    clone: Clone,
    purpose: str,
    tablespaces: Path,
    progress: Report | None,
    workers: int,
    part: Part | None,
    flushing: bool,
) -> None:
    began = clock.monotonic()
    workspace, chain = clone.workspace, clone.plan.chain
    fetch_chain(
        clone.repository,
        chain,
        workspace.data,
        account=workspace.account,
        programs=clone.programs,
        tablespace_root=tablespaces,
        workers=workers,
        progress=progress,
        sync=False,
        flushing=flushing,
        part=part,
    )
    workspace.detach()
    control = control_data(clone.programs, workspace.data)
    needed = goals.required_at_least(control, clone.plan.backup.settings)
    clone.recovery.settings = goals.isolation_settings(clone.programs.major, workspace.root, purpose, needed)
    clone.recovery.settings |= goals.commit_timestamps(control)
    clone.timings.fetch = clock.monotonic() - began


def control_data(programs: Programs, data_directory: Path) -> dict[str, str]:
    """What pg_control says, by pg_controldata's labels."""
    command: list[str | Path] = [programs.path("pg_controldata"), "-D", data_directory]
    return goals.parse_control_data(processes.run(command, env={"LC_ALL": "C"}, timeout=60).out)


def spawn(
    repository: Repository,
    plan: RestorePlan,
    *,
    into: Path | None = None,
    programs: Programs | None = None,
    purpose: str,
    progress: Report | None = None,
    keep: bool = False,
    account: Account | None = None,
    read_only: bool = True,
    settings: Mapping[str, str] | None = None,
    unreadable: Unreadable = "promote",
    workers: int = 4,
    registry: Registry | None = None,
    free_of_locks: bool = False,
) -> Clone:
    """Restore the plan into a throw-away cluster that stands paused at the plan's target.

    `into` is a folder that does not exist or is empty; by default one of the registry's. `settings`
    beat the clone's own (such as shared_preload_libraries, empty otherwise). `unreadable` says what
    happens where PostgreSQL cannot pause: a promoted, read-only clone of the same data, or UnreadableError.
    With `free_of_locks` also relations that a transaction in progress there had locked (a DROP or TRUNCATE
    about to commit) can be read; otherwise reading them waits for ever. Clones of dead processes are removed
    first. Raises NoSpaceError before anything is written, RecoveryFailedError if the target was not reached;
    TargetUnreachableError where the plan's WAL was unread and is not whole.
    """
    programs = programs or find_programs(plan.backup.major)
    plan = read_through(repository, plan, lambda _: programs)
    registry = registry or Registry()
    with suppress(KnockwoodError):  # somebody else's leftovers are no reason to fail
        registry.sweep()
    entry = registry.enter(purpose, into)
    try:
        workspace = Workspace(entry.record.root, account or privileges.server_account())
        clone = make(repository, plan, workspace, programs, entry.record.socket_directory, unreadable)
        clone.entry = entry
        if free_of_locks:
            clone.lock_filter = LockFilter(programs, clone.spool.folder, plan.backup.segment_bytes)
        require_room(workspace.root, plan)
        workspace.create(lambda: sign(entry.record))
    except BaseException:
        entry.remove()
        raise
    try:
        fetch(clone, purpose, tablespaces=workspace.tablespaces, progress=progress, workers=workers)
        clone.recovery.settings |= goals.throw_away_settings(read_only) | dict(settings or {})
        clone.replay(progress)
    except BaseException:
        clone.destroy()
        raise
    clone.keep = keep
    return clone
