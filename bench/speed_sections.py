"""The sections of the speed bench that run whole commands; each returns its table."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from gap_pgbackrest import PgBackRest
from knockwood.host import privileges
from measure import (
    Measured,
    Memory,
    Series,
    alternating,
    measured,
    peak_of,
    processor_of,
    ratios_of_pairs,
    seconds_of,
)
from sandbox import Said, must, query, say
from speed_site import Site, emptied, seconds_to_open
from tables import markdown

MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Section:
    """One table of the report. `missed` are the bars that were not reached."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    missed: tuple[str, ...] = field(default=())

    def text(self) -> str:
        parts = [f"## {self.title}", markdown(self.header, self.rows)]
        parts += [f"- {note}" for note in self.notes]
        parts += [f"- **bar missed**: {bar}" for bar in self.missed]
        return "\n\n".join(parts[:2]) + "".join(f"\n{part}" for part in ["", *parts[2:]])


HEADER = (
    "tool",
    "seconds: median (least to most)",
    "processor seconds",
    "MB/s",
    "stored MB",
    "peak memory MB",
    "as fast as peer",
)
PEAK_BAR = 300 * MB


def backup(site: Site) -> Section:
    """Full backups by turns; each is whole, whatever the repository has already."""
    tools = _backup_tools(site)
    sizes: dict[str, int] = {}
    commands = {name: tool.take for name, tool in tools.items()}

    def between(name: str) -> None:
        sizes[name] = tools[name].size()

    runs = alternating(site.options.runs, commands, between)
    rows = _rows(site, runs, sizes)
    notes = ("WAL is received and archived by both all the while; both verify page checksums on the way",)
    return Section("Full backup", HEADER, rows, notes, _missed("backup", runs))


def restore(site: Site) -> Section:
    """Restores of the newest backup and the WAL after it, up to a server that takes writes."""
    tools = _backup_tools(site)
    for name, tool in tools.items():
        say(f"  a backup by {name} to restore from")
        tool.take()
    site.pgbench("-n", "-c", str(site.options.clients), "-j", "2", "-T", "10")
    site.caught_up()
    shelf = site.source.work / "restored"
    shelf.mkdir()
    privileges.give(shelf, site.source.account)
    opened: dict[str, list[float]] = {name: [] for name in tools}

    def run(name: str) -> Measured:
        into = emptied(shelf / "data")
        done = tools[name].restore(into)
        opened[name].append(done.seconds + seconds_to_open(site, into))
        return done

    commands = {name: _bound(run, name) for name in tools}
    runs = alternating(site.options.runs, commands, lambda name: shutil.rmtree(shelf / "data"))
    until_open = {name: Series(tuple(values)) for name, values in opened.items()}
    rows = []
    for row, name in zip(_rows(site, runs, {}), runs, strict=True):
        peer = (
            "–"
            if name == "Knockwood"
            else f"{ratios_of_pairs(until_open[name], until_open['Knockwood']).median:.2f}"
        )
        rows.append((*row[:3], until_open[name].text(), row[5], row[6], peer))
    header = (*HEADER[:3], "seconds until open for writes", HEADER[5], HEADER[6], "the same until open")
    notes = (
        "pgBackRest's command copies files; the server then replays when it starts",
        "Knockwood's command also reads and checks the WAL, replays it, promotes, shuts down and flushes",
        "what counts in an outage is the time until open",
    )
    bars = [name for name in runs if name != "Knockwood"]
    slower = [n for n in bars if ratios_of_pairs(until_open[n], until_open["Knockwood"]).median < 1]
    missed = tuple(f"restore until open is slower than {name}" for name in slower)
    return Section("Restore", header, tuple(rows), notes, (*missed, *_memory_missed("restore", runs)))


