"""Run recovery to a goal and prove that it stopped there; nothing is promoted unless it was meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knockwood.clone import goal as goals
from knockwood.clone import log as logs
from knockwood.clone.goal import Goal
from knockwood.clone.superuser import superusers
from knockwood.clone.workspace import Workspace
from knockwood.errors import AuthenticationError, PostgresError, RecoveryFailedError, ServerDownError
from knockwood.host import clock, files, others, privileges
from knockwood.model.wal import Lsn
from knockwood.postgres.connection import Connection, connect, translated
from knockwood.postgres.server import SUPERUSER, LocalServer

_POLL_SECONDS = 0.02
_LOOK_SECONDS = 0.5
_RECOVERING = re.compile(r"recovering ([0-9A-F]{24})")
# An ALTER ROLE or ALTER DATABASE could still name a library; what a client asks for beats it.
_NO_LIBRARIES = "-c session_preload_libraries= -c local_preload_libraries="

Watch = Callable[[str], None]


class UnreadableError(RecoveryFailedError):
    """The goal was reached, but PostgreSQL lets nobody read there without promoting."""


class SettingsTooLowError(Exception):
    """Settings that the WAL says the primary had higher; `values` are the primary's."""

    def __init__(self, values: Mapping[str, int]) -> None:
        super().__init__(str(values))
        self.values = values


