"""The folder of one restored cluster: data directory, WAL spool, tablespaces, configuration and log."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from knockwood.clone.goal import config_text
from knockwood.errors import DirectoryNotEmptyError, RefusedError
from knockwood.host import files, privileges
from knockwood.host.privileges import Account

_REMOVED = ("postmaster.pid", "postmaster.opts", "standby.signal", "recovery.conf", "recovery.done")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where the parts of a restored cluster lie below `root`. The server's account owns them all."""

    root: Path
    account: Account | None = None

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def spool(self) -> Path:
        return self.root / "spool"

    @property
    def tablespaces(self) -> Path:
        return self.root / "tablespaces"

    @property
    def log(self) -> Path:
        return self.root / "server.log"

    @property
    def config(self) -> Path:
        return self.root / "server.conf"

    @property
    def kept_auto_config(self) -> Path:
        """The postgresql.auto.conf of the backup, out of the server's way."""
        return self.root / "postgresql.auto.conf"

    def create(self, sign: Callable[[], None] | None = None) -> None:
        """Make the folders, calling `sign` before anything else is written into the first.

        Raises DirectoryNotEmptyError, or RefusedError where the server's account cannot enter.
        """
        with files.translated(self.root):
            if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
                raise DirectoryNotEmptyError(
                    "the folder is not empty",
                    where=str(self.root),
                    hint="name a folder that does not exist yet",
                )
            new = not self.root.exists()
            # The parents let the server's account pass through, the folder itself is closed below.
            files.make_folder(self.root, 0o711)
            try:
                require_reachable(self.root, self.account)
            except RefusedError:
                if new:
                    self.root.rmdir()
                raise
            self.root.chmod(0o700)
            if sign is not None:
                sign()
        for folder in (self.root, self.data, self.spool):
            files.make_folder(folder)
            privileges.give(folder, self.account)

    def write(self, path: Path, text: str) -> None:
        """Write a small file that the server can read."""
        files.replace(path, text.encode())
        privileges.give(path, self.account)

    def configure(self, settings: Mapping[str, str]) -> None:
        """Write the server's whole configuration; nothing of production's is read."""
        self.write(self.config, config_text(settings))

    def detach(self) -> None:
        """Take away what ties a fetched data directory to the server it came from.

        Its own postgresql.auto.conf is kept beside it: PostgreSQL would read it whatever other
        configuration it is given. Slots would hold back WAL, standby.signal would follow a primary.
        """
        with files.translated(self.data):
            for name in _REMOVED:
                (self.data / name).unlink(missing_ok=True)
            automatic = self.data / "postgresql.auto.conf"
            if automatic.exists():
                automatic.rename(self.kept_auto_config)
            for slot in _entries(self.data / "pg_replslot"):
                files.remove_tree(slot)
            # The plan's WAL is the only WAL there is.
            for entry in _entries(self.data / "pg_wal"):
                if entry.is_file():
                    entry.unlink()
            self.write(self.root / "hba.conf", "local all all trust\n")
            self.write(self.root / "ident.conf", "")
            self.write(self.data / "recovery.signal", "")

    def follow(self) -> None:
        """Make the server a standby, which waits for more WAL where it ends."""
        with files.translated(self.data):
            (self.data / "recovery.signal").unlink(missing_ok=True)
        self.write(self.data / "standby.signal", "")

    def aim(self) -> None:
        """Make a standby a server that recovers to a target and stops there."""
        self.write(self.data / "recovery.signal", "")
        with files.translated(self.data):
            (self.data / "standby.signal").unlink(missing_ok=True)

    def permit_promotion(self) -> None:
        """Let recovery end in a promotion (see `goal.restore_command`)."""
        self.write(self.spool / "promote", "")


def require_reachable(path: Path, account: Account | None) -> None:
    """Raise RefusedError unless the server's account can walk down to `path`."""
    if not privileges.reachable_by(path, account):
        name = account.name if account else ""
        raise RefusedError(
            f"the account {name}, which runs the server, cannot enter the folder",
            where=str(path),
            hint="name a folder whose parents everybody may pass through (mode 755), or run as that account",
        )


def _entries(folder: Path) -> list[Path]:
    return [folder / name for name in os.listdir(folder)] if folder.is_dir() else []
