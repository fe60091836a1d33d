"""What must hold after every kill. Each check returns sentences about what does not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kill_site import Site
from knockwood.cli.main import main as run_command
from knockwood.errors import PostgresError
from knockwood.host import clock
from knockwood.postgres.server import LocalServer
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.repository import Repository
from knockwood.repository.storage.holder import Holder
from sandbox import Said

PATIENCE = 15.0
"""Seconds that the children of a killed process have to end."""

_PYTHONS = re.compile(r"(tmp)?[a-z0-9_]{8}")
"""Names that Python's tempfile makes: its trial of a folder, and a file without a name's before it loses it."""

RPO = 2.0
"""Seconds: what docs/wal.md states for a machine that is lost, with a partial every second."""


@dataclass(frozen=True, slots=True)
class Restored:
    """One full restore: what the witness had been promised before it, and what of that it lacks."""

    lost_machine: bool
    promised: int
    missing: int
    oldest_missing: float


def answer(site: Site, words: list[str], config: Path | None = None) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of a command, run in this process to save the start of Python."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = run_command(site.words(words, config))
    return status, json.loads(out.getvalue() or "{}")


def listed_is_whole(site: Site, config: Path | None = None) -> list[str]:
    """Every backup that is listed has all its objects, in their size; what is stored verifies."""
    status, values = answer(site, ["backups"], config)
    if status != 0:
        return [f"backups ended with {status}: {values.get('damaged') or values.get('error')}"]
    repository = site.cluster(config).repository()
    wrong = []
    listed = {item["id"] for item in values["backups"]}
    for backup in list_backups(repository):
        if backup.id not in listed:
            wrong.append(f"backup {backup.id} is complete and not listed")
        if backup.parent is not None and backup.parent not in listed:
            wrong.append(f"backup {backup.id} is listed without the one it builds on")
        for part in backup.objects:
            info = repository.storage.info(part.name)
            if info is None or info.bytes != part.bytes:
                wrong.append(f"backup {backup.id} is listed and lacks {part.name}")
    return wrong + verified(site, config)


def verified(site: Site, config: Path | None = None) -> list[str]:
    """`verify` finds the repository as it should be."""
    status, values = answer(site, ["verify"], config)
    if status == 0 and not values["damaged"] and not values["gaps"]:
        return []
    names = ("damaged", "gaps", "unusable", "bad_backups", "not_checked", "error")
    return [f"verify ended with {status}: " + json.dumps({n: values[n] for n in names if values.get(n)})]


# --- what is left behind --------------------------------------------------------------------------


def strays(site: Site) -> list[str]:
    """Processes at work in the sandbox that are neither the server's nor the receiver's."""
    deadline = time.monotonic() + PATIENCE
    while found := _strange(site):
        if time.monotonic() > deadline:
            return [f"left behind: process {line}" for line in found]
        time.sleep(0.05)
    return []


def _strange(site: Site) -> list[str]:
    roots = [site.server.pid, site.receiver.child.pid if site.receiver.child else None]
    known = {psutil.Process().pid}
    for pid in roots:
        with contextlib.suppress(psutil.Error):
            if pid is not None:
                known |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return [
        f"{p.pid} {text[:120]}"
        for p in psutil.process_iter()
        if p.pid not in known and (text := _in(site, p))
    ]


def _in(site: Site, process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        text = " ".join([process.cwd(), *process.cmdline()])
    except psutil.Error:
        return ""
    return text if str(site.folder) in text else ""


def leftovers(site: Site, repository: Repository, state: Path) -> list[str]:
    """Files that a killed run left and the next one did not remove, and leases that the dead hold."""
    wrong = [f"left behind: clone {path.name}" for path in (state / "clones").glob("*.json")]
    wrong += [f"left behind: {path}" for path in _temporary(site)]
    stored: dict[str, set[str]] = {}
    for info in repository.storage.list("backups/"):
        _, id, name = info.name.split("/", 2)
        stored.setdefault(id, set()).add(name)
    wrong += [f"left behind: backups/{id}" for id, names in stored.items() if "backup.json" not in names]
    return wrong + _dead_holders(repository)


def _temporary(site: Site) -> list[Path]:
    # The programs, copied once to where the servers' account can run them.
    kept = (site.server.socket_directory, site.tmp / f"knockwood-programs-{os.getuid()}")
    found = [path for path in sorted(site.tmp.iterdir()) if path not in kept and not _of_python(path)]
    # The folder that walks of WAL work in stays; what is in it must not.
    shared = [path for path in found if path.name == f"knockwood-wal-{os.getuid()}"]
    return [path for path in found if path not in shared] + [
        path for folder in shared for path in folder.iterdir()
    ]


def _of_python(path: Path) -> bool:
    """What a kill leaves of Python's own tempfile: a trial of the folder, a file about to lose its name."""
    return bool(_PYTHONS.fullmatch(path.name)) and path.is_file() and path.read_bytes() in (b"", b"blat")


