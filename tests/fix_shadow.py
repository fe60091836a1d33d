"""`shadow run` as a process of its own, and borrowers of the shadow it keeps."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fix_clones import Protected
from knockwood.clone.shadow_state import ShadowRecord, read_record
from knockwood.operations import shadow
from knockwood.operations.cluster import Cluster
from knockwood.settings import parse

RULE = """
[[cluster.shop.invariant]]
name = "none below zero"
sql = "select a from t where a < 0"
"""
_OPEN = """
import signal, sys, threading, time
from dataclasses import replace
from pathlib import Path
from knockwood.operations import shadow, shadow_steps
from knockwood.operations.cluster import Cluster
from knockwood.postgres.connection import connect
from knockwood.recover.table_definition import TableName
from knockwood.repository.targets import Latest, resolve
from knockwood.settings import parse
cluster = Cluster.of(parse(Path(sys.argv[1]).read_text()), "shop")
repository = cluster.repository()
def tell(*words):
    print(*words, flush=True)
def ask(clone, sql="select a from t order by a"):
    with connect(clone.dsn()) as connection:
        return [row[0] for row in connection.execute(sql).fetchall()]
"""
LOOP = (
    _OPEN
    + """
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
shadow_steps.run(cluster, stop, lambda step: tell(step.did), lambda error: tell("error", error))
tell("ended")
"""
)
BORROWER = (
    _OPEN
    + """
clone = shadow.warm_clone(cluster, repository, resolve(repository, Latest()), wait=20)
tell("lent" if clone else "none", clone.server.pid if clone else 0)
for line in sys.stdin:
    try:
        if line == "read\\n":
            tell(*ask(clone))
        elif line == "advance\\n":
            clone.advance(resolve(repository, Latest()))
            tell(*ask(clone))
        elif line == "sleep\\n":
            tell("sleeping")
            ask(clone, "select count(*)::text from t, pg_sleep(600)")
        else:
            clone.destroy()
            tell("gave back")
    except Exception as error:
        tell("error", type(error).__name__)
"""
)


@dataclass
class Told:
    """A child process that tells line by line what it did."""

    child: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def says(self) -> str:
        assert self.child.stdout is not None
        line = self.child.stdout.readline().rstrip("\n")
        assert line, f"it ended: {self.lines[-5:]}"
        self.lines.append(line)
        return line

    def until(self, word: str) -> str:
        while not (line := self.says()).startswith(word):
            pass
        return line

    def asked(self, what: str) -> str:
        assert self.child.stdin is not None
        self.child.stdin.write(what + "\n")
        self.child.stdin.flush()
        return self.says()


@contextmanager
def told(script: str, *words: object) -> Iterator[Told]:
    """Run a script; it is killed at the end if it has not ended by then."""
    child = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Told(child)
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


@dataclass
class Shop:
    """A protected server with a shadow in its settings, which are written in `config`."""

    made: Protected
    config: Path
    cluster: Cluster

    @classmethod
    def of(cls, made: Protected, shadow_keys: str = 'every = "1s"', rest: str = RULE) -> Shop:
        text = f"""
state = "{made.folder / "state"}"
[cluster.shop]
dsn = "{made.server.dsn()}"
repository = "{made.folder / "repository"}"
[cluster.shop.shadow]
enabled = true
behind = "0s"
checks = ["invariants"]
{shadow_keys}
{rest}"""
        config = made.folder / "knockwood.toml"
        config.write_text(text)
        return cls(made, config, Cluster.of(parse(text), "shop"))

    @property
    def record(self) -> ShadowRecord:
        record = read_record(shadow.shadow_folder(self.cluster))
        assert record is not None
        return record

    @property
    def postmaster(self) -> int:
        """The server that runs on, by its pid."""
        assert self.record.serving is not None
        return self.record.serving.pid

    def servers(self) -> list[int]:
        """PostgreSQL processes at work in the shadow's folder, after those told to end had time to."""
        folder = shadow.shadow_folder(self.cluster)
        deadline = time.monotonic() + 10
        while True:
            found = []
            for process in psutil.process_iter(["cwd", "status"]):
                cwd = process.info["cwd"] or ""
                if process.info["status"] != psutil.STATUS_ZOMBIE and Path(cwd).is_relative_to(folder):
                    found.append(process.pid)
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.02)
