"""The journal of one execution of a plan: durable before anything is done, readable after any crash.

A folder holds plan.json (what was approved), journal.jsonl and evidence/. Each line of the journal is the
CRC-32 of its JSON in eight hexadecimal digits, a space, and the JSON; a line is flushed before the next thing
happens. So only the last line can be torn by a crash; it is dropped, for nothing was done on its word.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from knockwood.errors import HostError, KnockwoodError, RefusedError
from knockwood.host import clock, files
from knockwood.host.locks import file_lock
from knockwood.model.recovery import Plan
from knockwood.recover import evidence
from knockwood.recover.plan.parse import parse_plan

RECOVERIES: Final = "recoveries"
_PLAN: Final = "plan.json"
_JOURNAL: Final = "journal.jsonl"
_EVIDENCE: Final = "evidence"
_FLUSHING: Final = 16

Event = Mapping[str, Any]


@contextmanager
def cluster_lock(state: Path, cluster: str) -> Iterator[None]:
    """One repair of a cluster at a time on this machine; raises LockHeldError. Free when its holder dies."""
    with file_lock(state / RECOVERIES / "locks" / f"{cluster}.lock", f"recovery of {cluster}"):
        yield


def new_folder(state: Path, plan: Plan) -> Path:
    """Where the next execution of `plan` keeps its journal; nothing is made yet."""
    name = f"{clock.stamp(clock.now())}-{plan.id}"
    folder = state / RECOVERIES / name
    number = 2
    while folder.exists():
        folder = state / RECOVERIES / f"{name}-{number}"
        number += 1
    return folder


def folders(state: Path) -> list[Path]:
    """The folder of every execution that began, oldest first.

    Without a plan none began: the plan is written before anything is done.
    """
    place = state / RECOVERIES
    if not place.is_dir():
        return []
    return sorted(folder for folder in place.iterdir() if (folder / _PLAN).is_file())


class Journal:
    """An execution's journal. `events` are all that is durable, in order."""

    def __init__(self, folder: Path, plan: Plan, events: list[Event], handle: int | None) -> None:
        self.folder = folder
        self.plan = plan
        self.events = events
        self._handle = handle
        self._failure: KnockwoodError | None = None

    @classmethod
    def create(cls, folder: Path, plan: Plan) -> Journal:
        """Begin a journal for a plan; what is executed is the plan as it is read back.

        Raises RefusedError when the plan cannot be written down such that it stays the same plan.
        """
        text = _canonical(plan)
        read = parse_plan(json.loads(text))
        if read.id != plan.id:
            raise RefusedError("the plan changes when it is written down", where=plan.id)
        files.make_folder(folder / _EVIDENCE)
        # The journal comes first: a plan that can be read has a journal beside it.
        files.replace(folder / _JOURNAL, b"")
        files.write_new(folder / _PLAN, [text.encode()])
        return cls(folder, read, [], _open(folder / _JOURNAL))

    @classmethod
    def open(cls, folder: Path, *, write: bool = False) -> Journal:
        """Read a journal; with `write` (under the cluster's lock) cut off a torn last line and go on with it.

        Raises HostError when the plan or a line that was durable is damaged.
        """
        plan = _read_plan(folder)
        path = folder / _JOURNAL
        with files.translated(path):
            data = path.read_bytes()
        events, good = _parse(path, data)
        handle = None
        if write:
            handle = _open(path)
            if good < len(data):
                with files.translated(path):
                    os.ftruncate(handle, good)
                    os.fsync(handle)
        return cls(folder, plan, events, handle)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def append(self, event: str, **values: Any) -> None:
        """Write one event down; durable on return. Raises HostError, NoSpaceError; then no more is written."""
        if self._failure is not None:
            raise self._failure
        if self._handle is None:
            raise HostError("the journal is not open for writing", where=str(self.folder))
        record = {"event": event, "time": clock.now().isoformat(), **values}
        line = _line(record)
        try:
            with files.translated(self.folder / _JOURNAL):
                _write_all(self._handle, line)
                os.fsync(self._handle)
        except KnockwoodError as error:
            # What follows half a line would be lost with it.
            self._failure = error
            raise
        self.events.append(json.loads(line[9:]))

    def of_step(self, step: int) -> list[Event]:
        return [event for event in self.events if event.get("step") == step]

    @property
    def evidence_folder(self) -> Path:
        return self.folder / _EVIDENCE

    @property
    def finished(self) -> bool:
        """Whether the execution came to its end, whatever that was: there is nothing to resume."""
        return any(event["event"] == "finished" for event in self.events)


