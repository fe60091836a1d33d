"""The WAL receiver: streams a server's WAL into a local spool and from there into the repository.

pg_receivewal streams under a permanent slot into the spool. Each whole segment moves to the
repository and leaves the spool only once it is durable there; the segment being written goes over
as a partial again and again. So what a crash of the server's machine can lose is what was written
since the last partial, and what a crash of the receiver can lose is nothing: the spool and the slot
have it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from knockwood.errors import (
    KnockwoodError,
    LockHeldError,
    NoSpaceError,
    PostgresError,
    ServerDownError,
    SlotLostError,
    StorageUnavailableError,
    WrongSystemError,
)
from knockwood.host import clock, files, locks
from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalRange, WalSegment
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import Connection, ServerFacts, connect, server_facts
from knockwood.repository import gaps, receive_server
from knockwood.repository.archive import WalArchive
from knockwood.repository.leases import Lease, lease
from knockwood.repository.receive_server import Progress, ServerPosition, Slot, Stream
from knockwood.repository.receive_start import archive_next, choose_start, missing_pieces
from knockwood.repository.repository import Repository
from knockwood.repository.retry import Retry
from knockwood.repository.spool import Spool, SpoolFile
from knockwood.repository.spool_upload import Uploader

LEASE = "wal-receive"
_POLL = 0.1
_STALLED = 60.0
_LEASE_CHECK = 20.0


class EventKind(StrEnum):
    """What the receiver reports."""

    STREAMING = "streaming"
    ARCHIVED = "archived"
    PARTIAL = "partial"
    MENDED = "mended"
    SLOT_LOST = "slot lost"
    GAP = "gap"
    FORKED = "forked"
    SERVER_PROBLEM = "server problem"
    REPOSITORY_PROBLEM = "repository problem"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ReceiverEvent:
    """Something happened. Problems carry the `error`; they repeat only when they change."""

    kind: EventKind
    text: str
    error: KnockwoodError | None = None
    gap: WalRange | None = None


def _ignore(event: ReceiverEvent) -> None:
    del event


class Receiver:
    """Receives one cluster's WAL. `run` works in the foreground, `receiving` in a thread.

    `partial_every`: seconds between two partials of the segment being written; with it comes the
    RPO. `synchronous`: pg_receivewal fsyncs and confirms at once, so that the server's
    synchronous_standby_names can name `slot` and a commit waits for the spool.
    """

    def __init__(
        self,
        repository: Repository,
        dsn: str,
        spool: Path,
        *,
        slot: str = "knockwood",
        synchronous: bool = False,
        programs: Programs | None = None,
        partial_every: float = 1.0,
        on_event: Callable[[ReceiverEvent], None] = _ignore,
    ) -> None:
        self.repository = repository
        self.dsn = dsn
        self.slot = slot
        self.synchronous = synchronous
        self.partial_every = partial_every
        self._programs = programs
        self._on_event = on_event
        self._archive = WalArchive(repository)
        self.spool = Spool(spool, repository.header.segment_bytes)
        self._uploader = Uploader(self._archive, self.spool, self._archived)
        self._stream: Stream | None = None
        self._watch: Connection | None = None
        self._progress: Progress | None = None
        self._looked_at_archive = False
        self._server_retry = Retry()
        self._repository_retry = Retry()
        self._partial_due = 0.0
        self._watch_due = 0.0
        self._lease_due = 0.0
        self._moved = (Lsn(0), 0.0)
        self._news = threading.Condition()
        self._flushing = 0
        self._problem: KnockwoodError | None = None
        self._streamed = False
        self._ended = False
        self.failure: BaseException | None = None

    # --- for other threads ------------------------------------------------------------------------

    @property
    def durable(self) -> tuple[Timeline, Lsn] | None:
        """How far the WAL is in the repository, as far as this receiver put it there."""
        return self._uploader.durable

    def wait_streaming(self, timeout: float = 30) -> None:
        """Wait for the first stream; raises what keeps it from starting, once the time is up."""
        deadline = clock.monotonic() + timeout
        with self._news:
            while not self._streamed:
                if self.failure is not None:
                    raise self.failure
                if self._ended or clock.monotonic() > deadline:
                    raise self._problem or ServerDownError("the receiver did not start to stream in time")
                self._news.wait(0.1)

    def flush(self, timeout: float = 30) -> Lsn:
        """Push what is received into the repository now; returns how far that reaches.

        Complete to the last commit acknowledged before the call while the server answers; otherwise
        complete to what was received. Raises StorageUnavailableError when the time is up.
        """
        deadline = clock.monotonic() + timeout
        try:
            target: Lsn | None = receive_server.flush_position(self.dsn)
        except PostgresError:
            target = None
        with self._news:
            self._flushing += 1
            asked = self._uploader.passes
            try:
                while not self._flushed(target, asked):
                    if self._ended:
                        raise StorageUnavailableError("the receiver has ended", hint="see its last messages")
                    if clock.monotonic() > deadline:
                        raise StorageUnavailableError(
                            f"the WAL was not in the repository after {timeout:.0f} s",
                            where=self.repository.storage.url,
                            hint="is the storage slow, or the receiver behind the server?",
                        )
                    self._news.wait(0.1)
            finally:
                self._flushing -= 1
        durable = self._uploader.durable
        return durable[1] if durable is not None else Lsn(0)

    def _flushed(self, target: Lsn | None, asked: int) -> bool:
        # The pass that was under way when we asked may have looked at the spool too early.
        if target is None:
            return self._uploader.passes >= asked + 2
        durable = self._uploader.durable
        return durable is not None and durable[1] >= target

    # --- the loop ---------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Receive until `stop` is set; then push what was received, and return.

        Raises LockHeldError if another receiver is at work, WrongSystemError if the server is another
        cluster. Passing failures (of the server, the storage, a full disk) are reported and retried.
        """
        try:
            files.make_folder(self.spool.folder)
            with (
                locks.file_lock(self.spool.folder / "receiver.lock", "receiver"),
                lease(self.repository, LEASE, f"wal receive of {self.repository.header.cluster}") as held,
            ):
                try:
                    while not stop.is_set():
                        self._turn(held)
                        stop.wait(0.02 if self._flushing else _POLL)
                finally:
                    self._close()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._news:
                self._ended = True
                self._news.notify_all()

    def _turn(self, held: Lease) -> None:
        self._check_lease(held)
        self._keep_streaming()
        self._keep_archiving()

    def _check_lease(self, held: Lease) -> None:
        if clock.monotonic() >= self._lease_due:
            self._lease_due = clock.monotonic() + _LEASE_CHECK
            try:
                held.assert_held()
            except LockHeldError:
                raise
            except KnockwoodError as error:
                self._report_problem(EventKind.REPOSITORY_PROBLEM, self._repository_retry, error)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.stop()
            self._stream = None
        self._forget_watch()
        try:
            self._uploader.upload(writing=False, progress=None)
        except KnockwoodError as error:
            self._report(EventKind.REPOSITORY_PROBLEM, f"left in the spool: {error}", error)
        self._report(EventKind.STOPPED, "stopped")

    # --- streaming --------------------------------------------------------------------------------

    def _keep_streaming(self) -> None:
        if self._stream is not None and self._stream.running:
            self._look_at_progress(self._stream)
            return
        if self._stream is not None:
            ended = self._stream.failure()
            self._stream = None
            self._forget_watch()
            if ended.removed is not None:
                self._attempt(self._skip_what_is_gone)
            else:
                self._report_problem(EventKind.SERVER_PROBLEM, self._server_retry, ended.error)
        elif self._server_retry.due():
            self._attempt(self._start)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except WrongSystemError:
            raise
        except (PostgresError, NoSpaceError) as error:
            self._report_problem(EventKind.SERVER_PROBLEM, self._server_retry, error)
        except KnockwoodError as error:
            self._report_problem(EventKind.REPOSITORY_PROBLEM, self._server_retry, error)

    def _start(self) -> None:
        for done in self.spool.mend():
            self._report(EventKind.MENDED, done)
        with connect(self.dsn, application_name="knockwood receiver") as connection:
            facts = server_facts(connection, self.repository.header.system_identifier)
            slot = self._reserve(connection)
        server = receive_server.identify(self.dsn)
        self._position(server, slot)
        programs = self._programs or find_programs(facts.major)
        self._stream = Stream(
            programs,
            self.dsn,
            self.spool.folder,
            slot=self.slot,
            name=self.slot,
            synchronous=self.synchronous,
        )
        self._started(facts, server)

    def _started(self, facts: ServerFacts, server: ServerPosition) -> None:
        self._moved = (Lsn(0), clock.monotonic())
        with self._news:
            self._streamed = True
            self._news.notify_all()
        top = self.spool.files()[-1]
        self._report(
            EventKind.STREAMING,
            f"streaming from {top.next_start} on timeline {top.segment.timeline}, PostgreSQL {facts.major}"
            f" on timeline {server.timeline}",
        )

    def _reserve(self, connection: Connection) -> Slot:
        slot = receive_server.find_slot(connection, self.slot)
        if slot is not None and slot.lost:
            lost = SlotLostError(
                f"the replication slot {self.slot} was invalidated: the server needed its WAL's space",
                hint="raise max_slot_wal_keep_size, and see why the receiver was so far behind",
            )
            self._report(EventKind.SLOT_LOST, str(lost), lost)
            receive_server.drop_slot(connection, self.slot)
            slot = None
        return slot or receive_server.create_slot(connection, self.slot)

    def _position(self, server: ServerPosition, slot: Slot) -> None:
        """Leave the file in the spool from which pg_receivewal shall go on."""
        present = self.spool.files()
        wanted = _next(present[-1]) if present else None
        if not self._looked_at_archive:
            # Another receiver may have gone on elsewhere since this spool was last used.
            stock = self._archive.inventory()
            archived = archive_next(stock)
            if archived is not None:
                self._uploader.found(archived.timeline, stock.end_from(archived.timeline, archived.start))
            if archived is not None and (wanted is None or _order(archived) > _order(wanted)):
                wanted = archived
            self._looked_at_archive = True
        start = choose_start(wanted, server, slot.restart, self.spool.segment_bytes, self._known_history)
        if start.forked:
            self._report(
                EventKind.FORKED,
                f"the server is on timeline {server.timeline}; receiving goes on from {start.segment.start}",
            )
        if not present or start.segment != _next(present[-1]):
            self._go_to(start.segment)

    def _known_history(self, timeline: Timeline) -> TimelineHistory:
        return self.spool.history(timeline) or self._archive.history(timeline)

    def _go_to(self, segment: WalSegment) -> None:
        """Empty the spool into the archive, then make `segment` the one to begin with."""
        self._uploader.upload(writing=False, progress=None)
        for file in self.spool.files():
            self.spool.remove(file)
        self.spool.seed(segment)

    def _skip_what_is_gone(self) -> None:
        """The server has removed WAL that we lack: write the gap down, and go on from the present."""
        server = receive_server.identify(self.dsn)
        reached = self._reached()
        with connect(self.dsn, application_name="knockwood receiver") as connection:
            slot = self._reserve(connection)
            if slot.restart is None or slot.restart.value // self.spool.segment_bytes <= (
                reached.value // self.spool.segment_bytes
            ):
                # It reserves nothing that helps: only a new one knows what the server surely has.
                receive_server.drop_slot(connection, self.slot)
                slot = receive_server.create_slot(connection, self.slot)
        resume = slot.restart if slot.restart is not None and slot.restart > reached else server.flush
        segment = WalSegment.containing(server.history.timeline_at(resume), resume, self.spool.segment_bytes)
        for piece in missing_pieces(server, reached, segment):
            self._record_gap(piece)
        self._go_to(segment)
        self._server_retry.reset()

    def _reached(self) -> Lsn:
        present = [file for file in self.spool.files() if file.reached() > file.segment.start]
        if present:
            return present[-1].reached()
        stock = self._archive.inventory()
        wanted = archive_next(stock)
        if wanted is None:
            # Nothing was ever received: what comes before the beginning is no gap.
            return Lsn(1 << 63)
        return stock.end_from(wanted.timeline, wanted.start)

    def _record_gap(self, piece: WalRange) -> None:
        reason = "the server had removed this WAL before it was received"
        gaps.record(self.repository, piece, reason)
        lost = SlotLostError(f"no WAL was received for {piece}: {reason}", hint=gaps.REMEDY)
        self._report(EventKind.GAP, str(lost), lost, piece)

    # --- watching ---------------------------------------------------------------------------------

    def _look_at_progress(self, stream: Stream) -> None:
        now = clock.monotonic()
        if now < self._watch_due and not self._flushing:
            return
        self._watch_due = now + min(1.0, self.partial_every)
        try:
            if self._watch is None:
                self._watch = connect(self.dsn, application_name="knockwood receiver")
            self._progress = receive_server.progress(self._watch, self.slot)
        except PostgresError:
            # pg_receivewal itself tells when the server is gone; files tell most of the rest.
            self._forget_watch()
            return
        written = self._progress.written
        if written is not None:
            self._server_retry.reset()
        if written is not None and (written != self._moved[0] or written >= self._progress.flush):
            self._moved = (written, now)
        elif now - self._moved[1] > _STALLED:
            stream.stop()

    def _forget_watch(self) -> None:
        self._progress = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    # --- archiving --------------------------------------------------------------------------------

    def _keep_archiving(self) -> None:
        if not self._repository_retry.due():
            return
        now = clock.monotonic()
        with_partial = bool(self._flushing) or now >= self._partial_due
        if with_partial:
            self._partial_due = now + self.partial_every
        try:
            writing = self._stream is not None and self._stream.running
            self._uploader.upload(writing=writing, progress=self._progress, partial=with_partial)
        except KnockwoodError as error:
            self._report_problem(EventKind.REPOSITORY_PROBLEM, self._repository_retry, error)
        else:
            self._repository_retry.reset()
        with self._news:
            self._news.notify_all()

    def _archived(self, file: SpoolFile, end: Lsn) -> None:
        kind = EventKind.PARTIAL if file.partial else EventKind.ARCHIVED
        self._report(kind, f"{file.path.name} up to {end} on timeline {file.segment.timeline}")

    # --- reporting --------------------------------------------------------------------------------

    def _report(
        self, kind: EventKind, text: str, error: KnockwoodError | None = None, gap: WalRange | None = None
    ) -> None:
        self._on_event(ReceiverEvent(kind, text, error, gap))

    def _report_problem(self, kind: EventKind, retry: Retry, error: KnockwoodError) -> None:
        self._problem = error
        if retry.failed(str(error)):
            self._report(kind, str(error), error)


def _next(file: SpoolFile) -> WalSegment:
    return file.segment if file.partial else file.segment.next()


def _order(segment: WalSegment) -> tuple[int, int]:
    return (segment.number, segment.timeline)


@contextmanager
def receiving(receiver: Receiver, patience: float = 30) -> Iterator[Receiver]:
    """Run a receiver in a thread of its own while the block runs; a failure in it is raised at the end.

    Waits up to `patience` seconds for the first stream. Raises what kept the receiver from starting.
    """
    stop = threading.Event()

    def work() -> None:
        try:
            receiver.run(stop)
        except BaseException:
            # Kept by the receiver and raised below, in the thread that uses it.
            return

    thread = threading.Thread(target=work, name="wal receiver")
    thread.start()
    try:
        receiver.wait_streaming(patience)
        yield receiver
    finally:
        stop.set()
        thread.join()
    if receiver.failure is not None:
        raise receiver.failure


__all__ = ["EventKind", "Receiver", "ReceiverEvent", "receiving"]
