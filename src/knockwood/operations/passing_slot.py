"""The replication slot that a command makes for as long as it runs, known to the next one if it is killed.

A slot that nobody reads makes the server keep WAL until its disk is full. So who makes one for a while
writes that down first; whoever finds the note of a dead process takes the slot for its own, to be
dropped. A standing receiver removes the note: from then on the slot is its own, for good.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from knockwood.host import files
from knockwood.host.processes import ProcessIdentity


@dataclass(frozen=True, slots=True)
class PassingSlot:
    """The note about one slot of one cluster, in this machine's state folder."""

    folder: Path
    system_identifier: int
    slot: str

    @property
    def _path(self) -> Path:
        return self.folder / f"passing-slot-{self.system_identifier}-{self.slot}.json"

    def noted(self) -> bool:
        """Whether the slot is (or may be) one that was made for a while."""
        return self._path.exists()

    def left(self) -> bool:
        """Whether it was made for a while by a process that is dead."""
        try:
            value = json.loads(self._path.read_text())
            return not ProcessIdentity(int(value["pid"]), float(value["started"])).alive()
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            return True  # written whole or not at all: only damage makes it unreadable, and a note it is

    def note(self) -> None:
        """Write down that this process makes the slot, before it does; durable on return."""
        own = ProcessIdentity.own()
        value = {"slot": self.slot, "pid": own.pid, "started": own.started}
        files.replace(self._path, json.dumps(value, indent=1).encode())

    def forget(self) -> None:
        """The slot is gone, or a standing receiver's."""
        with files.translated(self._path):
            if self._path.exists():
                self._path.unlink(missing_ok=True)
                files.fsync_file(self.folder)