@dataclass(slots=True)
class Recovery:
    """A fetched data directory and its spool, on the way to a goal.

    `settings` are the server's whole configuration but for the goal's. `stall` is how many seconds
    replay may stay on one segment, logging nothing, before it counts as hung. `linked`: the spool is
    needed no more after a promotion, so its files need not be copied (see `goal.restore_command`). `entrance` is
    the database to log in to.
    """

    workspace: Workspace
    server: LocalServer
    settings: dict[str, str]
    socket_directory: Path
    user: str = SUPERUSER
    stall: float = 1800
    linked: bool = False
    entrance: str = "template1"
    _log_offset: int = field(default=0, repr=False)

    def dsn(self, database: str) -> str:
        return self.server.dsn(database, self.user, options=_NO_LIBRARIES)

    def run(self, goal: Goal, *, promote: bool = False, watch: Watch | None = None) -> Lsn:
        """Replay to the goal and pause there; the position replayed to, proven to be the one asked for.

        With `promote` it does not pause but promotes there. Raises UnreadableError where PostgreSQL
        would have promoted instead of pausing, RecoveryFailedError and its like for anything else; the
        server is down then, and the data directory can be tried again.
        """
        if promote:
            self.workspace.permit_promotion()
        # Each attempt raises at least one setting to what the WAL demands.
        for _ in range(len(goals.REQUIRED_AT_LEAST) + 1):
            try:
                return self._attempt(goal, promote, watch)
            except SettingsTooLowError as low:
                self.server.stop("immediate")
                self.settings |= {name: str(value) for name, value in low.values.items()}
            except BaseException:
                self.server.stop("immediate")
                raise
        raise self._failed("the server still finds settings lower than the primary's")

    def promote(self) -> None:
        """Promote the paused server; returns when it takes writes."""
        self.workspace.permit_promotion()
        with connect(self.dsn(self.entrance)) as connection:
            # Resuming past a target promotes; pg_promote would only be noticed within a second.
            _one(connection, "select pg_catalog.pg_wal_replay_resume()::text")
            self._await(connection, "select not pg_catalog.pg_is_in_recovery()")

    def settle(self) -> None:
        """Stop the paused server so that the next start replays from the last checkpoint that it saw.

        A restart point and a crash do in milliseconds what a clean shutdown does within a second.
        """
        with connect(self.dsn(self.entrance)) as connection, translated():
            connection.execute("checkpoint")
        self.server.stop("immediate")

    # --- one attempt ------------------------------------------------------------------------------

    def _attempt(self, goal: Goal, promote: bool, watch: Watch | None) -> Lsn:
        workspace = self.workspace
        leading = goals.recovery_settings(goal, workspace.spool, linked=self.linked)
        workspace.configure(self.settings | leading)
        self._log_offset = workspace.log.stat().st_size if workspace.log.exists() else 0
        self._launch()
        self._follow(goal, watch)
        with self._connect(goal) as connection:
            if promote:
                self._await(connection, "select not pg_catalog.pg_is_in_recovery()", goal)
            else:
                self._await(
                    connection,
                    "select not pg_catalog.pg_is_in_recovery()"
                    " or pg_catalog.pg_get_wal_replay_pause_state() = 'paused'",
                    goal,
                )
            return self._assert_there(connection, goal, promote)

    def _launch(self) -> None:
        # The socket's folder has a name that is known before it exists: who finds us dead removes it.
        with files.translated(self.socket_directory):
            self.socket_directory.mkdir(mode=0o700, exist_ok=True)
            privileges.give(self.socket_directory, self.workspace.account)
        self.server.socket_directory = self.socket_directory
        self.server.start(until="launched")

    def _follow(self, goal: Goal, watch: Watch | None) -> None:
        """Wait until recovery says that it stops; raise what the log tells if the server ends before."""
        changed = clock.monotonic()
        look = 0.0
        seen: tuple[str, int] = ("", 0)
        while True:
            log = self._log()
            self._raise_for(log, goal)
            if logs.find_stop(log) is not None:
                return
            now = clock.monotonic()
            if now >= look:
                look = now + _LOOK_SECONDS
                segment = self._replaying()
                if (segment, len(log)) != seen:
                    seen, changed = (segment, len(log)), now
                    if watch is not None and segment:
                        watch(segment)
                if now - changed > self.stall:
                    raise self._failed(
                        f"replay stood still for {self.stall:.0f} s at {segment or 'its start'}"
                    )
            clock.sleep(_POLL_SECONDS)

    def _raise_for(self, log: str, goal: Goal) -> None:
        low = {name: value for name, value in logs.too_low(log).items() if self._is_lower(name, value)}
        if low:
            raise SettingsTooLowError(low)
        if not self.server.running:
            # Read again: the last lines may have come after the first look.
            log = self._log()
            if logs.stopped_by_guard(log):
                raise UnreadableError(
                    f"PostgreSQL cannot be read at {goal} without a promotion",
                    where=str(self.workspace.data),
                    hint="a transaction with more than 64 subtransactions was open: "
                    "stop at a later transaction, or accept a promoted clone",
                )
            raise logs.failure(log, goal, str(self.workspace.data))

    def _is_lower(self, name: str, value: int) -> bool:
        return name in goals.REQUIRED_AT_LEAST and int(self.settings.get(name, "0")) < value

    def _log(self) -> str:
        try:
            with self.workspace.log.open("rb") as file:
                file.seek(self._log_offset)
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _replaying(self) -> str:
        """The segment that the startup process says it replays, or nothing."""
        children = others.children_of(self.server.pid) if self.server.pid else []
        titles = [child.title for child in children]
        return next((match[1] for match in map(_RECOVERING.search, titles) if match), "")

    # --- what it says -----------------------------------------------------------------------------

    def _connect(self, goal: Goal) -> Connection:
        """Connect as a superuser, whatever it is called; waits until the server lets anyone in."""
        while (connection := self.log_in()) is None:
            self._raise_for(self._log(), goal)
            clock.sleep(_POLL_SECONDS)
        return connection

    def log_in(self) -> Connection | None:
        """A connection as a superuser, None while the server lets nobody in."""
        for user in dict.fromkeys([self.user, SUPERUSER, *superusers(self.workspace.data)]):
            try:
                connection = connect(self.server.dsn(self.entrance, user, options=_NO_LIBRARIES))
            except AuthenticationError:
                continue
            except ServerDownError:
                return None
            self.user = user
            return connection
        raise self._failed("no superuser of the restored cluster could log in")

    def _await(self, connection: Connection, question: str, goal: Goal | None = None) -> None:
        while not self._ask(connection, question, goal):
            clock.sleep(_POLL_SECONDS)

    def _ask(self, connection: Connection, question: str, goal: Goal | None) -> Any:
        try:
            return _one(connection, question)
        except PostgresError:
            if goal is not None:
                self.server.wait_ended(5)
                self._raise_for(self._log(), goal)
            raise

    def _assert_there(self, connection: Connection, goal: Goal, promote: bool) -> Lsn:
        """The last position replayed, if the server is where and what it was asked to be."""
        if _one(connection, "select pg_catalog.pg_is_in_recovery()") == promote:
            raise self._failed("the server was promoted although it had to pause")
        logs.check_stop(self._log(), goal)
        return self._replayed(connection, goal)

    def _replayed(self, connection: Connection, goal: Goal) -> Lsn:
        """The last position replayed; RecoveryFailedError unless the goal lies there."""
        reached = Lsn.parse(_one(connection, "select pg_catalog.pg_last_wal_replay_lsn()::text"))
        if goal.lsn is None:
            right = reached >= goal.consistent
        else:
            right = reached > goal.lsn if goal.inclusive else reached <= goal.lsn
        if not right:
            raise self._failed(f"the server replayed to {reached}, asked was {goal}")
        return reached

    def _failed(self, what: str) -> RecoveryFailedError:
        last = " / ".join(logs.messages(self._log())[-2:])
        return RecoveryFailedError(f"{what}: {last}" if last else what, where=str(self.workspace.data))


def _one(connection: Connection, sql: str) -> Any:
    with translated():
        row = connection.execute(sql).fetchone()
    assert row is not None
    return row[0]
