"""From the spool into the archive: durable there before it leaves here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from knockwood.host import clock
from knockwood.model.wal import Lsn, Timeline
from knockwood.repository.archive import WalArchive
from knockwood.repository.receive_server import Progress
from knockwood.repository.spool import Spool, SpoolFile
from knockwood.repository.walfile import content_end, rounded_down, rounded_up

# A file whose last bytes did not change for so long has no write under way.
_QUIET = 0.05


@dataclass
class Uploader:
    """Moves files from the spool to the archive; one thread uses it.

    `durable` is how far the archive reaches by what this uploader stored or found there, `passes`
    counts the complete looks at the spool.
    """

    archive: WalArchive
    spool: Spool
    on_stored: Callable[[SpoolFile, Lsn], None]
    durable: tuple[Timeline, Lsn] | None = None
    passes: int = 0
    _stored: set[str] = field(default_factory=set)
    _histories: set[Timeline] = field(default_factory=set)
    _begins: dict[Timeline, Lsn] = field(default_factory=dict)
    _sent: dict[str, Lsn] = field(default_factory=dict)
    _seen: tuple[str, Lsn, float] = ("", Lsn(0), 0.0)

    def upload(self, *, writing: bool, progress: Progress | None, partial: bool = True) -> None:
        """Store every whole segment and history, and (if `partial`) the beginning of the one being written.

        `writing`: whether pg_receivewal runs. What it still needs to find its position stays here.
        Raises the archive's errors; what was stored until then is stored.
        """
        # Listed before the histories are: pg_receivewal writes a timeline's history first.
        present = self.spool.files()
        for timeline, text in self.spool.histories():
            if timeline not in self._histories:
                self.archive.put_history(timeline, text)
                self._histories.add(timeline)
        for file in present:
            last = file is present[-1]
            if not file.partial:
                self._upload_whole(file)
                if self._whole_after(file, present):
                    self._discard(file)
            elif not last:
                # Its timeline was left, or the receiver went on elsewhere: nobody writes it any more.
                self._upload_beginning(file, writing=False, progress=None)
                self._discard(file)
            elif partial:
                self._upload_beginning(file, writing=writing, progress=progress)
        if partial:
            self.passes += 1

    def _whole_after(self, file: SpoolFile, present: list[SpoolFile]) -> bool:
        # Any later file gives pg_receivewal its position; a later whole one also holds the disk's proof
        # that it was finished, so that a half-made newest file can be thrown away.
        return any(not other.partial and other.rank > file.rank for other in present)

    def _upload_whole(self, file: SpoolFile) -> None:
        # One after the other, in order: with several under way a crash, or a look at the archive
        # meanwhile, would find a hole.
        if file.segment.name in self._stored:
            return
        new = self.archive.put_segment(file.segment, file.path)
        self._stored.add(file.segment.name)
        self.found(file.segment.timeline, file.segment.end)
        self.archive.drop_partials(file.segment)
        self._sent.pop(file.segment.name, None)
        if new:
            self.on_stored(file, file.segment.end)

    def _upload_beginning(self, file: SpoolFile, *, writing: bool, progress: Progress | None) -> None:
        end = self._end(file, writing=writing, progress=progress)
        if end <= self._sent.get(file.segment.name, file.segment.start):
            return
        new = self.archive.put_partial(file.segment, file.path, end)
        self._sent[file.segment.name] = end
        self.found(file.segment.timeline, end)
        self.archive.drop_partials(file.segment, below=end)
        if new:
            self.on_stored(file, end)

    def _end(self, file: SpoolFile, *, writing: bool, progress: Progress | None) -> Lsn:
        """How far the file surely holds valid WAL; never too far, sometimes a few bytes short."""
        content = content_end(file.path, file.segment)
        if content == file.segment.start:
            return content
        now = clock.monotonic()
        name, before, since = self._seen
        unchanged = name == file.segment.name and before == content
        if not unchanged:
            self._seen = (file.segment.name, content, now)
        quiet = not writing or (unchanged and now - since >= _QUIET)
        end = rounded_up(content) if quiet else rounded_down(content)
        # A record may end with zeros, which the file cannot show; the server knows what we wrote.
        written = progress.written if progress is not None else None
        if written is not None and self._belongs(written, file):
            end = max(end, written)
        return min(end, file.segment.end)

    def _belongs(self, written: Lsn, file: SpoolFile) -> bool:
        """Whether a position that the server says we wrote is one of this file.

        The server does not name the timeline. Just after a switch it may still tell the position where
        the old one ended, in a segment that the new one has too and has not filled so far.
        """
        timeline = file.segment.timeline
        if timeline not in self._begins:
            history = self.spool.history(timeline)
            if timeline > 1 and (history is None or not history.switches):
                return False
            self._begins[timeline] = history.switches[-1][1] if history and history.switches else Lsn(0)
        return max(file.segment.start, self._begins[timeline]) < written <= file.segment.end

    def found(self, timeline: Timeline, end: Lsn) -> None:
        """Note that the archive reaches so far; a later timeline counts for more than a later position."""
        self.durable = max(self.durable or (timeline, end), (timeline, end))

    def _discard(self, file: SpoolFile) -> None:
        self.spool.remove(file)
        self._stored.discard(file.segment.name)
        self._sent.pop(file.segment.name, None)
