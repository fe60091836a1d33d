"""The repository at rest, with no server: what in it is right, what is not, and what can be restored.

Names, sizes and times of writing are compared in every run. Content is read when it is new, when its
turn in the rotation has come, or all of it with `full`; what was proved is remembered in the repository.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from knockwood.errors import (
    KnockwoodError,
    ObjectDamagedError,
    ObjectMissingError,
    ProgramsMissingError,
    UnsupportedVersionError,
    WrongKeyError,
    WrongSystemError,
)
from knockwood.host import clock
from knockwood.model.finding import Verdict
from knockwood.model.wal import Timeline, TimelineHistory, WalSegment
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.repository import gaps as recorded_gaps
from knockwood.repository import proved
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.listing import scan_backups
from knockwood.repository.backups.model import Backup
from knockwood.repository.commits import ArchiveReader
from knockwood.repository.inventory import ArchiveInventory, history_object
from knockwood.repository.openable import cannot_open
from knockwood.repository.proved import Proved, State
from knockwood.repository.repository import HEADER, Repository, RepositoryHeader
from knockwood.repository.route import Break, WalFacts
from knockwood.repository.verify_backups import BackupResult, check_all
from knockwood.repository.walk import Piece, fetch, workplace
from knockwood.repository.windows import Gap, Unusable, Window, disagreements, survey

ROTATE = 1 / 30
"""The part of what was proved before that each run reads again: with daily runs all within a month."""

Progress = Callable[[str, int, int], None]
"""Called with what is read (`backups`, `wal`), bytes read so far, and bytes to read in all."""

# XLogPageHeaderData.xlp_magic by major version (access/xlog_internal.h).
_MAGIC = {0xD10D: 14, 0xD110: 15, 0xD113: 16, 0xD116: 17, 0xD118: 18}


@dataclass(frozen=True, slots=True)
class Damaged:
    """A stored object that is not what it should be, and the positions it makes unreadable (WAL only)."""

    object: str
    reason: str
    start: str | None = None
    end: str | None = None

    def as_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"object": self.object, "reason": self.reason}
        if self.start is not None:
            value["lost"] = {"from": self.start, "to": self.end}
        return value


@dataclass(frozen=True, slots=True)
class NotChecked:
    """A part that could not be checked, and why."""

    part: str
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {"part": self.part, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome. `acknowledged` are gaps somebody accepted; `bad_backups` have bad pages inside.

    `bytes_read` counts WAL as unpacked and backups as stored; `reused` the objects proved by earlier runs.
    """

    windows: tuple[Window, ...]
    gaps: tuple[Gap, ...]
    damaged: tuple[Damaged, ...]
    not_checked: tuple[NotChecked, ...]
    unusable: tuple[Unusable, ...] = ()
    acknowledged: tuple[Gap, ...] = ()
    bad_backups: tuple[Unusable, ...] = ()
    backups: int = 0
    segments: int = 0
    bytes_read: int = 0
    reused: int = 0
    seconds: float = 0.0
    _newest_bad: bool = field(default=False, repr=False)

    @property
    def verdict(self) -> Verdict:
        """Broken by damage, gaps, unusable backups, or bad pages in the newest backup."""
        if self.gaps or self.damaged or self.unusable or self._newest_bad:
            return Verdict.BROKEN
        return Verdict.NOT_CHECKED if self.not_checked else Verdict.HELD

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": str(self.verdict),
            "windows": [window.as_json() for window in self.windows],
            "gaps": [gap.as_json() for gap in self.gaps],
            "acknowledged_gaps": [gap.as_json() for gap in self.acknowledged],
            "damaged": [damage.as_json() for damage in self.damaged],
            "unusable_backups": [one.as_json() for one in self.unusable],
            "backups_with_bad_pages": [one.as_json() for one in self.bad_backups],
            "not_checked": [one.as_json() for one in self.not_checked],
            "backups": self.backups,
            "segments": self.segments,
            "bytes_read": self.bytes_read,
            "objects_proved_before": self.reused,
            "seconds": round(self.seconds, 3),
        }


