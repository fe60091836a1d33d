"""A second clone from a first one, without fetching the backup again: replay goes forward only.

Both stand at the same position; the copy's server is down until it is told how far to replay. Where
the file system shares bytes between files the copy costs nearly nothing, else one reading and writing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from knockwood.clone.registry import Registry, sign
from knockwood.clone.spawn import Clone, make
from knockwood.clone.workspace import Workspace
from knockwood.errors import RefusedError
from knockwood.host import files, privileges, reflink
from knockwood.host.reflink import CopyCost

_MARGIN = 128 * 1024 * 1024


def settle(clone: Clone) -> None:
    """Stop a paused clone so that it can be copied, and replays on from where it stands."""
    if clone.promoted:
        raise RefusedError("a promoted clone cannot replay on", hint="make a new clone instead")
    if clone.server.running:
        clone.recovery.settle()


def copy_of(
    clone: Clone,
    purpose: str,
    *,
    registry: Registry | None = None,
    into: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Clone, CopyCost]:
    """Copy a clone that stands paused or settled; both are settled afterwards. `advance` starts the copy.

    Raises NoSpaceError before anything is written, RefusedError for a promoted clone.
    """
    settle(clone)
    entry = (registry or Registry()).enter(purpose, into)
    try:
        workspace = Workspace(entry.record.root, clone.workspace.account)
        require_room_for_copy(clone, workspace.root)
        workspace.create(lambda: sign(entry.record))
        cost = copy_into(clone.workspace, workspace, progress)
        copy = make(
            clone.repository,
            clone.plan,
            workspace,
            clone.programs,
            entry.record.socket_directory,
            clone.unreadable,
        )
    except BaseException:
        entry.remove()
        raise
    copy.entry = entry
    copy.recovery.settings = _moved(clone, workspace)
    copy.recovery.user = clone.recovery.user
    copy.spool.sources = dict(clone.spool.sources)
    copy.reached_lsn = clone.reached_lsn
    return copy, cost


def require_room_for_copy(clone: Clone, root: Path) -> None:
    """Raise NoSpaceError unless a whole copy fits, or the file system shares bytes and needs no room."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    same = folder.stat().st_dev == clone.workspace.root.stat().st_dev
    wanted = (
        0 if same and reflink.can_share(clone.workspace.root) else reflink.tree_bytes(clone.data_directory)
    )
    files.require_space(root, wanted + _MARGIN, "a copy of the clone")


def copy_into(old: Workspace, new: Workspace, progress: Callable[[int], None] | None = None) -> CopyCost:
    """Copy data, tablespaces, spool and configuration of a settled clone into a workspace just created."""
    new.data.rmdir()
    cost = reflink.copy_tree(old.data, new.data, links={old.root: new.root}, progress=progress)
    if old.tablespaces.is_dir():
        beside = reflink.copy_tree(old.tablespaces, new.tablespaces, links={old.root: new.root})
        cost = CopyCost(
            cost.files + beside.files,
            cost.copied + beside.copied,
            cost.shared + beside.shared,
            cost.seconds + beside.seconds,
        )
    with files.translated(new.root):
        for path in sorted(old.spool.iterdir()):
            # Nobody changes a WAL file in place: a renewed one is a new file. What is offered to a fed server goes.
            if path.is_file():
                reflink.link_or_copy(path, new.spool / path.name)
        for name in ("hba.conf", "ident.conf"):
            if (old.root / name).exists():
                new.write(new.root / name, (old.root / name).read_text())
        if old.kept_auto_config.exists():
            reflink.link_or_copy(old.kept_auto_config, new.kept_auto_config)
        (new.data / "postmaster.pid").unlink(missing_ok=True)
        privileges.give(new.spool, new.account)
    return cost


def _moved(clone: Clone, workspace: Workspace) -> dict[str, str]:
    """The clone's settings with the paths of the copy."""
    paths = {"hba_file": "hba.conf", "ident_file": "ident.conf"}
    return {
        name: str(workspace.root / paths[name]) if name in paths else value
        for name, value in clone.recovery.settings.items()
    }