class StepJournal:
    """One step's part of the journal: what its handler notes before and after each thing it does.

    `notes` hold, by name, what was noted last, also by a run that was killed. A handler writes a note before
    it changes anything: a step that has noted something and fails stays open, to be resumed or rolled back.
    """

    def __init__(self, journal: Journal, position: int) -> None:
        self._journal = journal
        self.position = position
        self._found: dict[str, dict[str, str]] | None = None

    @property
    def folder(self) -> Path:
        """The execution's folder; a handler's own working files go elsewhere."""
        return self._journal.folder

    @property
    def plan_id(self) -> str:
        return self._journal.plan.id

    @property
    def notes(self) -> dict[str, Any]:
        return {
            event["name"]: event["value"]
            for event in self._journal.of_step(self.position)
            if event["event"] == "note"
        }

    def note(self, name: str, value: Any) -> None:
        """Remember a JSON value under a name; durable on return."""
        self._journal.append("note", step=self.position, name=name, value=value)

    def evidence(self, name: str, data: bytes) -> Path:
        """Keep bytes durably; returns the path. What was kept first under this name stays, and is returned."""
        self.evidence_of_many({name: data})
        path = self.kept(name)
        assert path is not None
        return path

    def evidence_of_many(self, pieces: Mapping[str, bytes]) -> None:
        """Keep bytes durably under their names; what was kept first under one stays. Flushed side by side."""
        there = self._by_name()
        files = {name: f"{self.position:03d}-{name}" for name in pieces if name not in there}
        if not files:
            return
        folder = self._journal.evidence_folder
        with ThreadPoolExecutor(_FLUSHING) as pool:
            jobs = {
                name: pool.submit(evidence.keep, folder, file, pieces[name]) for name, file in files.items()
            }
        kept = [{"name": name, "file": files[name], "sha256": job.result()[1]} for name, job in jobs.items()]
        self._journal.append("evidence", step=self.position, kept=kept)
        there.update((entry["name"], entry) for entry in kept)

    def kept(self, name: str) -> Path | None:
        """Where evidence of this name lies, None if none was kept."""
        entry = self._entry(name)
        return self._journal.evidence_folder / entry["file"] if entry else None

    def read_evidence(self, name: str) -> bytes:
        """Evidence as it was kept; raises HostError if there is none or it has changed since."""
        entry = self._entry(name)
        if entry is None:
            raise HostError(f"no evidence named {name!r} was kept", where=str(self.folder))
        return evidence.read(self._journal.evidence_folder / entry["file"], entry["sha256"])

    @property
    def evidence_paths(self) -> tuple[str, ...]:
        """The paths of all that this step has kept, in order; for its StepResult."""
        place = self._journal.evidence_folder
        return tuple(str(place / entry["file"]) for entry in self._kept())

    def _entry(self, name: str) -> dict[str, str] | None:
        return self._by_name().get(name)

    def _by_name(self) -> dict[str, dict[str, str]]:
        """The first of each name."""
        if self._found is None:
            self._found = {entry["name"]: entry for entry in reversed([*self._kept()])}
        return self._found

    def _kept(self) -> Iterator[dict[str, str]]:
        for event in self._journal.of_step(self.position):
            if event["event"] == "evidence":
                # Once each piece had an event of its own: an execution may be resumed by a later version.
                yield from event.get("kept", [event])


def holder() -> dict[str, Any]:
    """Who executes: written with each beginning, for whoever finds the journal later."""
    try:
        account = getpass.getuser()
    except (KeyError, OSError):
        account = str(os.geteuid())
    return {"host": socket.gethostname(), "pid": os.getpid(), "account": account}


def _canonical(plan: Plan) -> str:
    try:
        return json.dumps(plan.as_json(), sort_keys=True, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RefusedError("the plan cannot be written down", where=plan.purpose, hint=str(error)) from error


def _read_plan(folder: Path) -> Plan:
    path = folder / _PLAN
    with files.translated(path):
        text = path.read_text()
    try:
        value = json.loads(text)
        plan = parse_plan(value)
    except (ValueError, KnockwoodError) as error:
        raise HostError("the plan cannot be read", where=str(path), hint=str(error)) from error
    if plan.id != value.get("id"):
        raise HostError(
            "the plan is not the one that was approved",
            where=str(path),
            hint=f"it was {value.get('id')} and is {plan.id}: was the file edited, or is the disk faulty?",
        )
    return plan


def _parse(path: Path, data: bytes) -> tuple[list[Event], int]:
    """The events, and up to which byte the file is good. Only what a crash can tear may be missing."""
    events: list[Event] = []
    good = 0
    while good < len(data):
        end = data.find(b"\n", good)
        event = _event(data[good:end]) if end >= 0 else None
        if event is None:
            if end >= 0 and data[end + 1 :].strip(b"\0\n"):
                raise HostError(
                    f"line {len(events) + 1} of the journal is damaged",
                    where=str(path),
                    hint="the disk that holds the state folder may be faulty: do not resume from it",
                )
            break
        events.append(event)
        good = end + 1
    return events, good


def _event(line: bytes) -> Event | None:
    try:
        if len(line) < 10 or line[8:9] != b" " or int(line[:8], 16) != zlib.crc32(line[9:]):
            return None
        value = json.loads(line[9:])
    except ValueError:
        return None
    return value if isinstance(value, dict) and "event" in value else None


def _line(record: Event) -> bytes:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x " % zlib.crc32(text) + text + b"\n"


def _open(path: Path) -> int:
    with files.translated(path):
        return os.open(path, os.O_WRONLY | os.O_APPEND)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
