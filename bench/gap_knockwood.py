"""Knockwood in the gap test, by its command line."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import knockwood
from gap_barman import without_member
from gap_tools import NotApplicableError, Source, only
from knockwood.host import processes
from knockwood.model import Lsn
from knockwood.repository.backups.model import own_sha256
from sandbox import Said, ask, knockwood_command, must, wait_until
from zstd_files import compress, decompress

TAR_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Knockwood:
    """One cluster's settings, repository and state under `folder`; WAL by `wal receive`."""

    source: Source
    folder: Path
    receiver: list[subprocess.Popen[bytes]] = field(default_factory=list)
    name: str = "Knockwood"

    def version(self) -> str:
        said = must(ask([*knockwood_command(), "--version"], env=self.environment()))
        return said.out.split()[-1]

    @property
    def settings(self) -> Path:
        return self.folder / "knockwood.toml"

    @property
    def _store(self) -> Path:
        return self.folder / "repository"

    def repository(self) -> Path:
        return self.folder

    def at(self, repository: Path) -> Knockwood:
        # The server is taken for lost: a restore has the damaged repository and nothing else.
        text = self.settings.read_text().replace(str(self.folder), str(repository))
        text = text.replace(str(self.source.server.socket_directory), str(repository / "no-server"))
        moved = replace(self, folder=repository, receiver=[])
        moved.settings.write_text(text)
        return moved

    def environment(self) -> dict[str, str]:
        # Nothing of another run's, and nothing left behind: what it keeps on the machine lies here too.
        source = Path(knockwood.__file__).resolve().parents[1]
        return {"KNOCKWOOD_STATE": str(self.folder / "state"), "PYTHONPATH": str(source)}

    def run(self, *words: str | Path, timeout: float = 900) -> Said:
        return ask(self.command(*words), env=self.environment(), timeout=timeout)

    def command(self, *words: str | Path) -> list[str]:
        """What to start for a command of Knockwood's."""
        return [*knockwood_command(), "--config", str(self.settings), *(str(word) for word in words)]

    def archive_words(self) -> None:
        return None

    def prepare(self) -> None:
        self.folder.mkdir()
        dsn = self.source.server.dsn()
        words = ("--name", "gap", "--dsn", dsn, "--repository", self._store, "--role", "postgres")
        files = ("--data-directory", self.source.server.data_directory)
        must(self.run("init", *words, *files))
        self.receive()

    def receive(self) -> None:
        """Start `wal receive` in the background; returns once it streams."""
        with (self.folder / "receive.log").open("ab") as log:
            env = dict(os.environ) | self.environment()
            self.receiver.append(
                processes.start(self.command("wal", "receive"), env=env, stdout=log, stderr=log)
            )

        def streams() -> bool:
            self._require_receiver()
            return bool(self.source.ask("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"))

        wait_until(streams, "wal receive to stream")

    def _require_receiver(self) -> None:
        if self.receiver and self.receiver[0].poll() is not None:
            log = (self.folder / "receive.log").read_text(errors="replace")
            raise RuntimeError(f"wal receive ended: {log[-2000:]}")

    def backup(self) -> None:
        must(self.run("backup"))

    def settle(self, last: int) -> None:
        def stored() -> bool:
            self._require_receiver()
            return any(self._segments(last))

        wait_until(stored, f"wal receive to store {self.source.segment_name(last)}")
        self.close()

    def close(self) -> None:
        """End the receiver."""
        while self.receiver:
            processes.stop(self.receiver.pop(), grace=20)

    def _segments(self, number: int) -> list[Path]:
        name = self.source.segment_name(number)
        return list((self._store / "wal").glob(f"{name[:8]}/{name[:16]}/{name}.zst"))

    def segment(self, number: int) -> Path:
        return only(self._segments(number), f"stored segment {self.source.segment_name(number)}")

    def _backup(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._backup_file().read_text())
        return value

    def _backup_file(self) -> Path:
        return only(list(self._store.glob("backups/*/backup.json")), "backup.json")

    def consistency_segment(self) -> int:
        # The stop LSN is the end of the last record needed: the byte before it lies in the segment needed.
        return (Lsn.parse(self._backup()["stop_lsn"]).value - 1) // self.source.segment_bytes

    def forget(self, number: int) -> str:
        raise NotApplicableError("it keeps no list of segments: the stored objects are all there is")

    def rewrite(self, number: int, change: Callable[[bytes], bytes]) -> str:
        path = self.segment(number)
        path.write_bytes(compress(change(decompress(path.read_bytes()))))
        return "recompressed with zstd; its name carries no checksum"

    def backup_file(self) -> Path:
        [(relation,)] = self.source.ask("SELECT pg_relation_filepath('ledger')")
        index = Index.load(self)
        line = index.line(str(relation))
        return self._store / str(index.pack(line["pack"])["name"])

    def remove_label(self) -> str:
        remove_member(self, "backup_label")
        return "cut out of its pack and of backup_manifest; index, sizes and SHA-256 in backup.json redone"

    def verify(self) -> list[Said]:
        return [self.run("verify", "--json")]

    def verify_all(self) -> list[Said]:
        return [self.run("verify", "--full", "--json")]

    def restore(self, into: Path) -> Said:
        return self.run("restore", "--to", "latest", "--into", into, "--json")

    def restore_with_loss(self, into: Path) -> Said:
        return self.run("restore", "--to", "latest", "--accept-loss", "--into", into, "--json")

    def read(self, name: str) -> bytes:
        return (self._store / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self._store / name).write_bytes(data)

    def write_backup(self, value: dict[str, Any]) -> None:
        self._backup_file().write_text(json.dumps({**value, "sha256": own_sha256(value)}))

    def backup_value(self) -> dict[str, Any]:
        return self._backup()


