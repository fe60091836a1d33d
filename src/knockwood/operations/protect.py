"""Keep a cluster's copies complete: receive its WAL, take base backups, forget the old ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final

from knockwood.errors import LockHeldError
from knockwood.history.follow import following
from knockwood.host import clock
from knockwood.operations.cluster import Cluster
from knockwood.operations.passing_slot import PassingSlot
from knockwood.postgres.connection import connect, translated
from knockwood.repository import receive, receive_server
from knockwood.repository.backups.model import Backup
from knockwood.repository.leases import lease
from knockwood.repository.receive import EventKind, Receiver, ReceiverEvent
from knockwood.repository.repository import Repository

# What takes backups is imported where one is taken: `wal push` runs once per segment, and restores receive too.
if TYPE_CHECKING:
    from knockwood.repository.backups.take import OnProgress

_SLOT_PATIENCE: Final = 15.0
"""Seconds that a standing receiver may take to make its slot on a server that was just promoted."""

OnEvent = Callable[[ReceiverEvent], None]


def receiver(cluster: Cluster, repository: Repository, on_event: OnEvent | None = None) -> Receiver:
    """The receiver as the settings want it; nothing runs yet."""
    wal = cluster.settings.wal
    programs = cluster.programs(cluster.facts().major) if cluster.settings.programs else None
    return Receiver(
        repository,
        cluster.dsn,
        cluster.spool(repository.header.system_identifier),
        older_spool=cluster.spools,
        slot=wal.slot,
        synchronous=wal.synchronous,
        programs=programs,
        partial_every=wal.partial_every.total_seconds(),
        on_event=on_event or (lambda _: None),
    )


def receive_forever(cluster: Cluster, on_event: OnEvent, stop: threading.Event, *, wait: float = 0) -> None:
    """Receive WAL in the foreground until `stop` is set; the history's index follows, if it is to.

    Raises LockHeldError if another receiver is still at work after `wait` seconds.
    """
    repository = cluster.repository()
    passing = _passing(cluster, repository)
    passing.forget()
    deadline = clock.monotonic() + wait

    def told(event: ReceiverEvent) -> None:
        if event.kind is EventKind.STREAMING:
            # On a server that was just promoted a passing command may have meant to make the slot.
            passing.forget()
        on_event(event)

    with _index_follows(cluster, repository, told) as seen:
        while not stop.is_set():
            try:
                receiver(cluster, repository, seen).run(stop)
                return
            except LockHeldError:
                if clock.monotonic() > deadline:
                    raise
            stop.wait(0.5)


@contextmanager
def _index_follows(cluster: Cluster, repository: Repository, on_event: OnEvent) -> Iterator[OnEvent]:
    """What a receiver tells, so that each segment it archived is indexed too."""
    # A machine that can write and not read has no keys to index with.
    unreadable = bool(repository.recipients) and not repository.identities
    if not cluster.settings.history.follow or unreadable:
        yield on_event
        return

    def told(text: str) -> None:
        on_event(ReceiverEvent(EventKind.INDEX_PROBLEM, text))

    with following(repository, told) as archived:

        def seen(event: ReceiverEvent) -> None:
            on_event(event)
            if event.segment is not None:
                archived(event.segment)

        yield seen


@contextmanager
def receiving(cluster: Cluster, repository: Repository) -> Iterator[Receiver]:
    """Receive WAL beside the block; its slot stays."""
    _passing(cluster, repository).forget()
    with receive.receiving(receiver(cluster, repository)) as running:
        yield running


@contextmanager
def wal_arriving(
    cluster: Cluster, repository: Repository, *, also_beside_push: bool = False
) -> Iterator[None]:
    """Make sure that WAL reaches the repository while the block runs.

    Where a receiver is at work already, or the server pushes by archive_command, nothing is added
    (pushing archives whole segments only: with `also_beside_push` the tail is received too). A slot that
    was made for it goes at the end; that of a command that was killed is found and goes too.
    """
    passing = _passing(cluster, repository)
    if not also_beside_push and _pushes(cluster):
        if passing.left():
            _drop_slot(cluster, repository, passing)
        yield
        return
    with ExitStack() as stack:
        had_slot = _has_slot(cluster) and not passing.left()
        if not had_slot:
            passing.note()
        # From here on a slot may have been made, also by a receiver that was stopped while it started.
        try:
            try:
                stack.enter_context(receive.receiving(receiver(cluster, repository)))
            except LockHeldError:
                had_slot = True  # another process receives; the slot is its own
                _await_slot(cluster)
            yield
        finally:
            stack.close()
            if not had_slot:
                _drop_slot(cluster, repository, passing)


def _passing(cluster: Cluster, repository: Repository) -> PassingSlot:
    folder = cluster.state / cluster.name
    return PassingSlot(folder, repository.header.system_identifier, cluster.settings.wal.slot)


def _drop_slot(cluster: Cluster, repository: Repository, passing: PassingSlot) -> None:
    """Drop the slot that was made for the block, unless a receiver has come that wants it."""
    # A slot that nobody reads makes the server keep WAL until its disk is full.
    name = cluster.settings.wal.slot
    held = lease(repository, receive.LEASE, "dropping a slot nobody reads")
    with suppress(LockHeldError), held, connect(cluster.dsn) as connection:
        if not passing.noted():
            return  # a standing receiver has come and gone: the slot is its own
        # A block that failed may not have come to make it; what failed is told, not this.
        if receive_server.find_slot(connection, name) is not None:
            receive_server.drop_slot(connection, name)
        passing.forget()


def _has_slot(cluster: Cluster) -> bool:
    with connect(cluster.dsn) as connection:
        return receive_server.find_slot(connection, cluster.settings.wal.slot) is not None


def _await_slot(cluster: Cluster) -> None:
    """Wait for the slot of the receiver that is at work: right after a promotion there is none yet, and the
    checkpoint of a backup would remove WAL that the receiver is about to ask for."""
    deadline = clock.monotonic() + _SLOT_PATIENCE
    while not _has_slot(cluster) and clock.monotonic() < deadline:
        clock.sleep(0.1)


def _pushes(cluster: Cluster) -> bool:
    with connect(cluster.dsn) as connection, translated():
        row = connection.execute(
            "select pg_catalog.current_setting('archive_mode') <> 'off'"
            " and pg_catalog.current_setting('archive_command', true) like '%knockwood%wal push%'"
        ).fetchone()
    return bool(row and row[0])


def take(
    cluster: Cluster,
    repository: Repository | None = None,
    *,
    incremental: bool = False,
    progress: OnProgress | None = None,
    wal_timeout: float = 300,
) -> Backup:
    """Take a base backup, complete with the WAL that makes it consistent, or raise and list nothing."""
    from knockwood.repository.backups.take import Effort, take_backup

    store = repository or cluster.repository()
    backup = cluster.settings.backup
    workers = backup.workers or os.cpu_count() or 1
    effort = Effort(
        level=backup.compression_level,
        workers=workers,
        wal_timeout=wal_timeout,
        processes=0 if incremental else _processes(cluster, workers),
        data_directory=cluster.settings.data_directory,
    )
    with wal_arriving(cluster, store):
        return take_backup(store, cluster.dsn, incremental=incremental, progress=progress, effort=effort)


def _processes(cluster: Cluster, workers: int) -> int:
    """With how many processes the server's files are copied; 0 for its own stream."""
    from knockwood.repository.backups.take import why_not

    # Two take two thirds of the processor time that the server and we spend on its stream.
    folder = cluster.settings.data_directory
    if workers < 2 or folder is None or why_not(cluster.dsn, folder) is not None:
        return 0
    return workers
