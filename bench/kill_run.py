"""Killing one operation again and again: which steps, how, and what came of it."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kill_checks import Restored, full_restore, machine_lost, wait_steady
from kill_operations import Operation
from kill_site import Site
from knockwood.host import processes
from knockwood.repository.backups.listing import list_backups
from sandbox import say

_RECORD_SECONDS = 6.0
_ENDLESS_SECONDS = 12.0
_ENDS_WITHIN = 240.0
_SWITCH_EVERY = 0.7


@dataclass(frozen=True, slots=True)
class Aim:
    """Where to kill: before the `occurrence`-th time at a place, or (no place) after so many seconds.

    `server`: the database server is killed there, and the command goes on.
    """

    place: str | None
    occurrence: int
    seconds: float
    server: bool = False

    def __str__(self) -> str:
        who = "the server" if self.server else "it"
        if self.place is None:
            return f"{who} after {self.seconds:.2f} s"
        return f"{who} before '{self.place}', time {self.occurrence}"


@dataclass
class Result:
    """What came of the kills of one operation."""

    operation: str
    seed: int
    steps: int = 0
    places: int = 0
    hit: list[str] = field(default_factory=list)
    ours: int = 0
    server: int = 0
    at_random: int = 0
    missed: int = 0
    again: int = 0
    said_why: int = 0
    succeeded: int = 0
    restores: list[dict[str, Any]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)

    @property
    def kills(self) -> int:
        return self.ours + self.server

    def broken(self, aim: Aim | None, wrong: list[str]) -> None:
        """Note violations, each with how to make it again."""
        for text in wrong:
            where = f"kill {aim}" if aim else "without a kill"
            line = f"{self.operation}, seed {self.seed}: {where}: {text}"
            self.violations.append(line)
            say(f"VIOLATION {line}")

    def restored(self, done: Restored | None) -> None:
        if done is not None:
            self.restores.append(asdict(done))


def aims(
    steps: list[str], seconds: float, kills: int, servers: int, chance: random.Random, begins: int = 0
) -> Iterator[Aim]:
    """Every place once while the kills last, then last and random times at them, and random moments.

    Endless: the caller stops when it has its kills. One in six falls at a random moment. Three in four of the
    others come at the steps from `begins` on.
    """
    before, late = Counter(steps[:begins]), Counter(steps[begins:])
    places, early = list(late), [place for place in before if place not in late]
    # More places than kills: evenly over the run.
    room = max(1, kills - kills // 6)
    first = _spread(places, room - min(len(early), room // 4)) + _spread(early, room // 4)
    once = []
    for number in range(servers):
        place = places[(2 * number + 1) * len(places) // (2 * servers)]
        once.append(Aim(place, before[place] + 1, 0.0, server=True))
    for number, place in enumerate(first):
        once.append(Aim(place, before[place] + 1 if place in late else 1, 0.0))
        if number % 5 == 4:
            once.append(Aim(None, 0, chance.uniform(0.05, seconds)))
    if begins:
        # A sweep that is interrupted shall have been everywhere.
        chance.shuffle(once)
    yield from once
    while True:
        place = chance.choice(early if early and chance.random() < 0.25 else places)
        lowest = before[place] + 1 if place in late else 1
        yield Aim(place, chance.randint(lowest, before[place] + late[place]), 0.0)
        if chance.random() < 0.2:
            yield Aim(None, 0, chance.uniform(0.05, seconds))


def _spread(places: list[str], room: int) -> list[str]:
    if len(places) <= room:
        return places
    return [places[i * len(places) // room] for i in range(room)]


class Killing:
    """The kills of one operation at one site."""

    def __init__(
        self,
        site: Site,
        operation: Operation,
        seed: int,
        restore_every: int,
        keep: Callable[[Result], None] = lambda _: None,
    ) -> None:
        """`keep` is called after each kill with what came of all of them so far."""
        self.keep = keep
        self.site = site
        self.operation = operation
        self.restore_every = restore_every
        self.chance = random.Random(seed)
        self.result = Result(operation.name, seed)
        self.log = site.folder / "killed.log"
        self.begun = time.monotonic()
        self.unclean = 0
        self.starts_within = 0.0
        self.turns = seed % 2

    def sweep(self, kills: int, servers: int) -> Result:
        """Kill it `kills` times and the server `servers` times while it runs."""
        steps, seconds = self._record()
        self.result.steps, self.result.places = len(steps), len(set(steps))
        self.result.known = sorted(set(steps))
        say(f"{self.operation.name}: {len(steps)} steps at {len(set(steps))} places in {seconds:.1f} s")
        most = 2 * (kills + servers) + 5
        chosen = aims(steps, seconds, kills, servers, self.chance, self.operation.begins(steps))
        for number, aim in enumerate(chosen):
            if number >= most or (self.result.ours >= kills and self.result.server >= servers):
                break
            if aim.server and self.result.server >= servers:
                continue
            if not self._once(aim):
                self.result.missed += 1
            elif self.operation.restored_after and self.result.kills % self.restore_every == 0:
                self._restore()
            self.keep(self.result)
        self._again(None)
        if self.operation.restored_after:
            self._restore()
        self.operation.done(self.site)
        return self.result

    # --- one kill ---------------------------------------------------------------------------------

    def _once(self, aim: Aim) -> bool:
        """Whether the kill fell; all that must hold after it is looked at."""
        self.operation.prepare(self.site)
        self.log.write_bytes(b"")
        child = self._begin(self._options(aim))
        fell = self._server_falls(child) if aim.server else self._falls(child, aim)
        if self.operation.endless and not aim.server:
            processes.stop(child, grace=0)
        if fell:
            self.result.hit += [aim.place] if aim.place else []
            self.result.at_random += aim.place is None
            if aim.server:
                self.result.server += 1
            else:
                self.result.ours += 1
            say(
                f"{time.monotonic() - self.begun:4.0f} s {self.operation.name} {self.result.kills}: killed {aim}"
            )
        self.result.broken(aim, self._traceback() + self.operation.after_kill(self.site))
        self.unclean += 1
        if self.operation.due(self.unclean):
            self._again(aim)
        return fell

    def _again(self, aim: Aim | None) -> None:
        """Run it to its end over what the last kills left."""
        if self.unclean:
            self.unclean = 0
            self.result.again += 1
            self.result.broken(aim, self.operation.again(self.site))
            self.result.ends = dict(self.operation.ends)

    def _options(self, aim: Aim) -> dict[str, Any]:
        if aim.place is None:
            return {}
        options = {"place": aim.place, "occurrence": aim.occurrence}
        return options | ({"victim": str(self.site.pid_file)} if aim.server else {})

    def _begin(self, options: dict[str, Any]) -> subprocess.Popen[bytes]:
        if self.operation.endless:
            self.site.receiver.start(options)
            assert self.site.receiver.child is not None
            return self.site.receiver.child
        words, config = self.operation.words(self.site), self.operation.config(self.site)
        return self.site.launch(words, options, config, self.log)

    def _falls(self, child: subprocess.Popen[bytes], aim: Aim) -> bool:
        longest = self.starts_within + _ENDLESS_SECONDS if self.operation.endless else _ENDS_WITHIN
        if aim.place is None:
            longest = aim.seconds
        self._wait(child, longest)
        if child.poll() is None:
            child.kill()
            child.wait()
            if aim.place is not None and not self.operation.endless:
                self.result.broken(aim, [f"it did not end within {longest:.0f} s"])
            return aim.place is None
        return child.returncode == -9

    def _server_falls(self, child: subprocess.Popen[bytes]) -> bool:
        site, endless = self.site, self.operation.endless
        within = self.starts_within + _ENDLESS_SECONDS if endless else _ENDS_WITHIN
        deadline = time.monotonic() + within
        fell = False
        while time.monotonic() < deadline and child.poll() is None and not (fell and endless):
            if not fell and site.server_killed.exists():
                fell = True
                # A supervisor takes a moment.
                time.sleep(self.chance.uniform(0.0, 1.0))
                site.restart_server()
            elif endless:
                site.switch_wal()
            time.sleep(0.02 if not endless else 0.2)
        if not site.server.running:
            fell = True
            site.restart_server()
        if not endless:
            self._ended(child, fell, within)
        return fell

    def _ended(self, child: subprocess.Popen[bytes], fell: bool, within: float) -> None:
        """How the command ended whose server was killed."""
        if child.poll() is None:
            child.kill()
            child.wait()
            self.result.broken(None, [f"with the server killed it did not end within {within:.0f} s"])
        elif fell and child.returncode == 0:
            self.result.succeeded += 1
        elif fell:
            self.result.said_why += 1

    def _wait(self, child: subprocess.Popen[bytes], longest: float) -> None:
        deadline = time.monotonic() + longest
        while child.poll() is None and (left := deadline - time.monotonic()) > 0:
            if self.operation.endless:
                self.site.switch_wal()
            try:
                child.wait(min(left, _SWITCH_EVERY if self.operation.endless else left))
            except subprocess.TimeoutExpired:
                continue

    def _traceback(self) -> list[str]:
        found = []
        for log in (self.log, self.site.receiver.log):
            text = log.read_text(errors="replace") if log.exists() else ""
            if "Traceback (most recent" in text:
                found.append("it ended with a traceback: " + " / ".join(text.strip().splitlines()[-3:])[:500])
                log.write_bytes(b"")
        return found

    # --- around the kills -------------------------------------------------------------------------

    def _record(self) -> tuple[list[str], float]:
        """The steps of a run that nobody kills, and its seconds."""
        path = self.site.folder / "steps.json"
        self.operation.prepare(self.site)
        self.log.write_bytes(b"")
        begun = time.monotonic()
        child = self._begin({"record": str(path)})
        if self.operation.endless:
            self.site.wait_current()
            self.starts_within = time.monotonic() - begun
            self._wait(child, _RECORD_SECONDS)
            self.site.receiver.stop()
        else:
            child.wait(_ENDS_WITHIN)
        seconds = time.monotonic() - begun
        if not path.exists():
            raise RuntimeError(f"{self.operation.name} could not run: {self.log.read_text(errors='replace')}")
        steps: list[str] = json.loads(path.read_text())
        path.unlink()
        self.result.broken(None, self._traceback() + self.operation.after_kill(self.site))
        self.result.broken(None, self.operation.again(self.site))
        return steps, seconds

    def _restore(self) -> None:
        """By turns a full restore, from the best backup or any listed one, and one after a lost machine."""
        site = self.site
        self.turns += 1
        if self.turns % 2 == 0:
            done, wrong = machine_lost(site)
        else:
            wait_steady(site)
            listed = [backup.id for backup in list_backups(site.repository())]
            done, wrong = full_restore(site, self.chance.choice(listed) if self.turns % 4 == 3 else None)
        self.result.restored(done)
        self.result.broken(None, wrong)


def save(results: list[Result], path: Path) -> None:
    path.write_text(json.dumps([asdict(result) for result in results]))


def read(path: Path) -> list[Result]:
    return [Result(**value) for value in json.loads(path.read_text())]
