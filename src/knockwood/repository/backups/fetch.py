"""Restoring a chain of backups into a new data directory that cannot start before it is complete."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from knockwood.errors import (
    DirectoryNotEmptyError,
    ObjectDamagedError,
    ProgramsMissingError,
    RefusedError,
    TargetUnreachableError,
)
from knockwood.host import clock, files, memory, privileges, processes
from knockwood.host.privileges import Account
from knockwood.postgres.binaries import Programs, runnable_by
from knockwood.repository.backups import visibility
from knockwood.repository.backups.extract import (
    CONTROL_FILE,
    INCOMPLETE,
    Extractor,
    Layout,
    create,
    extract_pack,
)
from knockwood.repository.backups.listing import read_object, read_packs
from knockwood.repository.backups.model import Backup, Progress
from knockwood.repository.backups.partial import Part
from knockwood.repository.repository import Repository

MARK = "knockwood-restore.incomplete"
"""Lies in a data directory while a restore writes it."""

_STAGING = "{}.knockwood-staging"

OnProgress = Callable[[Progress], None]


def fetch_chain(
    repository: Repository,
    chain: Sequence[Backup],
    into: Path,
    *,
    account: Account | None,
    programs: Programs,
    tablespace_root: Path | None = None,
    tablespaces: Mapping[int, Path] | None = None,
    workers: int = 2,
    progress: OnProgress | None = None,
    sync: bool = True,
    flushing: bool = False,
    part: Part | None = None,
) -> None:
    """Restore the files of the last backup of `chain` (the full one first) into the new folder `into`.

    Tablespaces go to `tablespaces[oid]`, else to `tablespace_root/<oid>`, never to where they lay on
    the server. The control file comes last: until then nothing can start on `into`. With `sync` all is
    on stable storage on return, with `flushing` on its way there. What is there afterwards still needs
    its WAL (`backup_label` is kept).

    Raises DirectoryNotEmptyError, NoSpaceError, RefusedError, ObjectMissingError, ObjectDamagedError,
    WrongKeyError, ProgramsMissingError. After an error `into` holds what there was, and cannot start.
    With `part` only some files are fetched: what comes of that is no cluster to be used as one.
    """
    _check_chain(chain)
    last = chain[-1]
    layout = Layout(into, _places(last, into, tablespace_root, tablespaces or {}))
    for folder in (into, *layout.tablespaces.values()):
        _require_empty(folder)
    staging = into.with_name(_STAGING.format(f".{into.name}"))
    files.remove_tree(staging)
    combine = _combiner(programs, last, account) if len(chain) > 1 else None
    if part is None:
        _require_space(chain, into, layout)
    total = sum(backup.raw_bytes for backup in chain) if part is None else part.raw_bytes
    job = _Job(repository, account, workers, _Meter(progress, total), part, flushing)
    memory.keep_large_buffers()
    with files.translated(into):
        for folder in (into, *layout.tablespaces.values()):
            _make(folder, account)
        os.close(create(into / MARK, account))
        if combine is None:
            _extract(job, last, layout, hold=True)
        else:
            _combine(job, chain, layout, staging, combine)
        _finish(last, layout, account, workers, sync)


def _check_chain(chain: Sequence[Backup]) -> None:
    if not chain or chain[0].kind != "full":
        raise TargetUnreachableError("a restore begins with a full backup")
    for parent, child in itertools.pairwise(chain):
        if child.parent != parent.id or child.system_identifier != parent.system_identifier:
            raise TargetUnreachableError(f"backup {child.id} does not build on {parent.id}")


def _places(backup: Backup, into: Path, root: Path | None, mapping: Mapping[int, Path]) -> dict[int, Path]:
    places: dict[int, Path] = {}
    for space in backup.tablespaces:
        place = mapping.get(space.oid) or (root / str(space.oid) if root else None)
        if place is None:
            raise RefusedError(
                f"the backup has a tablespace ({space.oid}) that lay at {space.location}",
                hint="name a folder for the tablespaces; a restore never writes where they lay",
            )
        place, live = place.resolve(), Path(space.location).resolve()
        if place == live or live in place.parents or place in live.parents:
            raise RefusedError(
                f"tablespace {space.oid} would be restored over {space.location}, where the server has it",
                where=str(place),
                hint="name another folder for the tablespaces",
            )
        if place == into.resolve() or into.resolve() in place.parents or place in into.resolve().parents:
            raise RefusedError("a tablespace cannot lie inside the data directory", where=str(place))
        if place in places.values():
            raise RefusedError("two tablespaces would be restored into one folder", where=str(place))
        places[space.oid] = place
    return places


def _require_empty(folder: Path) -> None:
    with files.translated(folder):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise DirectoryNotEmptyError("not a folder", where=str(folder))
        if not folder.exists() or not any(folder.iterdir()):
            return
        if (folder / MARK).exists():
            raise DirectoryNotEmptyError(
                "an earlier restore into this folder was interrupted",
                where=str(folder),
                hint="nothing in it is complete: remove it and run the restore again",
            )
    raise DirectoryNotEmptyError(
        "the folder holds something already",
        where=str(folder),
        hint="a restore never writes over files: name a new folder",
    )


def _make(folder: Path, account: Account | None) -> None:
    # Parents that we make must let the account through as well.
    missing = [step for step in folder.parents if not step.exists()]
    files.make_folder(folder)
    folder.chmod(0o700)
    for step in (folder, *missing):
        privileges.give(step, account)


def _require_space(chain: Sequence[Backup], into: Path, layout: Layout) -> None:
    # A chain is unpacked beside the result first; the result is about as large as the full backup.
    extra = sum(backup.raw_bytes for backup in chain) if len(chain) > 1 else 0
    result = max(backup.raw_bytes for backup in chain)
    files.require_space(into, extra + result, "the restore")


class _Meter:
    """Adds up what several threads wrote and tells it ten times a second."""

    def __init__(self, progress: OnProgress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._told = 0.0
        self._lock = threading.Lock()

    def add(self, count: int, path: str) -> None:
        with self._lock:
            self._done += count
            now = clock.monotonic()
            if self._progress is None or now - self._told < 0.1:
                return
            self._told = now
            done = self._done
        self._progress(Progress(done, self._total, path))


@dataclass(frozen=True, slots=True)
class _Job:
    repository: Repository
    account: Account | None
    workers: int
    meter: _Meter
    part: Part | None
    flushing: bool


def _extract(job: _Job, backup: Backup, layout: Layout, *, hold: bool) -> None:
    # The map of tablespaces names their old places: replay would link to them.
    extractor = Extractor(
        layout,
        account=job.account,
        hold_control_file=hold,
        on_bytes=job.meter.add,
        skip=lambda path: path == "tablespace_map" and bool(layout.tablespaces),
        flushing=job.flushing,
    )
    if job.part is not None:
        job.part.extract(backup, extractor, job.workers)
    else:
        _extract_packs(job, backup, extractor)
    _write_object(job.repository, backup, layout.root / "backup_manifest", job.account)
    _link_tablespaces(layout, job.account)


def _extract_packs(job: _Job, backup: Backup, extractor: Extractor) -> None:
    repository, workers = job.repository, job.workers
    index = read_packs(repository, backup)
    for pack in backup.packs:
        if pack.name not in index:
            raise ObjectDamagedError(f"the member index lacks {pack.name}", where=backup.members.name)
    # The largest first, so that none is left for a single thread at the end.
    packs = sorted(backup.packs, key=lambda pack: -pack.raw_bytes)
    with ThreadPoolExecutor(workers) as frames, ThreadPoolExecutor(workers) as writers:
        running = [
            writers.submit(extract_pack, repository, pack, index[pack.name], extractor, frames)
            for pack in packs
        ]
        done, waiting = wait(running, return_when=FIRST_EXCEPTION)
        for one in waiting:
            one.cancel()
        for one in done:
            one.result()


def _write_object(repository: Repository, backup: Backup, path: Path, account: Account | None) -> None:
    with open(create(path, account), "wb") as file:
        file.writelines(read_object(repository, backup.manifest))


def _link_tablespaces(layout: Layout, account: Account | None) -> None:
    for oid, place in layout.tablespaces.items():
        link = layout.root / "pg_tblspc" / str(oid)
        link.symlink_to(place)
        privileges.give(link, account)


# --- chains ---------------------------------------------------------------------------------------


def _combiner(programs: Programs, last: Backup, account: Account | None) -> Programs:
    if programs.major != last.major:
        raise ProgramsMissingError(
            f"the backup is of PostgreSQL {last.major}, the programs are of {programs.major}",
            where=str(programs.folder),
        )
    programs = runnable_by(programs, account)
    programs.path("pg_combinebackup")
    return programs


def _combine(job: _Job, chain: Sequence[Backup], layout: Layout, staging: Path, programs: Programs) -> None:
    account = job.account
    try:
        files.make_folder(staging)
        privileges.give(staging, account)
        inputs = []
        for number, backup in enumerate(chain):
            root = staging / str(number)
            spaces = {s.oid: staging / f"{number}-{s.oid}" for s in backup.tablespaces}
            for folder in (root, *spaces.values()):
                folder.mkdir(mode=0o700)
                privileges.give(folder, account)
            _extract(job, backup, Layout(root, spaces), hold=False)
            inputs.append(visibility.Tree(root, spaces))
        result = staging / "result"
        command: list[str | Path] = [programs.path("pg_combinebackup"), "--no-sync", "-o", result]
        if programs.major >= 18:
            command.append("--link")  # the inputs are ours and go away
        number = len(chain) - 1
        for oid, place in layout.tablespaces.items():
            command += ["-T", f"{staging / f'{number}-{oid}'}={place}"]
        command += [tree.root for tree in inputs]
        processes.run(command, account=account, env={"LC_ALL": "C", "PATH": os.environ["PATH"]})
        visibility.empty_doubtful(inputs[1:], visibility.Tree(result, layout.tablespaces))
        (result / CONTROL_FILE).rename(result / (CONTROL_FILE + INCOMPLETE))
        for entry in list(result.iterdir()):
            entry.rename(layout.root / entry.name)
    finally:
        files.remove_tree(staging)


# --- the end --------------------------------------------------------------------------------------


def _finish(last: Backup, layout: Layout, account: Account | None, workers: int, sync: bool) -> None:
    root = layout.root
    if not (root / "backup_label").is_file():
        raise RefusedError(
            "the backup holds no backup_label",
            where=last.id,
            hint="without it PostgreSQL would begin replay at the wrong place and call the result whole: "
            "use another backup",
        )
    control = root / (CONTROL_FILE + INCOMPLETE)
    if not control.is_file():
        raise RefusedError("the backup holds no control file", where=last.id, hint="use another backup")
    if sync:
        files.sync_trees((layout.root, *layout.tablespaces.values()))
    (root / MARK).unlink()
    control.rename(root / CONTROL_FILE)
    if sync:
        files.fsync_file(control.parent)
        files.fsync_file(root)
        files.fsync_file(root.parent)
