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
from dataclasses import replace
from pathlib import Path

from knockwood.errors import (
    AuthenticationError,
    KnockwoodError,
    LockHeldError,
    MissingPrivilegeError,
    ProgramsMissingError,
    ServerDownError,
    StorageUnavailableError,
)
from knockwood.host import clock, files, locks
from knockwood.model.wal import Lsn, Timeline
from knockwood.postgres.binaries import Programs
from knockwood.repository import receive_server
from knockwood.repository.archive import WalArchive
from knockwood.repository.leases import Lease, lease
from knockwood.repository.receive_events import EventKind, ReceiverEvent, ignore
from knockwood.repository.receive_server import Progress
from knockwood.repository.receive_stream import Streaming
from knockwood.repository.repository import Repository
from knockwood.repository.retry import Retry
from knockwood.repository.spool import Spool, SpoolFile
from knockwood.repository.spool_upload import Uploader

LEASE = "wal-receive"
_POLL = 0.05
_HURRIED_EVERY = 0.1
_LEASE_CHECK = 20.0
_LASTING = (AuthenticationError, MissingPrivilegeError, ProgramsMissingError)


class Receiver:
    """Receives one cluster's WAL. `run` works in the foreground, `receiving` in a thread.

    `partial_every`: seconds between two partials of the segment being written; with it comes the
    RPO. `synchronous`: pg_receivewal fsyncs and confirms at once, so that the server's
    synchronous_standby_names can name `slot` and a commit waits for the spool. `older_spool` is where
    earlier versions kept the spool: what is this cluster's there is taken over.
    """

    def __init__(
        self,
        repository: Repository,
        dsn: str,
        spool: Path,
        *,
        older_spool: Path | None = None,
        slot: str = "knockwood",
        synchronous: bool = False,
        programs: Programs | None = None,
        partial_every: float = 1.0,
        on_event: Callable[[ReceiverEvent], None] = ignore,
    ) -> None:
        self.repository = repository
        self.dsn = dsn
        self.slot = slot
        self.partial_every = partial_every
        self.failure: BaseException | None = None
        self.spool = Spool(spool, repository.header.segment_bytes)
        self._older_spool = older_spool
        self._on_event = on_event
        archive = WalArchive(repository)
        self._uploader = Uploader(archive, self.spool, self._archived)
        self._streaming = Streaming(
            dsn, slot, synchronous, programs, archive, self.spool, self._uploader, on_event
        )
        self._repository_retry = Retry()
        self._partial_due = 0.0
        self._partial_begun = 0.0
        self._lease_due = 0.0
        self._news = threading.Condition()
        self._flushing = 0
        self._ended = False

    # --- for other threads ------------------------------------------------------------------------

    @property
    def durable(self) -> tuple[Timeline, Lsn] | None:
        """How far the WAL is in the repository, as far as this receiver put it there."""
        return self._uploader.durable

    def wait_streaming(self, timeout: float = 30) -> None:
        """Wait for the first stream; raises what keeps it from starting, once the time is up.

        What no waiting mends (a missing privilege, a wrong password, no programs) is raised at once.
        """
        deadline = clock.monotonic() + timeout
        with self._news:
            while not self._streaming.started:
                if self.failure is not None:
                    raise self.failure
                if isinstance(self._streaming.problem, _LASTING):
                    raise self._streaming.problem
                if self._ended or clock.monotonic() > deadline:
                    raise self._streaming.problem or ServerDownError(
                        "the receiver did not start to stream in time"
                    )
                self._news.wait(0.1)

    def flush(self, timeout: float = 30) -> Lsn:
        """Push what is received into the repository now; returns how far that reaches.

        Complete to the last commit acknowledged before the call while the server answers; otherwise
        complete to what was received. Raises StorageUnavailableError when the time is up, PostgresError
        if the server answers but does not let us in.
        """
        deadline = clock.monotonic() + timeout
        try:
            target: Progress | None = receive_server.flushed(self.dsn)
        except ServerDownError:
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

    def _flushed(self, target: Progress | None, asked: int) -> bool:
        # The pass that was under way when we asked may have looked at the spool too early.
        if target is None:
            return self._uploader.passes >= asked + 2
        durable = self._uploader.durable
        # After a promotion the new timeline may begin at a lower position than the old one reached.
        return durable is not None and durable[0] >= (target.timeline or 0) and durable[1] >= target.flush

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
                self._take_over()
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

    def _take_over(self) -> None:
        older = self._older_spool
        if older is None or not older.is_dir() or not replace(self.spool, folder=older).files():
            return
        with locks.file_lock(older / "receiver.lock", "receiver"):
            self.spool.take_over(older, self.repository.header.system_identifier)

    def _turn(self, held: Lease) -> None:
        self._check_lease(held)
        hurried = self.spool.hurried()
        if hurried:
            self._partial_due = min(self._partial_due, self._partial_begun + _HURRIED_EVERY)
        eager = bool(self._flushing) or hurried
        self._streaming.turn(eager=eager, watch_every=min(1.0, self.partial_every))
        self._keep_archiving()

    def _check_lease(self, held: Lease) -> None:
        if clock.monotonic() >= self._lease_due:
            self._lease_due = clock.monotonic() + _LEASE_CHECK
            try:
                held.assert_held()
            except LockHeldError:
                raise
            except KnockwoodError as error:
                self._repository_problem(error)

    def _close(self) -> None:
        self._streaming.close()
        try:
            self._uploader.upload(writing=False, progress=None)
        except KnockwoodError as error:
            self._report(EventKind.REPOSITORY_PROBLEM, f"left in the spool: {error}", error)
        self._report(EventKind.STOPPED, "stopped")

    # --- archiving --------------------------------------------------------------------------------

    def _keep_archiving(self) -> None:
        if not self._repository_retry.due():
            return
        now = clock.monotonic()
        with_partial = bool(self._flushing) or now >= self._partial_due
        if with_partial:
            self._partial_begun = now
            self._partial_due = now + self.partial_every
        try:
            self._uploader.upload(
                writing=self._streaming.running, progress=self._streaming.progress, partial=with_partial
            )
        except KnockwoodError as error:
            self._repository_problem(error)
        else:
            self._repository_retry.reset()
        with self._news:
            self._news.notify_all()

    def _archived(self, file: SpoolFile, end: Lsn) -> None:
        kind = EventKind.PARTIAL if file.partial else EventKind.ARCHIVED
        text = f"{file.path.name} up to {end} on timeline {file.segment.timeline}"
        self._on_event(ReceiverEvent(kind, text, segment=None if file.partial else file.segment))

    # --- reporting --------------------------------------------------------------------------------

    def _report(self, kind: EventKind, text: str, error: KnockwoodError | None = None) -> None:
        self._on_event(ReceiverEvent(kind, text, error))

    def _repository_problem(self, error: KnockwoodError) -> None:
        if self._repository_retry.failed(str(error)):
            self._report(EventKind.REPOSITORY_PROBLEM, str(error), error)


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