def verify(
    repository: Repository,
    *,
    full: bool = False,
    rotate_fraction: float = ROTATE,
    programs_for: Callable[[int], Programs] = find_programs,
    progress: Progress | None = None,
    remember: bool = True,
) -> Verification:
    """Check everything in a repository and tell what can be restored from it.

    Raises StorageUnavailableError and other passing failures; damage is in the outcome. With
    `remember=False` nothing is written to the repository.
    """
    run = _Run(repository, full, rotate_fraction, programs_for, progress)
    found = run.run(remember)
    if run.overtaken(found):
        # An object went while it was read: by expiry, which is no damage, or for good, which is found now.
        found = _Run(repository, full, rotate_fraction, programs_for, progress).run(remember)
    return found


class _Run:
    """One verification, its listing taken once at the beginning."""

    def __init__(
        self,
        repository: Repository,
        full: bool,
        rotate_fraction: float,
        programs_for: Callable[[int], Programs],
        progress: Progress | None,
    ) -> None:
        self._repository = repository
        self._programs_for = programs_for
        self._full = full
        self._progress = progress or (lambda what, done, total: None)
        self._begun = clock.monotonic()
        self._moment = clock.now()
        # The WAL's partial segments first, for the reason that WalArchive.listing gives.
        self._listing = WalArchive(repository).listing()
        self._listing |= {info.name: info for info in repository.storage.list("")}
        known = proved.load(repository, self._listing.values())
        current = known.current(self._listing)
        due = set(current.objects) if full else current.oldest(rotate_fraction)
        kept = {name: entry for name, entry in current.objects.items() if name not in due}
        self._changed = len(kept) != len(known.objects) or len(known.sources) != 1
        self._state = State(kept, known.sources)
        self._damaged: list[Damaged] = []
        self._not_checked: list[NotChecked] = []
        self._fresh: list[Proved] = []
        self._bytes = 0

    def run(self, remember: bool) -> Verification:
        self._check_header()
        backups, results = self._backups()
        inventory = self._inventory()
        facts = self._wal(inventory, backups)
        self._not_checked += [NotChecked(*one) for one in cannot_open(self._repository, self._listing)]
        broken = {id: result.reason for id, result in results.items() if result.reason}
        found = survey(backups, inventory, facts, {k: v for k, v in broken.items() if v})
        open_gaps, acknowledged = self._sorted(found.gaps, inventory)
        if remember and (self._fresh or self._changed):
            objects = {**self._state.objects, **{entry.name: entry for entry in self._fresh}}
            proved.save(self._repository, State(objects, self._state.sources))
        bad, newest_bad = _bad_pages(backups)
        return Verification(
            windows=found.windows,
            gaps=tuple(open_gaps),
            damaged=tuple(self._damaged),
            not_checked=tuple(self._not_checked),
            unusable=found.unusable,
            acknowledged=tuple(acknowledged),
            bad_backups=bad,
            backups=len(backups),
            segments=sum(len(numbers) for numbers in inventory.segments.values()),
            bytes_read=self._bytes,
            reused=len(self._state.objects),
            seconds=clock.monotonic() - self._begun,
            _newest_bad=newest_bad,
        )

    def overtaken(self, found: Verification) -> bool:
        """Whether something called damaged was there at the beginning and has gone since."""
        listed = (damage.object for damage in found.damaged if damage.object in self._listing)
        return any(self._repository.storage.info(name) is None for name in listed)

    # --- parts -------------------------------------------------------------------------------------

    def _check_header(self) -> None:
        try:
            header = RepositoryHeader.from_json(self._repository.get_json(HEADER), HEADER)
        except KnockwoodError as error:
            self._damaged.append(Damaged(HEADER, error.what))
            return
        if header != self._repository.header:
            self._damaged.append(Damaged(HEADER, "was changed since the repository was opened"))

    def _backups(self) -> tuple[list[Backup], dict[str, BackupResult]]:
        backups, errors = scan_backups(self._repository)
        # One that was completed after our listing has its turn in the next run.
        backups = [b for b in backups if f"{b.folder}backup.json" in self._listing]
        self._damaged += [Damaged(error.where or "backups/", error.what) for error in errors]
        total = sum(p.bytes for b in backups for p in b.objects if p.name not in self._state.objects)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._progress("backups", done, total)

        results = check_all(
            self._repository,
            backups,
            self._listing,
            self._state.objects,
            self._moment,
            advance,
            contents=self._full,
        )
        for result in results.values():
            self._damaged += [Damaged(name, reason) for name, reason in result.damaged.items()]
            self._not_checked += [NotChecked(part, why) for part, why in result.not_checked.items()]
            self._fresh += result.proved
            self._bytes += result.bytes
        return backups, results

    def _inventory(self) -> ArchiveInventory:
        archive = WalArchive(self._repository)
        histories: dict[Timeline, TimelineHistory] = {}
        for name in self._listing:
            digits = name.removeprefix("wal/history/").split(".", 1)[0]
            if not name.startswith("wal/history/") or len(digits) != 8:
                continue
            try:
                timeline = Timeline(int(digits, 16))
                histories[timeline] = archive.history(timeline)
            except WrongKeyError as error:
                self._not_checked.append(NotChecked(name, error.what))
            except (ObjectDamagedError, ObjectMissingError, ValueError) as error:
                what = error.what if isinstance(error, KnockwoodError) else str(error)
                self._damaged.append(Damaged(name, what))
        size = self._repository.header.segment_bytes
        inventory = ArchiveInventory.of_names(size, self._listing, histories)
        for timeline in inventory.without_history:
            name = history_object(timeline)
            if not any(damage.object.startswith(name) for damage in self._damaged):
                self._damaged.append(Damaged(name, f"the history of timeline {timeline} is missing"))
        self._damaged += [Damaged(history_object(t), why) for t, why in disagreements(histories)]
        return inventory

    def _wal(self, inventory: ArchiveInventory, backups: list[Backup]) -> WalFacts:
        wanted = [
            WalSegment(timeline, number, inventory.segment_bytes)
            for timeline, numbers in inventory.segments.items()
            for number in numbers
        ]
        wanted += [p.segment for p in inventory.partials if not inventory.has(p.segment)]
        wanted = sorted(set(wanted))
        if not wanted:
            return WalFacts()
        with workplace() as folder:
            programs = self._programs(inventory, wanted, backups, folder)
            if programs is None:
                return self._decode_only(inventory, wanted, folder)
            reader = self._reader(inventory, programs, folder)
            try:
                reader.read_segments(wanted)
            except WrongKeyError as error:
                self._not_checked.append(NotChecked("WAL records", error.what))
            self._bytes += reader.bytes_read
            self._remember(reader, wanted)
            return reader.facts()

    def _reader(self, inventory: ArchiveInventory, programs: Programs, folder: Path) -> ArchiveReader:
        advance = functools.partial(self._progress, "wal")
        return ArchiveReader(
            self._repository, inventory, self._listing, programs, folder, self._state, advance
        )

    def _programs(
        self, inventory: ArchiveInventory, wanted: list[WalSegment], backups: list[Backup], folder: Path
    ) -> Programs | None:
        try:
            major = backups[-1].major if backups else self._major(inventory, wanted[0], folder)
            if major is None:
                self._not_checked.append(NotChecked("WAL records", "the version that wrote them is unknown"))
                return None
            return self._programs_for(major)
        except (ProgramsMissingError, UnsupportedVersionError, WrongKeyError) as error:
            self._not_checked.append(NotChecked("WAL records", error.what))
            return None

    def _major(self, inventory: ArchiveInventory, segment: WalSegment, folder: Path) -> int | None:
        reader = self._reader(inventory, Programs(0, 0, folder), folder)
        piece = reader.piece(segment, inventory.source(segment))
        if piece is None:
            return None
        path = folder / "first"
        try:
            fetch(self._repository, piece, path)
            with path.open("rb") as file:
                return _MAGIC.get(int.from_bytes(file.read(2), "little"))
        except (ObjectDamagedError, ObjectMissingError, WrongSystemError):
            return None
        finally:
            path.unlink(missing_ok=True)

    def _decode_only(self, inventory: ArchiveInventory, wanted: list[WalSegment], folder: Path) -> WalFacts:
        """Without programs to read the records: that each object can be decoded, and begins as it must."""
        reader = self._reader(inventory, Programs(0, 0, folder), folder)
        breaks: list[Break] = []
        for segment in wanted:
            piece = reader.piece(segment, inventory.source(segment))
            if piece is None or piece.object in self._state.objects:
                continue
            try:
                fetch(self._repository, piece, folder / "one")
            except WrongKeyError:
                break  # said already, or by the first that needs a key
            except (ObjectDamagedError, ObjectMissingError, WrongSystemError) as error:
                breaks.append(_whole_segment(piece, error.what))
            self._bytes += segment.bytes
        self._tell(breaks)
        return replace(reader.facts(), breaks=tuple(breaks))

    def _remember(self, reader: ArchiveReader, wanted: list[WalSegment]) -> None:
        bad: set[WalSegment] = set()
        for damage in reader.breaks:
            first = damage.at.value // damage.segment.bytes
            last = max(first, (damage.until.value - 1) // damage.segment.bytes)
            bad.update(WalSegment(damage.timeline, n, damage.segment.bytes) for n in range(first, last + 1))
            bad.add(damage.segment)
        self._tell(reader.breaks)
        for segment in wanted:
            piece = reader.piece(segment, reader.inventory.source(segment))
            facts = reader.segments.get(segment)
            if piece is None or facts is None or segment in bad:
                continue
            end = reader.ends.get(segment.timeline)
            end = end if end is not None and segment.start <= end <= segment.end else None
            before = self._state.objects.get(piece.object)
            if before is None:
                self._fresh.append(Proved.of(self._listing[piece.object], self._moment, facts, end))
            elif (before.facts, before.end) != (facts, end):
                self._fresh.append(replace(before, facts=facts, end=end))

    def _tell(self, breaks: list[Break]) -> None:
        self._damaged += [Damaged(b.object, b.reason, str(b.at), str(b.until)) for b in breaks]

    def _sorted(self, found: tuple[Gap, ...], inventory: ArchiveInventory) -> tuple[list[Gap], list[Gap]]:
        """Open gaps, and those that somebody acknowledged."""
        try:
            known = recorded_gaps.list_gaps(self._repository, inventory)
        except ObjectDamagedError as error:
            self._damaged.append(Damaged(error.where or "gaps/", error.what))
            known = ()
        accepted = [gap.range for gap in known if gap.acknowledged is not None]
        open_gaps: list[Gap] = []
        acknowledged: list[Gap] = []
        for gap in found:
            seen = any(r.timeline == gap.timeline and r.start <= gap.start <= r.end for r in accepted)
            (acknowledged if seen and gap.object is None else open_gaps).append(gap)
        return open_gaps, acknowledged


def _whole_segment(piece: Piece, reason: str) -> Break:
    segment = piece.segment
    return Break(segment.timeline, segment.start, None, segment, piece.object, reason)


def _bad_pages(backups: list[Backup]) -> tuple[tuple[Unusable, ...], bool]:
    bad = [b for b in backups if b.health.verdict is Verdict.BROKEN]
    told = tuple(Unusable(b.id, f"{b.health.bad_page_count} bad pages: {b.health.reason}") for b in bad)
    newest = max(backups, key=lambda b: b.finished_at, default=None)
    return told, newest is not None and newest.health.verdict is Verdict.BROKEN