def verify(site: Site) -> Section:
    """WAL at first sight and again, in a repository whose base backup is small."""
    ours = site.knockwood
    must(ours.run("backup"))
    segments = _make_wal(site)
    store = ours.folder / "repository"
    first: list[Measured] = []
    second: list[Measured] = []
    for _ in range(site.options.runs):
        shutil.rmtree(store / "verified", ignore_errors=True)
        first.append(_verified(site))
        second.append(_verified(site))
    raw = segments * site.source.segment_bytes / MB
    rows, speeds = [], []
    for name, runs in (("first sight", first), ("second run", second)):
        answers = [json.loads(one.said.out) for one in runs]
        inside = Series(tuple(float(answer["seconds"]) for answer in answers))
        series = seconds_of(runs)
        read = answers[-1]["bytes_read"] / MB
        memory = _memory(peak_of(runs))
        processor = f"{processor_of(runs).median:.2f}"
        speeds.append(raw / inside.median)
        rows.append(
            (name, series.text(), inside.text(), processor, f"{speeds[-1]:.0f}", f"{read:.0f}", memory)
        )
    speed = speeds[0]
    missed = (f"WAL verify at first sight: {speed:.0f} MB/s, not 400",) if speed < 400 else ()
    times = ("seconds: median (least to most)", "without the program's start")
    header = ("verify", *times, "processor seconds", "MB/s of WAL", "MB read", "peak memory MB")
    notes = (
        f"{segments} segments, {raw:.0f} MB of WAL written by pgbench; MB/s without the program's start",
    )
    return Section("Verify", header, tuple(rows), notes, missed)


def load(site: Site) -> Section:
    """pgbench with the receiver and the light checks, and without, by turns: with as many clients as keep every
    processor busy, and with one."""
    query(site.dsn, "ALTER SYSTEM SET archive_command = '/bin/true'")
    query(site.dsn, "SELECT pg_reload_conf()")
    checks: list[Said] = []
    rows: list[tuple[str, ...]] = []
    missed: list[str] = []
    for clients in (site.options.clients, 1):
        without, beside = _by_turns(site, clients, checks)
        slowed = Series(tuple((1 - b / a) * 100 for a, b in zip(without.values, beside.values, strict=True)))
        rows.append((str(clients), without.text(0), beside.text(0), slowed.text(1)))
        if slowed.median >= 5:
            missed.append(f"pgbench with {clients} clients slowed by {slowed.median:.1f}%, not under 5%")
    if not site.knockwood.receiver:
        site.knockwood.receive()
    seconds = [said.seconds for said in checks]
    statuses = ", ".join(sorted({str(said.status) for said in checks}))
    notes = (
        f"{site.options.seconds} s a run, a CHECKPOINT before each; light checks at its begin and every minute",
        f"{len(checks)} runs of the light checks, {max(seconds, default=0):.1f} s at most, statuses {statuses}",
        f"what they found: {', '.join(_findings(checks)) or 'nothing'}",
    )
    header = ("clients", "transactions a second without", "with", "slowed by %, by pairs")
    return Section("pgbench while protected", header, tuple(rows), notes, tuple(missed))


def _by_turns(site: Site, clients: int, checks: list[Said]) -> tuple[Series, Series]:
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(site.options.runs):
        for protected, values in found.items():
            site.knockwood.close()
            if protected:
                site.knockwood.receive()
            query(site.dsn, "CHECKPOINT")
            with _checking(site, checks) if protected else _nothing():
                values.append(site.tps(site.options.seconds, clients))
    return Series(tuple(found[False])), Series(tuple(found[True]))


def _findings(checks: list[Said]) -> list[str]:
    found: set[str] = set()
    for said in checks:
        with suppress(ValueError):
            found |= {str(finding["check"]) for finding in json.loads(said.out).get("findings", [])}
    return sorted(found)


@contextmanager
def _checking(site: Site, done: list[Said]) -> Iterator[None]:
    """Light checks now and every minute, as the service runs them."""
    stop = threading.Event()

    def work() -> None:
        while True:
            done.append(site.knockwood.run("check", "--json"))
            if stop.wait(60):
                return

    thread = threading.Thread(target=work, name="checks")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _verified(site: Site) -> Measured:
    ours = site.knockwood
    return measured(ours.command("verify", "--json"), env=ours.environment())