@dataclass
class Index:
    """The list of a backup's members: one line per member, then one per pack."""

    lines: list[dict[str, Any]]

    @classmethod
    def load(cls, tool: Knockwood) -> Index:
        text = decompress(tool.read(tool.backup_value()["members"]["name"])).decode()
        return cls([json.loads(line) for line in text.splitlines()])

    def line(self, path: str) -> dict[str, Any]:
        [found] = [line for line in self.lines if line.get("path") == path]
        return found

    def pack(self, number: int) -> dict[str, Any]:
        [found] = [line for line in self.lines if "frames" in line and line["pack"] == number]
        return found


def remove_member(tool: Knockwood, path: str) -> None:
    """Cut a file out of a backup; all that names or counts it is redone, so that only its absence tells."""
    backup = tool.backup_value()
    index = Index.load(tool)
    line = index.line(path)
    pack = index.pack(line["pack"])
    raw = decompress(tool.read(pack["name"]))
    start = line["offset"] - TAR_BLOCK
    length = TAR_BLOCK + line["size"] + -line["size"] % TAR_BLOCK
    bounds = [frame[1] for frame in pack["frames"]] + [len(raw)]
    moved = [bound if bound <= start else max(start, bound - length) for bound in bounds]
    raw = raw[:start] + raw[start + length :]
    frames: list[list[int]] = []
    stored = b""
    for begin, end in itertools.pairwise(moved):
        if end > begin:
            frames.append([len(stored), begin])
            stored += compress(raw[begin:end])
    tool.write(pack["name"], stored)
    pack["frames"], pack["members"] = frames, pack["members"] - 1
    index.lines.remove(line)
    for other in index.lines:
        if other.get("path") and other["pack"] == line["pack"] and other["offset"] > start:
            other["offset"] -= length
    objects = {entry["name"]: entry for entry in [*backup["packs"], backup["members"], backup["manifest"]]}
    _count(objects[pack["name"]], stored, len(raw))
    text = "".join(json.dumps(entry) + "\n" for entry in index.lines).encode()
    _replace(tool, backup["members"], text)
    manifest = decompress(tool.read(backup["manifest"]["name"])).decode()
    _replace(tool, backup["manifest"], without_member(manifest, path).encode())
    backup["raw_bytes"] -= length
    everything = [*objects.values(), backup["relations"]]
    backup["stored_bytes"] = sum(entry["bytes"] for entry in everything)
    tool.write_backup(backup)


def _replace(tool: Knockwood, entry: dict[str, Any], content: bytes) -> None:
    stored = compress(content)
    tool.write(entry["name"], stored)
    _count(entry, stored, len(content))


def _count(entry: dict[str, Any], stored: bytes, raw_bytes: int) -> None:
    entry |= {"bytes": len(stored), "raw_bytes": raw_bytes, "sha256": hashlib.sha256(stored).hexdigest()}
