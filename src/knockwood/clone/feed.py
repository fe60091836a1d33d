"""WAL handed to a standby up to an exact record: it stops where what it was given ends, and goes on when it
is given more, with no restart in between.

A standby replays whole records and waits at the first that is not there. So the last segment is offered with
zeros from the goal on, and later once more with what follows. Each file is offered once: the server takes it by
renaming, and looks through its own copy while it waits.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from knockwood.clone import goal as goals
from knockwood.clone import log as logs
from knockwood.clone.goal import Goal
from knockwood.clone.recovery import Recovery, SettingsTooLowError, UnreadableError, Watch
from knockwood.errors import RefusedError
from knockwood.host import clock, files, privileges
from knockwood.model.wal import Lsn, WalSegment
from knockwood.postgres.connection import Connection, translated
from knockwood.postgres.walreader import LONG_HEADER, PAGE_BYTES, SHORT_HEADER, Reader

_POLL_SECONDS: Final = 0.005
_SILENT_SECONDS: Final = 10.0
"""How long a standby may stand before its goal once it has complained of the WAL, or be closed to readers."""
_WAKE_SECONDS: Final = 1.0
_RETRY: Final = "10min"
"""How often a standby looks for WAL by itself; it is woken when there is some."""

_OFFERED: Final = "offered"


@dataclass(slots=True)
class FedRecovery(Recovery):
    """A recovery that can go on from goal to goal. `segments` are the spool's, in order; never promoted."""

    segments: tuple[WalSegment, ...] = ()
    offered_to: Lsn = field(default_factory=lambda: Lsn(0))
    _still: tuple[int, float] = (0, 0.0)
    _moved: tuple[Lsn, float] = (Lsn(0), 0.0)

    @classmethod
    def of(cls, recovery: Recovery) -> Self:
        """The same recovery, fed."""
        known = {name: getattr(recovery, name) for name in Recovery.__dataclass_fields__ if name[0] != "_"}
        return cls(**known)

    def step(self, goal: Goal) -> Lsn:
        """Replay on to a later goal on the running server; the position replayed to, asserted.

        A server whose settings the WAL outgrows is started anew, from what it was given so far.
        """
        self._log_offset = self.workspace.log.stat().st_size
        self._still = (0, clock.monotonic())
        stop = self._stop(goal)
        self._offer(stop)
        try:
            with self._connect(goal) as connection:
                self._wake(connection)
                return self._await_there(connection, goal, stop)
        except SettingsTooLowError as low:
            self.server.stop("immediate")
            self.settings |= {name: str(value) for name, value in low.values.items()}
        return self.run(goal)

    def begin_anew(self) -> None:
        """Before a start: have it be given all of `segments`, whatever it was given before."""
        self.offered_to = Lsn(0)

    def _attempt(self, goal: Goal, promote: bool, watch: Watch | None) -> Lsn:
        if promote or goal.lsn is None:
            raise RefusedError("a clone that is fed is never promoted, and goes to a record")
        workspace = self.workspace
        stop = self._stop(goal)
        workspace.configure(self.settings | following_settings(goal, workspace.spool))
        workspace.follow()
        self._log_offset = workspace.log.stat().st_size if workspace.log.exists() else 0
        self._still = (0, clock.monotonic())
        if self.offered_to == Lsn(0):
            self._clear()
        self._offer(stop)
        self._launch()
        with self._connect(goal) as connection:
            return self._await_there(connection, goal, stop)

    def _stop(self, goal: Goal) -> Lsn:
        """Where the first record begins that is not to be replayed."""
        assert goal.lsn is not None
        if not goal.inclusive:
            return goal.lsn
        segment = next(each for each in reversed(self.segments) if each.start <= goal.lsn < each.end)
        programs, spool = self.server.programs, self.workspace.spool
        return Reader(programs, spool, segment.timeline, segment.bytes, None).end_of(goal.lsn)

    # --- what the server is given -----------------------------------------------------------------

    def _clear(self) -> None:
        """Leave no WAL but what is offered next: a standby replays all that it finds."""
        workspace = self.workspace
        for folder in (workspace.data / "pg_wal", workspace.spool / _OFFERED):
            with files.translated(folder):
                for path in list(folder.iterdir()) if folder.is_dir() else []:
                    if path.is_file():
                        path.unlink()

    def _offer(self, stop: Lsn) -> None:
        folder = self.workspace.spool / _OFFERED
        files.make_folder(folder)
        privileges.give(folder, self.workspace.account)
        for segment in _wanted(self.segments, self.offered_to, stop):
            source = self.workspace.spool / segment.name
            fresh = self.workspace.spool / f".{segment.name}"
            with files.translated(fresh):
                fresh.unlink(missing_ok=True)
                if segment.end <= stop:
                    os.link(source, fresh)
                else:
                    _cut_copy(source, fresh, stop.value - segment.start.value, segment.bytes)
                    privileges.give(fresh, self.workspace.account)
                fresh.rename(folder / segment.name)
        self.offered_to = stop

    # --- waiting ------------------------------------------------------------------------------------

    def _wake(self, connection: Connection) -> None:
        """Have the server look for WAL at once: what makes it read its configuration makes it look, too."""
        with translated():
            connection.execute("select pg_catalog.pg_reload_conf()")

    def _await_there(self, connection: Connection, goal: Goal, stop: Lsn) -> Lsn:
        least, woken = _least(stop, self.segments), clock.monotonic()
        self._moved = (Lsn(0), woken)
        while (position := self._position(connection, goal)) < least:
            self._raise_if_hung(position, goal)
            self._raise_for(self._log(), goal)
            if clock.monotonic() - woken > _WAKE_SECONDS:
                woken = clock.monotonic()
                self._wake(connection)
            clock.sleep(_POLL_SECONDS)
        reached = self._replayed(connection, goal)
        if reached > stop:
            raise self._failed(f"the server replayed to {reached}, given it was {stop}")
        return reached

    def _position(self, connection: Connection, goal: Goal) -> Lsn:
        return Lsn.parse(
            self._ask(connection, "select coalesce(pg_catalog.pg_last_wal_replay_lsn(), '0/0')::text", goal)
        )

    def _raise_if_hung(self, position: Lsn, goal: Goal) -> None:
        now = clock.monotonic()
        if position != self._moved[0]:
            self._moved = (position, now)
        elif now - self._moved[1] > self.stall:
            raise self._failed(f"replay stood still for {self.stall:.0f} s at {position}, asked was {goal}")

    def _raise_for(self, log: str, goal: Goal) -> None:
        Recovery._raise_for(self, log, goal)
        self._raise_if_stuck(log, goal)

    def _raise_if_stuck(self, log: str, goal: Goal) -> None:
        """It says once that the WAL ends or is wrong for it; there it may stand at the goal only.

        What it said of the goal before may come into the log late: while it moves it is not stuck.
        """
        now = clock.monotonic()
        complaints = logs.complaints(log) or logs.waits(log)[:1]
        if len(complaints) != self._still[0]:
            self._still = (len(complaints), now)
        if not complaints or now - max(self._still[1], self._moved[1]) < _SILENT_SECONDS:
            return
        self._still = (0, now)
        raise UnreadableError(
            f"the server stands still and {goal} is not there, or nobody may read it: {complaints[-1]}",
            where=str(self.workspace.data),
            hint="was a transaction with more than 64 subtransactions open? " + logs.VERIFY_HINT,
        )


