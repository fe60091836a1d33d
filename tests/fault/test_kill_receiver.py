"""The receiver killed at random, again and again, while commits go on: nothing lost, doubled or damaged."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from fix_receive import commit, fetch_range, first_lsn, new_repository, start_again, waldump
from fix_server import ServerFactory
from knockwood.model.wal import Lsn, Timeline, WalRange, WalSegment
from knockwood.postgres.server import LocalServer
from knockwood.repository import gaps
from knockwood.repository.archive import WalArchive
from knockwood.repository.receive import Receiver, receiving
from knockwood.repository.repository import Repository

KILLS = 40
ONE = Timeline(1)

# Says on its output what it has told the world to be durable.
RECEIVER = """
import sys, threading
from pathlib import Path
from knockwood.repository.receive import Receiver
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage

url, dsn, spool = sys.argv[1:]
receiver = Receiver(Repository.open(open_storage(url)), dsn, Path(spool), partial_every=0.05,
                    on_event=lambda event: print(receiver.durable, event, file=sys.stderr, flush=True) or
                    (receiver.durable and print(receiver.durable[1], flush=True)))
receiver.run(threading.Event())
"""


def start(repository: Repository, server: LocalServer, spool: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RECEIVER, repository.storage.url, server.dsn(), str(spool)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def write(server: LocalServer, stop: threading.Event, acknowledged: list[Lsn]) -> None:
    chance = random.Random(5)
    while not stop.is_set():
        acknowledged.append(commit(server, chance.randrange(1, 20_000), switch=chance.random() < 0.02))


def test_killed_at_random(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1, wal_keep_size="4GB")
    repository = new_repository(server, tmp_path / "repository")
    spool = tmp_path / "spool"
    stop, acknowledged = threading.Event(), [commit(server)]
    writer = threading.Thread(target=write, args=(server, stop, acknowledged))
    writer.start()
    chance = random.Random(7)
    useful = 0
    try:
        for number in range(KILLS):
            child = start(repository, server, spool)
            said: list[str] = []
            if number % 3:
                # In the middle of the work: after its first words.
                assert child.stdout is not None
                said = child.stdout.readline().split()
            # Otherwise from before the first connection on.
            time.sleep(chance.random())
            child.kill()
            said += child.communicate()[0].split()
            useful += bool(said)
            stock = WalArchive(repository).inventory()
            assert stock.gaps() == ()
            if said:
                # What was said to be durable is there, without the spool.
                promised = WalRange(ONE, first_lsn(repository), Lsn.parse(said[-1]))
                assert stock.covers(promised)
    finally:
        stop.set()
        writer.join()
    assert useful > KILLS / 2
    with receiving(Receiver(repository, server.dsn(), spool)) as receiver:
        assert receiver.flush() >= acknowledged[-1]
    check(repository, server, acknowledged[-1], tmp_path / "wal")


def check(repository: Repository, server: LocalServer, last: Lsn, folder: Path) -> None:
    """The archive is contiguous, valid to the last record, equal to the server's own files, and clean."""
    stock = WalArchive(repository).inventory()
    everything = WalRange(ONE, first_lsn(repository), last)
    assert stock.gaps() == ()
    assert gaps.list_gaps(repository) == ()
    assert stock.covers(everything)
    fetch_range(repository, everything, folder)
    walked = waldump(server, folder, everything)
    assert walked.returncode == 0, walked.stderr
    for number in stock.segments[ONE]:
        name = WalSegment(ONE, number, stock.segment_bytes).name
        own = server.data_directory / "pg_wal" / name
        assert own.read_bytes() == (folder / name).read_bytes()
    # One object per segment, and no partial of a segment that is whole.
    names = Counter(info.name.split(".", 1)[0] for info in repository.storage.list("wal/00000001/"))
    assert set(names.values()) == {1}
    assert all(partial.segment.number not in stock.segments[ONE] for partial in stock.partials)


def test_killed_with_its_server(new_server: ServerFactory, tmp_path: Path) -> None:
    """Both die at once, at random: what was acknowledged is there once both are back."""
    server = new_server(18, segment_megabytes=1, wal_keep_size="4GB")
    repository = new_repository(server, tmp_path / "repository")
    spool = tmp_path / "spool"
    chance = random.Random(11)
    last = commit(server)
    for _ in range(8):
        child = start(repository, server, spool)
        assert child.stdout is not None
        child.stdout.readline()
        for _ in range(chance.randrange(1, 30)):
            last = commit(server, chance.randrange(1, 20_000), switch=chance.random() < 0.2)
        server.kill()
        child.kill()
        child.communicate()
        start_again(server)
        assert WalArchive(repository).inventory().gaps() == ()
    with receiving(Receiver(repository, server.dsn(), spool)) as receiver:
        assert receiver.flush() >= last
    check(repository, server, last, tmp_path / "wal")
