"""The last resort: the whole cluster restored, and put in the place of the old one, which is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from knockwood.errors import HostError, RefusedError
from knockwood.host import clock, files, others, privileges, processes
from knockwood.model.recovery import Outcome, Step, StepResult
from knockwood.postgres.control_file import CONTROL_FILE
from knockwood.recover.cluster_swap import (
    Identity,
    Places,
    adopt_configuration,
    require_swappable,
    swap,
    swap_back,
    swapped,
)
from knockwood.recover.journal import StepJournal

KIND: Final = "restore-in-place"
_STOP_SECONDS: Final = 600

Restore = Callable[[Path, Path], str]
"""Restores a complete cluster into the first folder, its tablespaces into the second, anew if a part of it is
there; what it says is for people. The folder appears complete or not as a cluster."""


@dataclass(frozen=True, slots=True)
class RestoreInPlace:
    """restore-in-place: stop, save the last WAL, restore beside, change places. Nothing is deleted.

    `pg_ctl` is the program of the cluster's version, `salvage` archives what the stopped server's pg_wal has
    beyond the archive, `discard` removes what `restore` left in its two folders, and elsewhere.
    """

    restore: Restore
    discard: Callable[[Path, Path], object]
    salvage: Callable[[Path], object]
    pg_ctl: Callable[[], Path]
    kind: str = KIND

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        data, old = _begun(Path(step.arguments["data_directory"]), journal)
        places = Places.of(data, journal.folder.name)
        began = clock.monotonic()
        if self._outdated(places, old, journal):
            self._stop(data)
            state = _state(data)
            self.salvage(data)
            told = self.restore(places.new, places.tablespaces)
            adopted = adopt_configuration(data, places.new)
            journal.note("restored", {"detail": told, "configuration": adopted, "of": state})
        if "swapped" not in journal.notes:
            self._swap(places, old)
            journal.note("swapped", True)
        detail = journal.notes["restored"]["detail"]
        return StepResult(
            step.kind,
            step.title,
            Outcome.DONE,
            f"{detail}; the old cluster is kept in {places.old}; the server is stopped: start it as you always do",
            blocked_seconds=round(clock.monotonic() - began, 3),
            evidence=(str(places.old),),
            values={
                "data_directory": str(data),
                "kept": str(places.old),
                "tablespaces": str(places.tablespaces) if places.tablespaces.exists() else None,
                "configuration": journal.notes["restored"]["configuration"],
                "stopped": True,
            },
        )

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        if "data" not in journal.notes:
            return StepResult(step.kind, step.title, Outcome.ROLLED_BACK, "nothing had been done")
        data, old = _begun(Path(step.arguments["data_directory"]), journal)
        places = Places.of(data, journal.folder.name)
        if not swapped(places, old):
            with files.translated(places.new):
                self.discard(places.new, places.tablespaces)
            detail = "the old cluster was still in its place; what had been restored is removed"
            return StepResult(step.kind, step.title, Outcome.ROLLED_BACK, detail)
        for folder in (places.data, places.old):
            if folder.exists():
                _require_stopped(folder)
        swap_back(places, old)
        detail = f"the old cluster is back in its place; the restored one is kept in {places.rolled_back}"
        return StepResult(
            step.kind, step.title, Outcome.ROLLED_BACK, detail, evidence=(str(places.rolled_back),)
        )

    def _outdated(self, places: Places, old: Identity, journal: StepJournal) -> bool:
        """Whether there is nothing restored yet, or the old server has run since and may have taken commits."""
        restored = journal.notes.get("restored")
        if restored is None:
            return True
        return Identity.of(places.data) == old and _state(places.data) != restored["of"]

    def _stop(self, data: Path) -> None:
        if others.working_in(data):
            account = privileges.server_account(data)
            command: list[str | Path] = [self.pg_ctl(), "-D", data, "-m", "fast", "-w"]
            command += ["-t", str(_STOP_SECONDS), "stop"]
            processes.run(command, account=account, env={"LC_ALL": "C"}, check=False)
        _require_stopped(data)

    def _swap(self, places: Places, old: Identity) -> None:
        """Change places, and change back where a server was started meanwhile: it has written to the old one."""
        if Identity.of(places.data) == old:
            _require_stopped(places.data)
        swap(places, old)
        started = others.working_in(places.old)
        if started:
            swap_back(places, old)
            places.rolled_back.rename(places.new)
            raise HostError(
                f"the server was started while its place was taken (process {started[0].pid})",
                where=str(places.data),
                hint="keep it stopped (systemctl stop, patronictl pause), then knockwood recover --resume",
            )


def _begun(data: Path, journal: StepJournal) -> tuple[Path, Identity]:
    """The data directory with links resolved, and which it was: noted before anything happens."""
    notes = journal.notes
    if "data" in notes:
        return Path(notes["data"]["path"]), Identity.from_json(notes["data"])
    real = require_swappable(data)
    identity = Identity.of(real)
    assert identity is not None
    places = Places.of(real, journal.folder.name)
    for path in (places.new, places.old, places.rolled_back, places.tablespaces):
        if path.exists():
            raise RefusedError("a folder of that name is there already", where=str(path))
    journal.note("data", {"path": str(real)} | identity.as_json())
    return real, identity


def _state(data: Path) -> str:
    """A digest of pg_control: every start and every checkpoint of a server changes it."""
    try:
        return hashlib.sha256((data / CONTROL_FILE).read_bytes()).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _require_stopped(data: Path) -> None:
    running = others.working_in(data)
    if running:
        raise HostError(
            f"the server still runs (process {running[0].pid})",
            where=str(data),
            hint="stop it as you started it (systemctl stop, patronictl pause), then knockwood recover --resume",
        )
