"""Barman in the gap test."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from gap_tools import NotApplicableError, Source, only, rewrite_gzip
from knockwood.host import privileges
from knockwood.host.privileges import Account
from sandbox import OUT, Said, apt_install, ask, interpreter, must, public_path, say, wait_until, write_as

SERVER = "main"


def find(account: Account | None) -> tuple[Path, str]:
    """Barman's program and nothing, or why it cannot be used; made from PyPI in an environment of its own."""
    folder = public_path(account, OUT) / "barman-venv"
    program = folder / "bin" / "barman"
    if not _works(program, account):
        reason = _install(folder, interpreter(account))
        if not _works(program, account):
            return program, reason or "barman was installed, but does not run"
    return program, _rsync_missing()


def _works(program: Path, account: Account | None) -> bool:
    return program.exists() and ask([program, "--version"], account=account).ok


def _install(folder: Path, python: str) -> str:
    say(f"installing barman into {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    made = ask([python, "-m", "venv", folder])
    pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip"]
    if not made.ok:  # Debian without python3-venv: fill the environment from outside
        made = ask([python, "-m", "venv", "--without-pip", folder])
        pip = [python, "-m", "pip", "--python", folder / "bin" / "python"]
    if not made.ok:
        return f"cannot make an environment for barman: {' / '.join(made.lines()[-2:])}"
    # psycopg2 itself needs a compiler; its wheel with libpq inside has another name.
    wanted = ["barman", "psycopg2-binary", "python-dateutil", "six"]
    said = ask([*pip, "install", "--quiet", "--no-deps", *wanted], env=_pip_settings(), timeout=600)
    return f"installing barman from PyPI ended with status {said.status}: {' / '.join(said.lines()[-2:])}"


def _rsync_missing() -> str:
    if shutil.which("rsync"):
        return ""
    if privileges.is_root() and shutil.which("apt-get"):
        say("installing rsync, without which barman cannot restore")
        ask(["apt-get", "update", "-qq"])
        ask(apt_install("rsync"), timeout=600)
    return "" if shutil.which("rsync") else "barman restores with rsync, which is not installed and cannot be"


def _pip_settings() -> dict[str, str]:
    """The caller's way to PyPI (mirror, certificates, proxy), but not where pip would install to."""
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))
    }
    for name in ("PIP_USER", "PIP_TARGET", "PIP_PREFIX"):
        kept.pop(name, None)
    return kept | {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}