def following_settings(goal: Goal, spool: Path) -> dict[str, str]:
    """What makes a standby take the WAL that it is offered, and nothing else."""
    return {
        "restore_command": feeding_command(spool, goal),
        "recovery_target_timeline": str(goal.timeline),
        "hot_standby": "on",
        "wal_retrieve_retry_interval": _RETRY,
    }


def feeding_command(spool: Path, goal: Goal) -> str:
    """A shell line that gives a segment away once, and timeline histories as often as asked.

    A promotion is stopped as in `goal.restore_command`.
    """
    folder = shlex.quote(str(spool)).replace("%", "%%")
    return (
        f"if test %f = {goal.timeline + 1:08X}.history; then exit {goals.GUARD_STATUS}; fi; "
        f"if test -f {folder}/{_OFFERED}/%f; then mv {folder}/{_OFFERED}/%f %p || exit {goals.COPY_FAILED_STATUS};"
        f" else case %f in *.history) test -f {folder}/%f && cp {folder}/%f %p;; *) exit 1;; esac; fi"
    )


def _wanted(segments: Iterable[WalSegment], after: Lsn, stop: Lsn) -> list[WalSegment]:
    """The segments that hold something between two positions, the last one first: when the server has come to
    the first, all are there."""
    return [each for each in reversed(tuple(segments)) if each.end > after and each.start < stop]


def _least(stop: Lsn, segments: tuple[WalSegment, ...]) -> Lsn:
    """What the server says it has replayed, at least, when the next record would begin at `stop`: a record that
    ends with its page ends before the next page's header."""
    size = segments[-1].bytes
    header = LONG_HEADER if stop.value % size < PAGE_BYTES else SHORT_HEADER
    return Lsn(stop.value - header) if stop.value % PAGE_BYTES == header else stop


def _cut_copy(source: Path, target: Path, count: int, size: int) -> None:
    """The first bytes of a file, and zeros up to its size."""
    with source.open("rb") as reading, target.open("xb") as writing:
        left = count
        while left and (data := reading.read(min(left, 1 << 20))):
            writing.write(data)
            left -= len(data)
        writing.truncate(size)


__all__ = ["FedRecovery", "feeding_command", "following_settings"]
