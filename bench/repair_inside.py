"""What the repair bench does on its cluster: damage, restore, repair, with writers beside."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

import gap_barman
from knockwood.host import privileges, processes
from measure import measured
from sandbox import Said, must, query, say, wait_until
from speed_site import Site, emptied, seconds_to_open

_PAGE = 8192
_SEGMENT_PAGES = (1 << 30) // _PAGE
_WRITERS = 4
_KEPT_MB = 100


@dataclass(frozen=True, slots=True)
class Taken:
    """A restore or a repair: seconds of the command; `blocked` the longest a writer waited meanwhile."""

    what: str
    how: str
    seconds: float
    blocked: float = 0.0
    detail: str = ""


class Writers:
    """Threads that update random accounts of the upper half, each in a transaction of its own."""

    def __init__(self, dsn: str, low: int, high: int) -> None:
        self._dsn, self._low, self._high = dsn, low, high
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._longest = 0.0
        self._threads = [threading.Thread(target=self._write, args=(n,)) for n in range(_WRITERS)]
        self.errors: list[str] = []

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def longest(self) -> float:
        """The longest transaction in seconds since the last question."""
        with self._lock:
            found, self._longest = self._longest, 0.0
        return found

    def _write(self, seed: int) -> None:
        chance = random.Random(seed)
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._stop.wait(0.005):
                begun = time.monotonic()
                try:
                    connection.execute(
                        "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = %s",
                        [chance.randint(self._low, self._high)],
                    )
                except psycopg.Error as error:
                    self.errors.append(str(error))
                with self._lock:
                    self._longest = max(self._longest, time.monotonic() - begun)


@dataclass
class Repairs:
    """One size: `pages` to damage, `rows` of the transaction to take back."""

    site: Site
    pages: int
    rows: int
    barman: gap_barman.Barman | None = None
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    # --- before -----------------------------------------------------------------------------------

    def prepare(self, *, barman: bool) -> None:
        """A table of 100 MB, a backup by each tool, and WAL after it."""
        place = self.site
        query(place.dsn, "CREATE EXTENSION IF NOT EXISTS pg_buffercache")
        query(
            place.dsn,
            "CREATE TABLE kept AS SELECT i AS id, repeat(md5(i::text), 3) AS text"
            f" FROM generate_series(1, {_KEPT_MB * 7500}) i",
        )
        query(place.dsn, "ALTER TABLE kept ADD PRIMARY KEY (id)")
        query(place.dsn, "VACUUM ANALYZE kept")
        if barman:
            self._prepare_barman()
        query(place.dsn, "CHECKPOINT")
        place.knockwood.backup()
        if place.pgbackrest is not None:
            place.pgbackrest.backup()
        with self._writers():
            time.sleep(15)
        place.caught_up()

    def _prepare_barman(self) -> None:
        place = self.site
        program, missing = gap_barman.find(place.source.account)
        if missing:
            place.notes.append(f"Barman: {missing}")
            return
        folder = place.source.work / "barman"
        folder.mkdir()
        tool = gap_barman.Barman(place.source, folder, program)
        tool.prepare()
        words = [word for word in (tool.archive_words(), _peer_words(place)) if word]
        command = " && ".join(words).replace("'", "''")
        query(place.dsn, f"ALTER SYSTEM SET archive_command = '{command}'")
        query(place.dsn, "SELECT pg_reload_conf()")
        tool.backup()
        self.barman = tool

    def wal_megabytes(self) -> float:
        wal = self.site.knockwood.folder / "repository" / "wal"
        return len(list(wal.glob("[0-9]*/*/*"))) * self.site.source.segment_bytes / 1e6

    # --- whole restores ---------------------------------------------------------------------------

    def restores(self) -> list[Taken]:
        """The whole database, until it is open for writes."""
        place, ours = self.site, self.site.knockwood
        shelf = place.source.work / "restored"
        shelf.mkdir()
        privileges.give(shelf, place.source.account)
        found = []

        def whole(name: str, run: Callable[[Path], Any]) -> None:
            into = emptied(shelf / "data")
            begun = time.monotonic()
            run(into)
            seconds = time.monotonic() - begun + seconds_to_open(place, into)
            shutil.rmtree(into)
            found.append(Taken("the whole database", name, seconds))
            say(f"  {found[-1]}")

        whole(
            "Knockwood",
            lambda into: measured(
                ours.command("restore", "--to", "latest", "--into", into, "--json"), env=ours.environment()
            ),
        )
        peer = place.pgbackrest
        if peer is not None:
            whole("pgBackRest", lambda into: must(peer.restore(into)))
        if self.barman is not None:
            barman = self.barman
            barman.run("archive-wal", gap_barman.SERVER)
            whole("Barman", lambda into: must(barman.restore(into)))
        return found

    # --- repairs ----------------------------------------------------------------------------------

    def repairs(self, how: str) -> list[Taken]:
        """Each repair so many times; the medians."""
        ways = {
            f"{self.pages} damaged pages mended": lambda: self._mend_pages(self._cold_blocks()),
            f"{self.pages} damaged pages mended, written since the backup": (
                lambda: self._mend_pages(self._written_blocks())
            ),
            f"a transaction of {self.rows:,} rows taken back": self._revert,
            f"one table of {_KEPT_MB} MB brought back": self._bring_back,
        }
        found = []
        os.sync()  # the disk may be busy still with what was restored and removed just before
        with self._writers() as writers:
            for what, way in ways.items():
                runs = [self._measured(way, writers) for _ in range(self.site.options.runs)]
                seconds = statistics.median(run[0] for run in runs)
                blocked = statistics.median(run[1] for run in runs)
                detail = runs[-1][2] + (f"; {len(writers.errors)} failed writes" if writers.errors else "")
                found.append(Taken(what, how, seconds, blocked, detail))
                say(f"  {found[-1]}")
        return found

    def _measured(
        self, way: Callable[[], Callable[[], tuple[Said, str]]], writers: Writers
    ) -> tuple[float, float, str]:
        run = way()
        writers.longest()
        said, detail = run()
        blocked = writers.longest()
        if said.status != 0:
            raise RuntimeError(
                f"status {said.status}: {said.command}\n{said.out[-3000:]}\n{said.err[-2000:]}"
            )
        return said.seconds, blocked, detail

    def _mend_pages(self, blocks: list[int]) -> Callable[[], tuple[Said, str]]:
        """Damage pages of the lower half on disk, and let the check name them; the repair is measured."""
        ours = self.site.knockwood
        self._damage(blocks)
        found = ours.run("check", "page_checksums", "--json")
        # Very many pages of one file are one finding.
        named = sum(len(each["evidence"].get("blocks", "1")) for each in json.loads(found.out)["findings"])
        if named < self.pages:
            raise RuntimeError(f"{named} of {self.pages} damaged pages were found: {found.err[-500:]}")
        path = ours.folder / "findings.json"
        path.write_text(found.out)

        def run() -> tuple[Said, str]:
            said = ours.run("recover", "--finding", path, "--apply", "--json")
            return said, f"{named} pages named"

        return run

    def _cold_blocks(self) -> list[int]:
        """Pages of the lower half, where nobody writes, that are not in memory."""
        query(self.site.dsn, "CHECKPOINT")
        [(pages,)] = query(self.site.dsn, "SELECT pg_relation_size('pgbench_accounts') / 8192")
        free = set(range(1, int(pages) // 2 - 10)) - self._cached()
        return self.chance.sample(sorted(free), self.pages)

    def _written_blocks(self) -> list[int]:
        """The same, but written a moment ago: other pages take their place in memory."""
        dsn, most = self.site.dsn, self._accounts() // 2 - 2000
        some = ",".join(map(str, self.chance.sample(range(1, most), 3 * self.pages)))
        rows = f"FROM pgbench_accounts WHERE aid = ANY ('{{{some}}}')"
        written = query(dsn, f"SELECT DISTINCT (ctid::text::point)[0]::int {rows}")
        query(dsn, f"UPDATE pgbench_accounts SET filler = 'written' WHERE aid IN (SELECT aid {rows})")
        query(dsn, "CHECKPOINT")
        for _ in range(10):
            others = ",".join(map(str, self.chance.sample(range(1, most), min(20_000, most // 2))))
            query(dsn, f"SELECT sum(abalance) FROM pgbench_accounts WHERE aid = ANY ('{{{others}}}')")
            free = {int(block) for (block,) in written} - self._cached()
            if len(free) >= self.pages:
                return self.chance.sample(sorted(free), self.pages)
        raise RuntimeError("the written pages stay in memory")

    def _cached(self) -> set[int]:
        rows = query(
            self.site.dsn,
            "SELECT relblocknumber FROM pg_buffercache WHERE relforknumber = 0"
            " AND relfilenode = pg_relation_filenode('pgbench_accounts')",
        )
        return {int(block) for (block,) in rows}

    def _damage(self, blocks: list[int]) -> None:
        """Flip a bit in each of the pages."""
        [(path,)] = query(self.site.dsn, "SELECT pg_relation_filepath('pgbench_accounts')")
        folder = self.site.source.server.data_directory
        for block in blocks:
            segment, rest = divmod(block, _SEGMENT_PAGES)
            file = folder / (f"{path}.{segment}" if segment else str(path))
            with file.open("r+b") as handle:
                handle.seek(rest * _PAGE + 5000)
                [byte] = handle.read(1)
                handle.seek(rest * _PAGE + 5000)
                handle.write(bytes([byte ^ 8]))

    def _revert(self) -> Callable[[], tuple[Said, str]]:
        """One transaction spoils a column of many rows; later ones write other columns of the same rows."""
        ours, dsn = self.site.knockwood, self.site.dsn
        low = self._accounts() // 2 + self.chance.randrange(self._accounts() // 4)
        with psycopg.connect(dsn) as connection:
            connection.execute(
                "UPDATE pgbench_accounts SET filler = 'spoilt' WHERE aid BETWEEN %s AND %s",
                [low, low + self.rows - 1],
            )
            row = connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchone()
        assert row is not None
        query(dsn, f"UPDATE pgbench_accounts SET abalance = 7 WHERE aid BETWEEN {low} AND {low + 99}")

        def run() -> tuple[Said, str]:
            said = ours.run("revert", str(row[0]), "--apply", "--json")
            [(left,)] = query(
                dsn,
                "SELECT count(*) FROM pgbench_accounts WHERE filler = 'spoilt' AND aid BETWEEN"
                f" {low} AND {low + self.rows - 1}",
            )
            if left:
                raise RuntimeError(f"{left} rows are still spoilt: {said.out[-2000:]}")
            return said, "100 of the rows written again since"

        return run

    def _bring_back(self) -> Callable[[], tuple[Said, str]]:
        ours = self.site.knockwood

        def run() -> tuple[Said, str]:
            said = ours.run("restore", "--table", "postgres.public.kept", "--apply", "--json")
            rows = json.loads(said.out).get("rows") if said.ok else None
            query(self.site.dsn, "DROP SCHEMA IF EXISTS knockwood_restored CASCADE")
            return said, f"{rows} rows"

        return run

    # --- beside -----------------------------------------------------------------------------------

    @contextmanager
    def shadow(self) -> Iterator[None]:
        """`knockwood shadow run` in the background, caught up, its first checks done, `lost_writes` up to date, as a
        schedule of `knockwood check` keeps it."""
        ours = self.site.knockwood
        settings = ours.settings.read_text()
        ours.settings.write_text(f'{settings}\n[cluster.gap.shadow]\nenabled = true\nbehind = "0s"\n')
        child = processes.start(ours.command("shadow", "run"), env=dict(os.environ) | ours.environment())
        try:
            wait_until(self._followed, "the shadow to follow", 900)
            wait_until(self._compared, "lost_writes to have compared the WAL", 300)
            yield
        finally:
            processes.stop(child, grace=30)

    def _followed(self) -> bool:
        # Without checks of its own its verdict is 'not checked'.
        said = self.site.knockwood.run("shadow", "status", "--json")
        status = json.loads(said.out) if said.out else {}
        return bool(status.get("reached_lsn") and status.get("proof") and not status["busy"])

    def _compared(self) -> bool:
        # One run reads so much WAL only.
        return self.site.knockwood.run("check", "lost_writes").status == 0

    def _accounts(self) -> int:
        return self.site.options.scale * 100_000

    def _writers(self) -> Writers:
        return Writers(self.site.dsn, self._accounts() // 2, self._accounts())


def _peer_words(place: Site) -> str:
    return place.pgbackrest.archive_words() if place.pgbackrest is not None else ""