@dataclass(frozen=True, slots=True)
class Barman:
    """One server over `folder`/home: base backups by pg_basebackup, WAL by archive_command, gzip."""

    source: Source
    folder: Path
    program: Path
    name: str = "Barman"

    def version(self) -> str:
        return ask([self.program, "--version"], account=self.source.account).out.split()[0]

    @property
    def _home(self) -> Path:
        return self.folder / "home" / SERVER

    def repository(self) -> Path:
        return self.folder

    def at(self, repository: Path) -> Barman:
        moved = replace(self, folder=repository)
        moved.configure()
        return moved

    def configure(self) -> None:
        """Write the settings for this folder: nothing of Barman's lies outside it."""
        for name in ("home", "locks", "conf"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        account = self.source.account
        user = f"barman_user = {account.name}\n" if account else ""
        conninfo = self.source.server.dsn().replace("'", "")
        text = f"""[barman]
{user}barman_home = {self.folder}/home
barman_lock_directory = {self.folder}/locks
configuration_files_directory = {self.folder}/conf
log_file = {self.folder}/barman.log
log_level = INFO
[{SERVER}]
description = gap test
conninfo = {conninfo}
streaming_conninfo = {conninfo}
backup_method = postgres
archiver = on
compression = gzip
path_prefix = {self.source.programs.folder}
"""
        write_as(self.folder / "barman.conf", text, account)
        privileges.give_tree(self.folder, account)

    def run(self, *words: str | Path, timeout: float = 900) -> Said:
        command: list[str | Path] = [self.program, "-c", self.folder / "barman.conf", *words]
        home = {"HOME": str(self.folder)}
        return ask(command, account=self.source.account, env=home, timeout=timeout)

    def archive_words(self) -> str:
        incoming = self._home / "incoming"
        return f"cp %p {incoming}/.%f && mv {incoming}/.%f {incoming}/%f"

    def prepare(self) -> None:
        self.configure()
        self.run("check", SERVER)  # makes the folders; fails as long as there is no WAL and no backup
        (self._home / "incoming").mkdir(parents=True, exist_ok=True)
        privileges.give_tree(self.folder, self.source.account)

    def backup(self) -> None:
        self.source.ask("SELECT pg_switch_wal()")
        # It refuses to begin before it has catalogued a segment.
        wait_until(self._has_wal, "Barman's first segment")
        must(self.run("backup", SERVER))
        self.run("archive-wal", SERVER)

    def _has_wal(self) -> bool:
        self.run("archive-wal", SERVER)
        return any(self._home.glob("wals/*/*"))

    def settle(self, last: int) -> None:
        self.run("archive-wal", SERVER)
        self.segment(last)

    def close(self) -> None:
        """Nothing runs between commands."""

    def segment(self, number: int) -> Path:
        name = self.source.segment_name(number)
        path = self._home / "wals" / name[:16] / name
        return only([path] if path.exists() else [], f"stored segment {name}")

    def _backup_folder(self) -> Path:
        folders = [path.parent for path in (self._home / "base").glob("*/data")]
        return only(folders, "backup")

    def consistency_segment(self) -> int:
        folder = self._backup_folder()
        places = [folder / "backup.info", self._home / "meta" / f"{folder.name}-backup.info"]
        info = only([path for path in places if path.exists()], "backup.info").read_text()
        end = re.search(r"^end_wal=(\w{24})$", info, flags=re.MULTILINE)
        if end is None:
            raise RuntimeError("backup.info names no end_wal")
        per_log = (1 << 32) // self.source.segment_bytes
        return int(end[1][8:16], 16) * per_log + int(end[1][16:], 16)

    def forget(self, number: int) -> str:
        catalogue = only(list(self._home.glob("wals/*xlog.db")), "xlog.db")
        name = self.source.segment_name(number)
        lines = catalogue.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(name)]
        if len(kept) != len(lines) - 1:
            raise NotApplicableError(f"its xlog.db has no line of its own for {name}")
        write_as(catalogue, "".join(kept), self.source.account)
        return "its line in xlog.db removed too"

    def rewrite(self, number: int, change: Callable[[bytes], bytes]) -> str:
        rewrite_gzip(self.segment(number), change)
        must(self.run("rebuild-xlogdb", SERVER))
        return "recompressed with gzip, xlog.db rebuilt by its own rebuild-xlogdb"

    def backup_file(self) -> Path:
        [(relation,)] = self.source.ask("SELECT pg_relation_filepath('ledger')")
        return self._backup_folder() / "data" / str(relation)

    def remove_label(self) -> str:
        data = self._backup_folder() / "data"
        (data / "backup_label").unlink()
        path = data / "backup_manifest"
        write_as(path, without_member(path.read_text(), "backup_label"), self.source.account)
        return "file and its line in backup_manifest removed, the manifest's checksum redone"

    def verify(self) -> list[Said]:
        words = (("check-backup", SERVER, "latest"), ("verify-backup", SERVER, "latest"), ("check", SERVER))
        return [self.run(*command) for command in words]

    def verify_all(self) -> list[Said]:
        return []

    def restore(self, into: Path) -> Said:
        return self.run("restore", SERVER, "latest", into)


def without_member(manifest: str, member: str) -> str:
    """PostgreSQL's backup_manifest without one file, its checksum redone; RuntimeError if not in it."""
    paths = [entry["Path"] for entry in json.loads(manifest)["Files"] if "Path" in entry]
    if member not in paths:
        raise RuntimeError(f"the manifest has no {member}")
    kept = [line for line in manifest.splitlines() if f'"Path": "{member}"' not in line]
    for place in range(len(kept) - 1):  # the last entry has no comma behind it
        if kept[place].endswith(",") and kept[place + 1].startswith("]"):
            kept[place] = kept[place][:-1]
    body = "\n".join(kept[:-1]) + "\n"
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{body}"Manifest-Checksum": "{digest}"}}\n'
