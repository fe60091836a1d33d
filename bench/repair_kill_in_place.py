"""The whole cluster restored in place, killed: the old one or the new one, each whole, and every promise kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from kill_checks import cannot_start, leftovers, strays
from kill_site import Site, must_backup
from knockwood.errors import PostgresError
from knockwood.repository.walk import workplace
from repair_kill_base import Repair, ask, swallowed

_STARTS_WITHIN = 60.0
_WORKS_MEANWHILE = 1.0


class InPlace(Repair):
    """`recover --in-place --apply`: it stops the server itself; nobody but us starts it again."""

    def __init__(self) -> None:
        super().__init__("cluster in place")
        self.old = 0
        self.backed_up = False

    def prepare(self, site: Site) -> None:
        if self.killing_again:
            return
        up(site)
        if not self.backed_up:
            _receive_anew(site)
            must_backup(site)
            self.backed_up = True
        self.old = _data(site).stat().st_ino

    def command(self, site: Site) -> list[str]:
        return ["recover", "--in-place", "--apply"]

    # --- what must hold after a kill --------------------------------------------------------------

    def after_kill(self, site: Site) -> list[str]:
        wrong = strays(site) + self.state(site)
        again = not self.killing_again and self.chance.random() < 0.2
        self.killing_again = again and self.unfinished(site)
        return wrong

    def state(self, site: Site) -> list[str]:
        data, wrong = _data(site), []
        if data.exists() and not _whole(data):
            wrong.append("the data directory is not a whole cluster")
        olds = [folder for folder in _clusters(site) if folder.stat().st_ino == self.old]
        if len(olds) != 1 or not _whole(olds[0]):
            wrong.append(f"the old cluster is not there, whole: {olds}")
        for folder in _clusters(site):
            if folder != data and folder.stat().st_ino != self.old and not _whole(folder):
                wrong += cannot_start(site, folder)
        return wrong

    # --- ways to an end ---------------------------------------------------------------------------

    def again(self, site: Site) -> list[str]:
        self.killing_again = False
        wrong: list[str] = []
        if self.unfinished(site):
            self.turns += 1
            if self.turns % 3 == 0:
                wrong = self.rolled_back(site)
            else:
                how = "resumed"
                if self.turns % 3 == 2 and self._is_old(site):
                    # Somebody starts the old server first, and it takes commits.
                    up(site)
                    time.sleep(_WORKS_MEANWHILE)
                    how = "resumed after the old server ran again"
                wrong = self.run(site, ["recover", "--resume"], how)
                wrong += self._swapped(site)
        else:
            self.ends["nothing was begun, or all was done"] += 1
        up(site)
        return wrong + self.promises(site) + self._tidy(site)

    def healed(self, site: Site) -> bool:
        return False

    def as_damaged(self, site: Site) -> bool:
        return self._is_old(site)

    def _is_old(self, site: Site) -> bool:
        data = _data(site)
        return data.exists() and data.stat().st_ino == self.old

    def _swapped(self, site: Site) -> list[str]:
        if self._is_old(site):
            return ["it came to its end and the old cluster is still in its place"]
        kept = [folder for folder in _clusters(site) if folder.stat().st_ino == self.old]
        return [] if len(kept) == 1 and ".old-" in kept[0].name else ["the old cluster is not kept"]

    def _tidy(self, site: Site) -> list[str]:
        """Remove what the user is told to remove; nothing else may be there."""
        wrong = []
        if not self._is_old(site):
            self.backed_up = False
            _receive_anew(site)
        for folder in _clusters(site):
            if folder == _data(site):
                continue
            if ".old-" not in folder.name and ".rolled-back-" not in folder.name:
                wrong.append(f"left behind: {folder.name}")
            shutil.rmtree(folder)
        with workplace():
            cluster = site.cluster()
        return wrong + leftovers(site, cluster.repository(), cluster.state) + strays(site)


def up(site: Site) -> None:
    """The server started, as its supervisor would; it takes connections."""
    deadline = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < deadline:
        with contextlib.suppress(PostgresError):
            if not site.server.running:
                site.server.start()
                site.note_server()
            if ask(site.dsn, "select not pg_is_in_recovery()")[0][0]:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {site.server.log_tail(20)}")


def _receive_anew(site: Site) -> None:
    """The slot went with the old cluster."""
    site.receiver.stop()
    swallowed(site.dsn, "checkpoint")
    site.receiver.start()


def _data(site: Site) -> Path:
    return site.server.data_directory


def _clusters(site: Site) -> Iterator[Path]:
    data = _data(site)
    names = sorted(os.listdir(data.parent))
    for name in names:
        path = data.parent / name
        if (
            path.is_dir()
            and (name == data.name or name.startswith(f"{data.name}."))
            and path.suffix != ".socket"
        ):
            yield path


def _whole(folder: Path) -> bool:
    return (folder / "PG_VERSION").is_file() and (folder / "global" / "pg_control").is_file()
