"""pgBackRest in the gap test."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from gap_tools import NotApplicableError, Source, only
from knockwood.host import privileges
from sandbox import Said, apt_install, ask, must, say, write_as
from zstd_files import compress, decompress

STANZA = "main"


def find() -> str:
    """Why pgBackRest cannot be used, or nothing; installs Debian's when root and missing."""
    if shutil.which("pgbackrest"):
        return ""
    if not privileges.is_root() or not shutil.which("apt-get"):
        return "pgbackrest is not installed, and only root can install it with apt-get"
    say("installing pgbackrest")
    ask(["apt-get", "update", "-qq"])
    said = ask(apt_install("pgbackrest"), timeout=900)
    if shutil.which("pgbackrest"):
        return ""
    return f"apt-get install pgbackrest ended with status {said.status}: {' / '.join(said.lines()[-2:])}"


@dataclass(frozen=True, slots=True)
class PgBackRest:
    """One stanza over `folder`/repo, with zstd at its default level and one process unless told otherwise."""

    source: Source
    folder: Path
    processes: int = 1
    level: int = 3
    name: str = "pgBackRest"

    def version(self) -> str:
        return ask(["pgbackrest", "version"]).out.split()[-1]

    @property
    def _settings(self) -> Path:
        return self.folder / "pgbackrest.conf"

    def repository(self) -> Path:
        return self.folder

    def at(self, repository: Path) -> PgBackRest:
        moved = replace(self, folder=repository)
        moved.configure()
        return moved

    def configure(self) -> None:
        """Write the settings for this folder: nothing of pgBackRest's lies outside it."""
        server = self.source.server
        for name in ("repo", "log", "lock", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        text = f"""[global]
repo1-path={self.folder}/repo
log-path={self.folder}/log
lock-path={self.folder}/lock
spool-path={self.folder}/spool
compress-type=zst
compress-level={self.level}
process-max={self.processes}
start-fast=y
log-level-console=warn
log-level-stderr=off
log-timestamp=n
[{STANZA}]
pg1-path={server.data_directory}
pg1-socket-path={server.socket_directory}
pg1-port={server.port}
pg1-user=postgres
"""
        write_as(self._settings, text, self.source.account)
        privileges.give_tree(self.folder, self.source.account)

    def run(self, *words: str, timeout: float = 900) -> Said:
        return ask(self.command(*words), account=self.source.account, timeout=timeout)

    def command(self, *words: str) -> list[str]:
        """What to start for a command of pgBackRest's, as the servers' account."""
        return ["pgbackrest", f"--config={self._settings}", f"--stanza={STANZA}", *words]

    def archive_words(self) -> str:
        return f"pgbackrest --config={self._settings} --stanza={STANZA} archive-push %p"

    def prepare(self) -> None:
        self.configure()
        must(self.run("stanza-create"))

    def backup(self) -> None:
        must(self.run("--type=full", "backup"))

    def settle(self, last: int) -> None:
        self.segment(last)

    def close(self) -> None:
        """Nothing runs between commands."""

    def segment(self, number: int) -> Path:
        name = self.source.segment_name(number)
        found = (self.folder / "repo" / "archive" / STANZA).glob(f"*/{name[:16]}/{name}-*")
        return only(list(found), f"stored segment {name}")

    def _label(self) -> str:
        folders = (self.folder / "repo" / "backup" / STANZA).glob("[0-9]*F")
        return only(list(folders), "backup").name

    def _backup_folder(self) -> Path:
        return self.folder / "repo" / "backup" / STANZA / self._label()

    def consistency_segment(self) -> int:
        manifest = (self._backup_folder() / "backup.manifest").read_text()
        stop = re.search(r'^backup-archive-stop="(\w{24})"$', manifest, flags=re.MULTILINE)
        if stop is None:
            raise RuntimeError("the manifest names no backup-archive-stop")
        per_log = (1 << 32) // self.source.segment_bytes
        return int(stop[1][8:16], 16) * per_log + int(stop[1][16:], 16)

    def forget(self, number: int) -> str:
        raise NotApplicableError("it keeps no list of segments: the stored files are all there is")

    def rewrite(self, number: int, change: Callable[[bytes], bytes]) -> str:
        path = self.segment(number)
        content = change(decompress(path.read_bytes()))
        name = f"{path.name[:24]}-{hashlib.sha1(content, usedforsecurity=False).hexdigest()}.zst"
        path.unlink()
        write_as(path.with_name(name), compress(content), self.source.account)
        return "recompressed with zstd, SHA-1 in its name redone"

    def backup_file(self) -> Path:
        [(relation,)] = self.source.ask("SELECT pg_relation_filepath('ledger')")
        return self._backup_folder() / "pg_data" / f"{relation}.zst"

    def remove_label(self) -> str:
        folder = self._backup_folder()
        (folder / "pg_data" / "backup_label.zst").unlink()
        for name in ("backup.manifest", "backup.manifest.copy"):
            text = (folder / name).read_text()
            if stamp(text) != stamped(text):
                raise RuntimeError("the checksum of pgBackRest's manifest is made in another way than known")
            kept = [line for line in text.splitlines() if not line.startswith("pg_data/backup_label=")]
            text = "\n".join(kept) + "\n"
            write_as(folder / name, text.replace(stamped(text), stamp(text)), self.source.account)
        return "stored file and its line in both manifests removed, their checksum redone"

    def verify(self) -> list[Said]:
        return [self.run("--output=text", "--verbose", "verify")]

    def verify_all(self) -> list[Said]:
        return []

    def restore(self, into: Path) -> Said:
        into.mkdir(mode=0o700)
        privileges.give(into, self.source.account)
        return self.run(f"--pg1-path={into}", "restore")


def stamped(text: str) -> str:
    """The checksum that an info file of pgBackRest's carries."""
    found = re.search(r'^backrest-checksum="(\w{40})"$', text, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError("no backrest-checksum in pgBackRest's file")
    return found[1]


def stamp(text: str) -> str:
    """The checksum that an info file should carry: SHA-1 of its sections and keys as one JSON object."""
    sections: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if re.fullmatch(r"\[[^=]+\]", line):
            sections.append((line[1:-1], []))
        elif line and not line.startswith("backrest-checksum="):
            key, _, value = _split(line)
            sections[-1][1].append(f"{json.dumps(key)}:{value}")
    body = ",".join(f'"{name}":{{{",".join(pairs)}}}' for name, pairs in sections if pairs)
    return hashlib.sha1(f"{{{body}}}".encode(), usedforsecurity=False).hexdigest()


def _split(line: str) -> tuple[str, str, str]:
    # The value is JSON; a key may hold '=' itself, so the first '=' before valid JSON counts.
    place = line.find("=")
    while place >= 0:
        try:
            json.loads(line[place + 1 :])
            return line[:place], "=", line[place + 1 :]
        except ValueError:
            place = line.find("=", place + 1)
    raise RuntimeError(f"not a line of an info file of pgBackRest's: {line}")
