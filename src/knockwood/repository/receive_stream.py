"""Keeping pg_receivewal at work: where it begins, what it lacks, how it is doing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from knockwood.errors import (
    KnockwoodError,
    NoSpaceError,
    PostgresError,
    ServerDownError,
    SlotLostError,
    WrongSystemError,
)
from knockwood.host import clock
from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalRange, WalSegment
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import Connection, ServerFacts, connect, server_facts
from knockwood.repository import gaps, receive_server
from knockwood.repository.archive import WalArchive
from knockwood.repository.receive_events import EventKind, ReceiverEvent
from knockwood.repository.receive_server import Progress, ServerPosition, Slot, Stream
from knockwood.repository.receive_start import archive_next, choose_start, missing_pieces
from knockwood.repository.retry import Retry
from knockwood.repository.spool import Spool, SpoolFile
from knockwood.repository.spool_upload import Uploader

_STALLED = 60.0

_LONGEST_PAUSE = 1.0
"""Seconds between attempts to connect. A standby that was just promoted has no slot of ours: each of its
checkpoints may remove WAL that we lack."""


@dataclass
class Streaming:
    """Runs pg_receivewal into the spool, again and again. One thread uses it: its children die with it."""

    dsn: str
    slot: str
    synchronous: bool
    programs: Programs | None
    archive: WalArchive
    spool: Spool
    uploader: Uploader
    report: Callable[[ReceiverEvent], None]
    started: bool = False
    problem: KnockwoodError | None = None
    progress: Progress | None = None
    _stream: Stream | None = None
    _watch: Connection | None = None
    _looked_at_archive: bool = False
    _retry: Retry = field(default_factory=lambda: Retry(_LONGEST_PAUSE))
    _watch_due: float = 0.0
    _moved: tuple[Lsn, float] = (Lsn(0), 0.0)

    @property
    def running(self) -> bool:
        return self._stream is not None and self._stream.running

    def turn(self, *, eager: bool, watch_every: float) -> None:
        """Look after the stream once; `eager` asks the server for its progress now.

        Raises WrongSystemError; other failures are reported and tried again later.
        """
        if self._stream is not None and self._stream.running:
            if eager or clock.monotonic() >= self._watch_due:
                self._watch_due = clock.monotonic() + watch_every
                self._look_at_progress(self._stream)
            return
        if self._stream is not None:
            ended = self._stream.failure()
            self._stream = None
            self._forget_watch()
            if ended.removed is not None:
                self._attempt(self._skip_what_is_gone)
            else:
                self._report_problem(EventKind.SERVER_PROBLEM, ended.error)
        elif self._retry.due():
            self._attempt(self._start)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except WrongSystemError:
            raise
        except (PostgresError, NoSpaceError) as error:
            self._report_problem(EventKind.SERVER_PROBLEM, error)
        except KnockwoodError as error:
            self._report_problem(EventKind.REPOSITORY_PROBLEM, error)

    def _start(self) -> None:
        for done in self.spool.mend():
            self._report(EventKind.MENDED, done)
        with connect(self.dsn, application_name="knockwood receiver") as connection:
            facts = server_facts(connection, self.archive.repository.header.system_identifier)
            slot = self._reserve(connection)
        server = receive_server.identify(self.dsn)
        self._position(server, slot)
        programs = self.programs or find_programs(facts.major)
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
        self.started = True
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
            stock = self.archive.inventory()
            archived = archive_next(stock)
            if archived is not None:
                self.uploader.found(archived.timeline, stock.end_from(archived.timeline, archived.start))
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
        return self.spool.history(timeline) or self.archive.history(timeline)

    def _go_to(self, segment: WalSegment) -> None:
        """Empty the spool into the archive, then make `segment` the one to begin with."""
        self.uploader.upload(writing=False, progress=None)
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
        self._retry.reset()

    def _reached(self) -> Lsn:
        present = [file for file in self.spool.files() if file.reached() > file.segment.start]
        if present:
            return present[-1].reached()
        stock = self.archive.inventory()
        wanted = archive_next(stock)
        if wanted is None:
            # Nothing was ever received: what comes before the beginning is no gap.
            return Lsn(1 << 63)
        return stock.end_from(wanted.timeline, wanted.start)

    def _record_gap(self, piece: WalRange) -> None:
        reason = "the server had removed this WAL before it was received"
        gaps.record(self.archive.repository, piece, reason)
        lost = SlotLostError(f"no WAL was received for {piece}: {reason}", hint=gaps.REMEDY)
        self._report(EventKind.GAP, str(lost), lost, piece)

    def close(self) -> None:
        """End pg_receivewal and wait for it."""
        if self._stream is not None:
            self._stream.stop()
            self._stream = None
        self._forget_watch()

    def _report(
        self, kind: EventKind, text: str, error: KnockwoodError | None = None, gap: WalRange | None = None
    ) -> None:
        self.report(ReceiverEvent(kind, text, error, gap))

    def _report_problem(self, kind: EventKind, error: KnockwoodError) -> None:
        self.problem = error
        if self._retry.failed(str(error)):
            self._report(kind, str(error), error)

    def _look_at_progress(self, stream: Stream) -> None:
        now = clock.monotonic()
        try:
            if self._watch is None:
                self._watch = connect(self.dsn, application_name="knockwood receiver")
            self.progress = receive_server.progress(self._watch, self.slot)
        except PostgresError:
            # pg_receivewal itself tells when the server is gone; files tell most of the rest.
            self._forget_watch()
            return
        written = self.progress.written
        if written is not None:
            self._retry.reset()
        if written is not None and (written != self._moved[0] or written >= self.progress.flush):
            self._moved = (written, now)
        elif now - self._moved[1] > _STALLED:
            stream.stop()
            self._stream = None
            self._forget_watch()
            stalled = ServerDownError(f"pg_receivewal received nothing for {_STALLED:.0f} s, started again")
            self._report_problem(EventKind.SERVER_PROBLEM, stalled)

    def _forget_watch(self) -> None:
        self.progress = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None


def _next(file: SpoolFile) -> WalSegment:
    return file.segment if file.partial else file.segment.next()


def _order(segment: WalSegment) -> tuple[int, int]:
    return (segment.number, segment.timeline)
