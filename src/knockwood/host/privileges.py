"""Which account runs PostgreSQL: the server refuses root, so root hands it to an account that exists."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from knockwood.errors import HostError

_CANDIDATES = ("postgres", "nobody")


@dataclass(frozen=True, slots=True)
class Account:
    name: str
    uid: int
    gid: int


def is_root() -> bool:
    return os.geteuid() == 0


def server_account(data_directory: Path | None = None) -> Account | None:
    """The account local servers run as, or None: our own.

    Root uses the owner of an existing data directory, else `postgres`, else `nobody`.
    """
    if not is_root():
        return None
    if data_directory is not None and data_directory.exists():
        owner = data_directory.stat()
        if owner.st_uid != 0:
            return Account(_name_of(owner.st_uid), owner.st_uid, owner.st_gid)
    for name in _CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise HostError(
        "root cannot run PostgreSQL and there is no account to run it as",
        hint="run knockwood as an ordinary user, or add an account named postgres",
    )


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def give(path: Path, account: Account | None) -> None:
    """Make `account` the owner of one path; does nothing when the account is our own."""
    if account is not None:
        os.chown(path, account.uid, account.gid, follow_symlinks=False)


def give_tree(root: Path, account: Account | None) -> None:
    """Make `account` the owner of a folder and all in it."""
    if account is None:
        return
    give(root, account)
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            give(Path(folder) / name, account)


def reachable_by(path: Path, account: Account | None) -> bool:
    """Whether `account` can walk down to `path` (each parent folder lets it through)."""
    if account is None:
        return True
    for parent in path.resolve().parents:
        info = parent.stat()
        bit = 0o100 if info.st_uid == account.uid else 0o010 if info.st_gid == account.gid else 0o001
        if not info.st_mode & bit:
            return False
    return True