def _dead_holders(repository: Repository) -> list[str]:
    newest: dict[str, str] = {}
    for info in repository.storage.list("leases/"):
        folder = info.name.rpartition("/")[0]
        newest[folder] = max(newest.get(folder, ""), info.name)
    wrong = []
    for name in newest.values():
        value = json.loads(b"".join(repository.storage.read(name)))["holder"]
        if value is not None and Holder.from_json(value).known_dead():
            wrong.append(f"left behind: {name} is held by a dead process")
    return wrong


# --- restores -------------------------------------------------------------------------------------


def cannot_start(site: Site, folder: Path) -> list[str]:
    """A half-done restore is not taken for a cluster by any server."""
    server = LocalServer(site.server.programs, folder, account=site.server.account)
    try:
        server.start(timeout=20)
    except PostgresError:
        return []
    finally:
        server.stop("immediate")
    return [f"a server started on the unfinished restore in {folder}"]


def full_restore(site: Site, backup: str | None = None) -> tuple[Restored | None, list[str]]:
    """Restore to latest while the server lives: nothing promised before may be missing."""
    promised = len(site.witness.promises())
    into = site.new_folder()
    chosen = ["--backup", backup] if backup else []
    said = site.run(["restore", "--to", "latest", "--into", str(into), *chosen])
    if not said.ok:
        return None, [f"restore {' '.join(chosen)} ended with {said.status}: {problem(said)}"]
    lacking = site.lacking(into, promised)
    shutil.rmtree(into)
    done = Restored(False, promised, lacking.lost, 0.0)
    return done, [f"{lacking.lost} promised commits are missing from a full restore"] if lacking.lost else []


def machine_lost(site: Site) -> tuple[Restored | None, list[str]]:
    """The machine with the server and the spool is gone, the repository is all there is."""
    wait_steady(site)
    promises = site.witness.promises()
    moment = clock.monotonic()
    site.receiver.kill()
    into = site.new_folder()
    try:
        said = site.run(["restore", "--to", "latest", "--into", str(into)], site.lost_config())
        if not said.ok:
            return None, [f"restore after a lost machine ended with {said.status}: {problem(said)}"]
        lacking = site.lacking(into, len(promises))
    finally:
        site.receiver.start()
        shutil.rmtree(into, ignore_errors=True)
    oldest = max((moment - promise.at for promise in lacking.missing), default=0.0)
    done = Restored(True, len(promises), lacking.lost, oldest)
    if oldest > RPO:
        return done, [f"lost with the machine: a commit promised {oldest:.2f} s before (stated: {RPO} s)"]
    return done, []


def wait_steady(site: Site) -> None:
    """Until the receiver has streamed and stored for a while: the RPO is stated for one that works."""
    site.receiver.ensure()
    site.wait_current()
    time.sleep(max(0.0, site.receiver.since + 4.0 - time.monotonic()))
    site.wait_current()
    # Anywhere between two partials.
    time.sleep(time.monotonic() % 1.0)


def problem(said: Said) -> str:
    """Why a command failed, as it says itself."""
    try:
        error = json.loads(said.out)["error"]
        return f"{error['code']}: {error['what']} ({error['where']})"
    except (ValueError, KeyError, TypeError):
        return " / ".join((said.out + said.err).strip().splitlines()[-4:])[:600]
