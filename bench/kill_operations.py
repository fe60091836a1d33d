"""The commands that are killed: how each is begun, what must hold after a kill, how it is run again."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from kill_checks import answer, cannot_start, leftovers, listed_is_whole, problem, strays
from kill_site import DATABASE, Site, write_settings
from knockwood.errors import DirectoryNotEmptyError
from sandbox import Said, must

_START_EVERY = 4
"""Of so many restores run again, one is started and compared with the witness."""


class Operation:
    """A command on the live repository. `endless`: it works until it is stopped.

    `again_every`: after so many kills, each on top of what the one before left, it is run to its end.
    `restored_after`: full restores are made between its kills. `ends` counts how runs came to their ends.
    """

    endless = False
    restored_after = True

    def __init__(self, name: str, *words: str, again_every: int = 2) -> None:
        self.name = name
        self.again_every = again_every
        self._words = words
        self.expected: int | None = None
        self.ends: Counter[str] = Counter()

    def due(self, kills: int) -> bool:
        """Whether it is run to its end now, after so many kills since it last was."""
        return kills >= self.again_every

    def begins(self, steps: list[str]) -> int:
        """From which step on it matters most; aims there come before those at earlier steps."""
        return 0

    def prepare(self, site: Site) -> None:
        """Before each run."""
        site.receiver.ensure()

    def words(self, site: Site) -> list[str]:
        return list(self._words)

    def config(self, site: Site) -> Path | None:
        return None

    def after_kill(self, site: Site) -> list[str]:
        """What does not hold right after a kill."""
        return strays(site) + listed_is_whole(site, self.config(site))

    def again(self, site: Site) -> list[str]:
        """Run the same again, to its end; what does not hold then."""
        said = site.run(self.words(site), self.config(site))
        return self.judge(site, said) + self.clean(site)

    def judge(self, site: Site, said: Said) -> list[str]:
        """The first run without a kill says what is right."""
        if self.expected is None:
            self.expected = must(said).status
        if said.status != self.expected:
            return [f"run again it ended with {said.status}: {problem(said)}"]
        return []

    def clean(self, site: Site) -> list[str]:
        cluster = site.cluster(self.config(site))
        return leftovers(site, cluster.repository(), cluster.state) + strays(site)

    def done(self, site: Site) -> None:
        """After the last kill."""


class Prove(Operation):
    """Its proof must find nothing broken, run again over whatever was left."""

    def judge(self, site: Site, said: Said) -> list[str]:
        if said.ok:
            return []
        try:
            claims = [claim for claim in json.loads(said.out)["claims"] if claim["verdict"] != "held"]
        except (ValueError, KeyError):
            return [f"run again it ended with {said.status}: {problem(said)}"]
        return [f"run again it ended with {said.status}: {json.dumps(claims)[:900]}"]


class Restore(Operation):
    """Into a folder of its own each time."""

    def __init__(self) -> None:
        super().__init__("restore", again_every=3)
        self.into = Path()
        self.promised = 0
        self.runs = 0

    def prepare(self, site: Site) -> None:
        super().prepare(site)
        if not self.into.exists() or self.into == Path():
            self.into = site.new_folder()
        self.promised = len(site.witness.promises())

    def words(self, site: Site) -> list[str]:
        # Over what the kill before left.
        again = ["--again"] if self.into.exists() else []
        return ["restore", "--to", "latest", "--into", str(self.into), *again]

    def after_kill(self, site: Site) -> list[str]:
        wrong = super().after_kill(site)
        if (self.into / "PG_VERSION").exists():
            wrong += self._complete(site)
            shutil.rmtree(self.into)
        elif self.into.exists() and any(self.into.iterdir()):
            wrong += cannot_start(site, self.into)
            plain = [word for word in self.words(site) if word != "--again"]
            status, values = answer(site, plain)
            if status == 0 or values.get("error", {}).get("code") != DirectoryNotEmptyError.code:
                wrong.append(f"an unfinished restore is not refused: {status} {values.get('error')}")
        return wrong

    def again(self, site: Site) -> list[str]:
        self.runs += 1
        self.promised = len(site.witness.promises())
        wrong = self.judge(site, site.run(self.words(site)))
        if not wrong and self.runs % _START_EVERY == 1:
            wrong += self._complete(site)
        shutil.rmtree(self.into, ignore_errors=True)
        return wrong + self.clean(site)

    def _complete(self, site: Site) -> list[str]:
        lacking = site.lacking(self.into, self.promised)
        return [f"{lacking.lost} promised commits are missing from what it restored"] if lacking.lost else []


class Expire(Operation):
    """On a copy of the repository with several backups, so that there is always something to remove."""

    def __init__(self) -> None:
        super().__init__("expire", "expire", "--apply")
        self.kept: list[str] = []
        self.promised = 0
        self.runs = 0

    def prepare(self, site: Site) -> None:
        aged, copy = site.folder / "aged", site.folder / "expiring"
        if not aged.exists():
            self._age(site, aged)
        shutil.rmtree(copy, ignore_errors=True)
        _link(aged, copy)

    def _age(self, site: Site, aged: Path) -> None:
        site.receiver.ensure()
        full, incremental = ["backup"], ["backup", "--incremental"]
        for words in (full, incremental, full, incremental, full):
            must(site.run(words))
            site.switch_wal()
        site.wait_current()
        # Copied at rest, with all that was promised before the receiver was told to end.
        self.promised = len(site.witness.promises())
        site.receiver.stop()
        _link(site.folder / "repository", aged)
        site.receiver.start()

    def config(self, site: Site) -> Path:
        path = site.folder / "expiring.toml"
        if not path.exists():
            dsn = f"host={site.folder / 'away'} dbname={DATABASE}"
            write_settings(path, dsn, site.folder / "expiring", site.folder / "away" / "state")
        return path

    def judge(self, site: Site, said: Said) -> list[str]:
        wrong = super().judge(site, said) + listed_is_whole(site, self.config(site))
        _, values = answer(site, ["backups"], self.config(site))
        kept = [item["id"] for item in values["backups"]]
        if not self.kept:
            self.kept = kept
        if kept != self.kept:
            wrong.append(f"run again it kept {kept}, without a kill {self.kept}")
        self.runs += 1
        if self.runs % _START_EVERY == 1 and not wrong:
            wrong += self._restored(site)
        return wrong

    def _restored(self, site: Site) -> list[str]:
        """What is kept brings back all that was promised when the repository was copied."""
        into = site.new_folder()
        said = site.run(["restore", "--to", "latest", "--into", str(into)], self.config(site))
        if not said.ok:
            return [f"what it kept cannot be restored: {problem(said)}"]
        lacking = site.lacking(into, self.promised)
        shutil.rmtree(into)
        return [f"{lacking.lost} promised commits are missing after it"] if lacking.lost else []

    def done(self, site: Site) -> None:
        shutil.rmtree(site.folder / "expiring", ignore_errors=True)
        shutil.rmtree(site.folder / "aged", ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    # Objects are never written over, so a copy may share them.
    subprocess.run(["cp", "-al", str(source), str(target)], check=True)


class Receive(Operation):
    """The standing receiver itself."""

    endless = True

    def __init__(self) -> None:
        super().__init__("wal receive", "wal", "receive", again_every=1)

    def prepare(self, site: Site) -> None:
        site.receiver.stop()

    def again(self, site: Site) -> list[str]:
        site.receiver.ensure()
        if not site.wait_current():
            return ["run again it did not bring the archive up to the server within a minute"]
        wrong = [] if site.receiver.running else ["run again it ended"]
        return wrong + self.clean(site)


def all_operations() -> dict[str, Operation]:
    """By name, in the order of the report."""
    made: tuple[Operation, ...] = (
        Receive(),
        Operation("backup", "backup"),
        Operation("incremental", "backup", "--incremental"),
        Prove("prove", "prove", again_every=4),
        Restore(),
        Expire(),
        Operation("verify", "verify"),
    )
    return {operation.name: operation for operation in made}
