"""A clone that lives on: replayed further and further from the repository, never past what was called damaged.

Its folder outlives processes and the machine's restarts; only one process works on it at a time. Between two
steps none does, so that a repair can borrow it, but its server may run on (`shadow_server`). It is no throw-away
clone: it flushes what it writes.
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
from knockwood.clone.feed import FedRecovery
from knockwood.clone.follow import Follower, needed, redo_position
from knockwood.clone.goal import Goal
from knockwood.clone.registry import Registry, stop_server
from knockwood.clone.shadow_server import Keeper, adopt, own_settings, prune, serving, settings_of
from knockwood.clone.shadow_state import (
    Holds,
    ProofSoFar,
    ShadowRecord,
    Stand,
    boot_id,
    read_record,
    write_record,
)
from knockwood.clone.spawn import Clone, Report, fetch, make, require_room
from knockwood.clone.workspace import Workspace
from knockwood.errors import RecoveryFailedError, RefusedError, TargetUnreachableError
from knockwood.host import clock, files, reflink
from knockwood.host.locks import file_lock
from knockwood.host.privileges import Account
from knockwood.model import Lsn, Verdict
from knockwood.postgres.binaries import Programs
from knockwood.repository.archive import WalArchive
from knockwood.repository.onward import Bounds, newest_timeline, onward, require_unbroken
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
        keeper: Keeper | None = None,
    ) -> None:
        self.repository = repository
        self.folder = folder
        self.holds = Holds(folder)
        self.record: ShadowRecord | None = None
        self.lent: Lent | None = None
        self._programs_for = programs_for
        self._account = account
        self._keeper = keeper
        self._held = ExitStack()

    @classmethod
    def open(
        cls,
        repository: Repository,
        folder: Path,
        *,
        programs_for: Callable[[int], Programs],
        account: Account | None = None,
        keeper: Keeper | None = None,
    ) -> Self:
        """Take the folder; no server is started. What a killed process left is set right.

        A server that was left running there is used, if it is proven to stand where the record says, and left
        running again. With `keeper` that holds for one that is started here, too: it ends with this process.
        Raises LockHeldError while another process works on it.
        """
        shadow = cls(repository, folder.absolute(), programs_for, account, keeper)
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
        if self._adopts():
            return
        self._stop_all()
        if self.record.sockets.name.startswith("kw-"):
            files.remove_tree(self.record.sockets)
        if self.record.stage == "making":
            self.remove()

    def _adopts(self) -> bool:
        """Whether the server was left running where the record says; it is this object's then."""
        assert self.record is not None
        if self.record.serving is None or self.record.stage != "standing":
            return False
        clone = self._attached()
        identifier = self.repository.header.system_identifier
        if adopt(clone.recovery, self.record, identifier, self._keeper):
            return True
        self.lent = None
        return False

    def _stop_all(self) -> None:
        """Stop whatever works in the folder."""
        if self._keeper is not None:
            self._keeper.end()
        stop_server(self.root / "data")

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
            clone.recovery.settings |= own_settings()
            clone.replay(progress)
            clone.recovery.settle()
            # The files of the backup were written without a flush each.
            reflink.flush(self.root)
            # From now on it is fed: it goes on without a restart.
            clone.recovery = FedRecovery.of(clone.recovery)
            self.lent = clone
            self._stood(plan, clone.reached_lsn)
        except BaseException:
            self.remove()
            raise

    def go(self, plan: RestorePlan, progress: Report | None = None) -> Lsn:
        """Replay on to a plan's target, or stand up again where it stands; the position reached.

        A running server is fed, and only started anew where it must be (another timeline, settings too low).
        Written down before and after, so that a kill in between is known and made good by going on. Raises
        RefusedError beyond a hold or for an earlier position.
        """
        assert self.record is not None
        clone, stand = self._attached(), self.record.stand
        self.require_allowed(plan)
        assert stand is not None
        same = (plan.target_lsn, plan.inclusive) == (stand.lsn, stand.inclusive)
        if same and self.record.going_to is None:
            return self._stand_up(clone, stand, progress)
        if plan.target_lsn is None or plan.target_lsn < clone.reached_lsn:
            raise RefusedError(
                f"the shadow stands at {stand.reached} already, past {plan.target_lsn}",
                hint="make a clone for the earlier point",
            )
        if clone.server.running and plan.timeline != self.record.timeline:
            clone.recovery.settle()
        onto = needed(clone, plan)
        self._write(replace(self.record, stage="moving", going_to=plan.target_lsn))
        self._bring(clone, onto, progress)
        clone.plan = onto
        self._stood(onto, clone.reached_lsn)
        return clone.reached_lsn

    def _stand_up(self, clone: Lent, stand: Stand, progress: Report | None) -> Lsn:
        """Start the server where it stands, if it is down: before the first record that it has not replayed."""
        if clone.server.running:
            return clone.reached_lsn
        plan, redo = clone.plan, redo_position(clone)
        route = Route(WalArchive(self.repository).inventory(), plan.timeline)
        pieces = tuple(
            WalPiece(segment, partial.name if partial else None)
            for segment, partial in route.pieces(redo, stand.reached)
        )
        require_unbroken(pieces, redo, stand.reached)
        histories = tuple(step[0] for step in route.path if step[0] in route.inventory.histories)
        onto = replace(plan, target_lsn=stand.reached, inclusive=False, wal=pieces, histories=histories)
        if self._bring(clone, onto, progress) != stand.reached:
            raise RecoveryFailedError(
                f"the shadow stood at {stand.reached}, and replays to {clone.reached_lsn}",
                where=str(self.root),
            )
        self._write(replace(self._written(clone), stand=stand))
        return clone.reached_lsn

    def _bring(self, clone: Lent, plan: RestorePlan, progress: Report | None) -> Lsn:
        """Have the server replay up to the plan's target; it is down after an error."""
        recovery = clone.recovery
        assert isinstance(recovery, FedRecovery)
        prune(clone, self.repository.header.segment_bytes)
        clone.fill_spool(plan, progress)
        recovery.segments = tuple(piece.segment for piece in plan.wal)
        try:
            if clone.server.running:
                clone.reached_lsn = recovery.step(Goal.of(plan))
            else:
                recovery.begin_anew()
                clone.reached_lsn = recovery.run(Goal.of(plan))
        except BaseException:
            clone.server.stop("immediate")
            raise
        return clone.reached_lsn

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
        # What lies before was replayed: it is whole.
        read_from = record.stand.reached
        found = onward(self.repository, read_from, bounds, clone.programs, timeline=timeline)
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
        copy.harmless_to = source.harmless_to
        copy.workspace.aim()
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

    def settle(self) -> None:
        """Stop the server where it stands, so that its next start replays little."""
        if self.lent is not None and self.lent.server.running:
            try:
                self.lent.recovery.settle()
            except Exception:
                self.lent.server.stop("immediate")
                raise

    def remove(self) -> None:
        """Remove the shadow; the holds stay."""
        if self.lent is not None:
            self.lent.server.stop("immediate")
            self.lent = None
        self._stop_all()
        with files.translated(self.root):
            files.remove_tree(self.root)
        (self.folder / "shadow.json").unlink(missing_ok=True)
        self.record = None

    def close(self) -> None:
        """Let others work on the folder. The server is stopped where it stands, unless it is to run on."""
        try:
            if not self._runs_on():
                self.settle()
        finally:
            self._held.close()

    def _runs_on(self) -> bool:
        """Whether the server is another process's, or this one keeps it, and it stands where is written down."""
        server = self.lent.server if self.lent is not None else None
        if server is None or not server.running or self.record is None or self.record.stage != "standing":
            return False
        if server.ours and self._keeper is not None:
            self._keeper.keep(server)
        return self._keeper is not None or not server.ours

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
        clone.recovery = FedRecovery.of(clone.recovery)
        clone.recovery.settings = settings_of(clone, record)
        clone.recovery.offered_to = stand.reached
        clone.reached_lsn = stand.reached
        # Its WAL was looked through as it came.
        clone.harmless_to = stand.reached
        if record.boot and record.boot == boot_id():
            clone.spool.sources = dict(record.spool or {})
        self.lent = clone
        return clone

    def _clone(self, plan: RestorePlan, workspace: Workspace, sockets: Path) -> Lent:
        made = make(self.repository, plan, workspace, self._programs_for(plan.backup.major), sockets, "fail")
        return Lent(made.repository, plan, workspace, made.recovery, made.spool, "fail", shadow=self)

    def _stood(self, plan: RestorePlan, reached: Lsn) -> None:
        assert self.lent is not None
        stand = Stand(plan.target_lsn, plan.inclusive, reached, plan.last_commit)
        self._write(replace(self._written(self.lent), timeline=plan.timeline, stand=stand))

    def _written(self, clone: Lent) -> ShadowRecord:
        """The record of a clone that stands."""
        assert self.record is not None
        old = self.record.serving
        server = clone.server
        return replace(
            self.record,
            stage="standing",
            going_to=None,
            spool=dict(clone.spool.sources),
            boot=boot_id(),
            serving=serving(server) if server.ours or not server.running else old,
        )

    def _write(self, record: ShadowRecord) -> None:
        record = replace(record, updated_at=clock.now())
        write_record(self.folder, record)
        self.record = record

    def _tag(self) -> str:
        return hashlib.sha256(f"{self.folder}{secrets.token_hex(8)}".encode()).hexdigest()[:8]
