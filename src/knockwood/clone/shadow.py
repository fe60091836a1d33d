"""A clone that lives on: replayed further and further from the repository, never past what was called damaged.

Its folder outlives processes and the machine's restarts; only one process works on it at a time, and between
two steps none does, so that a repair can borrow it. It is no throw-away clone: it flushes what it writes.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final, Self

from knockwood.clone import goal as goals
from knockwood.clone.copies import copy_of
from knockwood.clone.follow import Follower, needed, redo_position
from knockwood.clone.registry import Registry, stop_server
from knockwood.clone.shadow_state import (
    Holds,
    ProofSoFar,
    ShadowRecord,
    Stand,
    boot_id,
    read_record,
    write_record,
)
from knockwood.clone.spawn import Clone, Report, control_data, fetch, make, require_room
from knockwood.clone.workspace import Workspace
from knockwood.errors import RefusedError, TargetUnreachableError
from knockwood.host import clock, files, reflink
from knockwood.host.locks import file_lock
from knockwood.host.privileges import Account
from knockwood.model import Lsn, Verdict, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.repository.archive import WalArchive
from knockwood.repository.onward import Bounds, newest_timeline, onward
from knockwood.repository.repository import Repository
from knockwood.repository.route import Reach, Route
from knockwood.repository.targets import RestorePlan, WalPiece

LOCK: Final = "shadow.lock"
_CLONE: Final = "clone"


@dataclass(slots=True)
class Lent(Follower):
    """The shadow itself, lent out: `advance` moves it, `destroy` gives it back. It is never promoted."""

    shadow: Shadow | None = None

    def advance(self, plan: RestorePlan, progress: Report | None = None) -> Lsn:
        assert self.shadow is not None
        return self.shadow.go(plan, progress)

    def promote(self) -> None:
        raise RefusedError(
            "a shadow is never promoted: it could not follow any more",
            hint="borrow a copy of it (writable)",
        )

    def destroy(self) -> None:
        assert self.shadow is not None
        self.shadow.close()


class Shadow:
    """The shadow of one folder, ours alone from `open` to `close`."""

    def __init__(
        self,
        repository: Repository,
        folder: Path,
        programs_for: Callable[[int], Programs],
        account: Account | None,
    ) -> None:
        self.repository = repository
        self.folder = folder
        self.holds = Holds(folder)
        self.record: ShadowRecord | None = None
        self.lent: Lent | None = None
        self._programs_for = programs_for
        self._account = account
        self._held = ExitStack()

    @classmethod
    def open(
        cls,
        repository: Repository,
        folder: Path,
        *,
        programs_for: Callable[[int], Programs],
        account: Account | None = None,
    ) -> Self:
        """Take the folder; no server is started. What a killed process left is set right.

        Raises LockHeldError while another process works on it.
        """
        shadow = cls(repository, folder.absolute(), programs_for, account)
        files.make_folder(shadow.folder, 0o711)
        shadow._held.enter_context(file_lock(shadow.folder / LOCK, "process with this shadow"))
        try:
            shadow._take_over()
        except BaseException:
            shadow._held.close()
            raise
        return shadow

    def _take_over(self) -> None:
        self.record = read_record(self.folder)
        if self.record is None:
            return
        if self.record.chain[-1].system_identifier != self.repository.header.system_identifier:
            raise RefusedError(
                "the folder holds the shadow of another cluster",
                where=str(self.folder),
                hint="give each cluster's shadow a folder of its own",
            )
        stop_server(self.root / "data")
        if self.record.sockets.name.startswith("kw-"):
            files.remove_tree(self.record.sockets)
        if self.record.stage == "making":
            self.remove()

    @property
    def root(self) -> Path:
        return self.folder / _CLONE

    @property
    def ready(self) -> bool:
        """Whether there is a shadow that can go on."""
        return self.record is not None and self.record.stage != "making"

    @property
    def position(self) -> Lsn:
        """No record at or after this was replayed; while it was moving, as far as it was going."""
        assert self.record is not None
        assert self.record.position is not None
        return self.record.position

    @property
    def past_hold(self) -> bool:
        """Whether it may have replayed what was called damaged since: then it is good for nothing more."""
        bound = self.holds.bound()
        return self.ready and bound is not None and self.position > bound.lsn

    # --- life ---------------------------------------------------------------------------------------------

    def make(self, cluster: str, plan: RestorePlan, progress: Report | None = None) -> None:
        """Restore the plan as a new shadow. Raises NoSpaceError before anything is written.

        A kill leaves a record that says so, and the next `open` removes what there is.
        """
        if self.record is not None:
            raise RefusedError("there is a shadow already", where=str(self.folder))
        self.require_allowed(plan)
        require_room(self.root, plan)
        moment = clock.now()
        sockets = Path(tempfile.gettempdir()) / f"kw-{self._tag()}"
        self._write(ShadowRecord(cluster, plan.chain, plan.timeline, "making", sockets, moment, moment))
        try:
            workspace = Workspace(self.root, self._account)
            if self.root.exists():
                files.remove_tree(self.root)
            workspace.create()
            clone = self._clone(plan, workspace, sockets)
            fetch(clone, f"shadow of {cluster}", tablespaces=workspace.tablespaces, progress=progress)
            clone.recovery.settings |= self._own_settings()
            clone.replay(progress)
            clone.recovery.settle()
            # The files of the backup were written without a flush each.
            reflink.flush(self.root)
            self.lent = clone
            self._stand(plan, clone.reached_lsn)
        except BaseException:
            self.remove()
            raise

    def go(self, plan: RestorePlan, progress: Report | None = None) -> Lsn:
        """Replay on to a plan's target, or stand up again where it stands; the position reached.

        Written down before and after, so that a kill in between is known and made good by going on.
        Raises RefusedError beyond a hold or for an earlier position.
        """
        assert self.record is not None
        clone = self._attached()
        self.require_allowed(plan)
        clone._settle()
        stand = self.record.stand
        assert stand is not None
        same = (plan.target_lsn, plan.inclusive) == (stand.lsn, stand.inclusive)
        if same and self.record.going_to is None:
            onto = self._here(clone, plan)
        else:
            if plan.target_lsn is None or plan.target_lsn < clone.reached_lsn:
                raise RefusedError(
                    f"the shadow stands at {stand.reached} already, past {plan.target_lsn}",
                    hint="make a clone for the earlier point",
                )
            onto = needed(clone, plan)
            self._write(replace(self.record, stage="moving", going_to=plan.target_lsn))
        self._prune(clone)
        clone.fill_spool(onto, progress)
        clone.plan = onto
        clone.replay(progress)
        self._stand(onto, clone.reached_lsn)
        return clone.reached_lsn

    def _here(self, clone: Lent, plan: RestorePlan) -> RestorePlan:
        """The plan to stand up where it stands: at the end of a backup there is no commit to aim at."""
        if plan.target_lsn is not None:
            return needed(clone, plan)
        route = Route(WalArchive(self.repository).inventory(), plan.timeline)
        pieces = route.pieces(redo_position(clone), plan.backup.stop_lsn)
        wal = tuple(WalPiece(segment, partial.name if partial else None) for segment, partial in pieces)
        histories = tuple(step[0] for step in route.path if step[0] in route.inventory.histories)
        return replace(plan, wal=wal, histories=histories)

    def next_plan(self, until: datetime | None = None) -> tuple[RestorePlan | None, Reach]:
        """The plan to the newest commit it may go on to (none later than `until`), and where whole WAL ends.

        None where there is none. Raises TargetUnreachableError if the newest timeline is not its own future.
        """
        clone, record = self._attached(), self.record
        assert record is not None
        assert record.stand is not None
        inventory = WalArchive(self.repository).inventory()
        timeline = newest_timeline(inventory)
        if not Route(inventory, timeline).holds(record.timeline, self.position):
            raise TargetUnreachableError(
                f"the shadow went on along timeline {record.timeline}, timeline {timeline} branched off before",
                hint="it has to be made anew",
            )
        bound = self.holds.bound()
        after = record.going_to if record.going_to is not None else record.stand.reached
        bounds = Bounds(after, bound.lsn if bound is not None else None, until)
        found = onward(self.repository, redo_position(clone), bounds, clone.programs, timeline=timeline)
        if found.commit is None:
            return None, found.reach
        plan = RestorePlan(
            record.chain, timeline, found.commit.lsn, True, found.pieces, found.histories, found.commit, None
        )
        return plan, found.reach

    def copy(
        self,
        plan: RestorePlan,
        purpose: str,
        registry: Registry | None = None,
        progress: Report | None = None,
    ) -> Clone:
        """A throw-away copy, advanced to the plan's target; the shadow stays where it stands.

        A copy may go past a hold, as any clone may. Raises NoSpaceError before anything is written.
        """
        source = self._attached()
        if plan.target_lsn is None or plan.target_lsn < source.reached_lsn:
            raise RefusedError("the shadow stands past that point", hint="make a clone for it")
        made, _ = copy_of(source, purpose, registry=registry)
        copy = Follower(
            made.repository, made.plan, made.workspace, made.recovery, made.spool, "promote", entry=made.entry
        )
        copy.reached_lsn = made.reached_lsn
        # Nobody needs a copy after a crash.
        copy.recovery.settings |= goals.throw_away_settings(read_only=True)
        try:
            copy.advance(plan, progress)
        except BaseException:
            copy.destroy()
            raise
        return copy

    def lend(self, plan: RestorePlan, progress: Report | None = None) -> Lent:
        """The shadow itself, moved to the plan's target; its `destroy` closes this object."""
        self.go(plan, progress)
        assert self.lent is not None
        return self.lent

    def proved(self, proof: ProofSoFar) -> None:
        """Write down what the checks said where it stands; if they found nothing, it is the last clean stand."""
        assert self.record is not None
        good = self.record.good if proof.verdict is Verdict.BROKEN else self.record.stand
        self._write(replace(self.record, proof=proof, good=good))

    def standing(self) -> Lent:
        """The clone, paused where it stands; started if it is down."""
        clone = self._attached()
        if not clone.server.running:
            self.go(clone.plan)
        return clone

    def remove(self) -> None:
        """Remove the shadow; the holds stay."""
        if self.lent is not None:
            self.lent.server.stop("immediate")
            self.lent = None
        stop_server(self.root / "data")
        with files.translated(self.root):
            files.remove_tree(self.root)
        (self.folder / "shadow.json").unlink(missing_ok=True)
        self.record = None

    def close(self) -> None:
        """Stop the server where it stands and let others work on the folder."""
        try:
            if self.lent is not None and self.lent.server.running:
                try:
                    self.lent.recovery.settle()
                except Exception:
                    self.lent.server.stop("immediate")
                    raise
        finally:
            self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- parts --------------------------------------------------------------------------------------------

    def follows(self, plan: RestorePlan) -> bool:
        """Whether its past is part of the plan's timeline."""
        assert self.record is not None
        route = Route(WalArchive(self.repository).inventory(), plan.timeline)
        return route.holds(self.record.timeline, self.position)

    def require_allowed(self, plan: RestorePlan) -> None:
        """Raise RefusedError if the plan's target lies past a hold."""
        bound = self.holds.bound()
        if bound is None:
            return
        end = plan.backup.stop_lsn if plan.target_lsn is None else plan.target_lsn
        if end > bound.lsn or (end == bound.lsn and plan.inclusive and plan.target_lsn is not None):
            raise RefusedError(
                f"the shadow may not pass {bound.lsn}: {bound.reason}",
                hint=f"once it is mended: knockwood shadow release {bound.id}",
            )

    def _attached(self) -> Lent:
        """The clone of the record, its server down until it is told where to go."""
        if self.lent is not None:
            return self.lent
        record = self.record
        if record is None or record.stand is None:
            raise RefusedError("there is no shadow yet", hint="knockwood shadow run")
        stand = record.stand
        plan = RestorePlan(
            record.chain, record.timeline, stand.lsn, stand.inclusive, (), (), stand.commit, None
        )
        workspace = Workspace(self.root, self._account)
        clone = self._clone(plan, workspace, record.sockets)
        control = control_data(clone.programs, workspace.data)
        at_least = goals.required_at_least(control, record.backup.settings)
        settings = goals.isolation_settings(
            clone.programs.major, workspace.root, f"shadow of {record.cluster}", at_least
        )
        clone.recovery.settings = settings | goals.commit_timestamps(control) | self._own_settings()
        clone.reached_lsn = stand.reached
        if record.boot and record.boot == boot_id():
            clone.spool.sources = dict(record.spool or {})
        self.lent = clone
        return clone

    def _clone(self, plan: RestorePlan, workspace: Workspace, sockets: Path) -> Lent:
        made = make(self.repository, plan, workspace, self._programs_for(plan.backup.major), sockets, "fail")
        return Lent(made.repository, plan, workspace, made.recovery, made.spool, "fail", shadow=self)

    def _own_settings(self) -> dict[str, str]:
        # It must be whole after a crash of the machine, so it flushes; all else is as in any clone.
        return goals.throw_away_settings(read_only=True) | {
            "fsync": "on",
            "max_wal_size": "1GB",
            "checkpoint_timeout": "5min",
        }

    def _stand(self, plan: RestorePlan, reached: Lsn) -> None:
        assert self.record is not None
        stand = Stand(plan.target_lsn, plan.inclusive, reached, plan.last_commit)
        spool = dict(self.lent.spool.sources) if self.lent is not None else {}
        self._write(
            replace(
                self.record,
                timeline=plan.timeline,
                stage="standing",
                stand=stand,
                going_to=None,
                spool=spool,
                boot=boot_id(),
            )
        )

    def _prune(self, clone: Lent) -> None:
        """Remove WAL from the spool that no restart of recovery will ask for."""
        redo, size = redo_position(clone), self.repository.header.segment_bytes
        for path in list(clone.spool.folder.iterdir()):
            try:
                segment = WalSegment.parse(path.name, size)
            except ValueError:
                continue
            if segment.end <= redo:
                path.unlink(missing_ok=True)
                clone.spool.sources.pop(path.name, None)

    def _write(self, record: ShadowRecord) -> None:
        record = replace(record, updated_at=clock.now())
        write_record(self.folder, record)
        self.record = record

    def _tag(self) -> str:
        return hashlib.sha256(f"{self.folder}{secrets.token_hex(8)}".encode()).hexdigest()[:8]