def _make_wal(site: Site) -> int:
    """Write WAL until the repository has as many segments as asked for; returns how many it has."""
    wal = site.knockwood.folder / "repository" / "wal"

    def count() -> int:
        return len(list(wal.glob("[0-9]*/*/*.zst")))

    while count() < site.options.wal_segments:
        query(site.dsn, "CHECKPOINT")
        site.pgbench("-n", "-c", str(site.options.clients), "-j", "2", "-T", "5")
    site.caught_up()
    site.knockwood.close()
    return count()


# --- the tools ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tool:
    take: Callable[[], Measured]
    restore: Callable[[Path], Measured]
    size: Callable[[], int]


def _backup_tools(site: Site) -> dict[str, _Tool]:
    ours = site.knockwood
    backups = ours.folder / "repository" / "backups"

    def restore_ours(into: Path) -> Measured:
        words = ours.command("restore", "--to", "latest", "--into", into, "--json")
        return measured(words, env=ours.environment())

    found = {
        "Knockwood": _Tool(
            lambda: measured(ours.command("backup", "--json"), env=ours.environment()),
            restore_ours,
            lambda: _bytes_in(max(backups.iterdir())),
        )
    }
    if site.pgbackrest is not None:
        for level in (1, 3):
            found[f"pgBackRest zst level {level}"] = _peer(site, replace(site.pgbackrest, level=level))
    return found


def _peer(site: Site, peer: PgBackRest) -> _Tool:
    account = site.source.account
    folder = peer.folder / "repo" / "backup"
    labels: list[Path] = []

    def take() -> Measured:
        peer.configure()
        done = measured(peer.command("--type=full", "backup"), account=account)
        labels.append(max(folder.glob("*/[0-9]*F")))
        return done

    def restore_peer(into: Path) -> Measured:
        into.mkdir(mode=0o700)
        privileges.give(into, account)
        words = peer.command(f"--pg1-path={into}", f"--set={labels[-1].name}", "restore")
        return measured(words, account=account)

    return _Tool(take, restore_peer, lambda: _bytes_in(labels[-1]))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _bound(run: Callable[[str], Measured], name: str) -> Callable[[], Measured]:
    return lambda: run(name)


# --- rows -----------------------------------------------------------------------------------------


def _rows(site: Site, runs: dict[str, list[Measured]], sizes: dict[str, int]) -> tuple[tuple[str, ...], ...]:
    ours = seconds_of(runs["Knockwood"])
    rows = []
    for name, done in runs.items():
        series = seconds_of(done)
        faster = "–" if name == "Knockwood" else f"{ratios_of_pairs(series, ours).median:.2f}"
        stored = f"{sizes[name] / MB:.0f}" if name in sizes else "–"
        speed = f"{site.bytes / MB / series.median:.0f}"
        processor = f"{processor_of(done).median:.2f}"
        rows.append((name, series.text(), processor, speed, stored, _memory(peak_of(done)), faster))
    return tuple(rows)


def _memory(peak: Memory) -> str:
    server = f" + server {peak.server / MB:.0f}" if peak.server else ""
    return f"{peak.own / MB:.0f}{server}"


def _missed(what: str, runs: dict[str, list[Measured]]) -> tuple[str, ...]:
    ours = seconds_of(runs["Knockwood"])
    peers = {name: ratios_of_pairs(seconds_of(done), ours).median for name, done in runs.items()}
    slower = [name for name, faster in peers.items() if name != "Knockwood" and faster < 1]
    return (*(f"{what} is slower than {name}" for name in slower), *_memory_missed(what, runs))


def _memory_missed(what: str, runs: dict[str, list[Measured]]) -> tuple[str, ...]:
    peak = peak_of(runs["Knockwood"]).own
    return (f"{what} took {peak / MB:.0f} MB at its peak, not under 300",) if peak >= PEAK_BAR else ()
