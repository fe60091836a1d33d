"""The kill sweep in small, and that it sees what it is there to see. In full: `make bench-kills`."""

from __future__ import annotations

import os
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

from knockwood.host import processes

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.timeout(900)
def test_a_dozen_kills_lose_nothing() -> None:
    command = [sys.executable, BENCH / "kill_sweep.py", "wal receive", "backup", "restore"]
    options = [
        "--scale",
        "0.07",
        "--lanes",
        "1",
        "--orders",
        "500",
        "--out",
        os.devnull,
        "--restore-every",
        "100",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    said = processes.run([*command, *options], env=environment, timeout=800, check=False)
    assert said.status == 0, said.out + said.err
    found = re.search(r"^(\d+) kills in .* 0 violations", said.out, re.MULTILINE)
    assert found is not None
    assert int(found[1]) >= 8


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.usefixtures("bench")
def test_every_place_is_aimed_at_while_the_kills_last() -> None:
    import random

    from kill_run import aims

    steps = [f"place {number % 10}" for number in range(50)]
    chosen = list(islice(aims(steps, 3.0, 24, 2, random.Random(1)), 40))
    assert {aim.place for aim in chosen if aim.place and not aim.server} == set(steps)
    assert sum(aim.server for aim in chosen) == 2
    assert all(1 <= aim.occurrence <= 5 for aim in chosen if aim.place)
    assert any(aim.place is None and 0 < aim.seconds <= 3 for aim in chosen)


@pytest.mark.usefixtures("bench")
def test_what_a_kill_must_not_do_is_seen() -> None:
    from kill_checks import cannot_start, full_restore, leftovers, listed_is_whole, strays
    from kill_site import must_backup, site

    with site(orders=200, clients=1, seed=1) as place:
        must_backup(place)
        assert listed_is_whole(place) == []
        into = place.new_folder()
        assert place.run(["restore", "--to", "latest", "--into", str(into)]).ok
        assert cannot_start(place, into) != []

        place.witness.acknowledged("order", 1 << 50, 1)
        done, wrong = full_restore(place)
        assert done is not None
        assert done.missing == 1
        assert wrong == ["1 promised commits are missing from a full restore"]

        cluster = place.cluster()
        repository = cluster.repository()
        assert leftovers(place, repository, cluster.state) == []
        repository.storage.put_new("backups/20260101T000000Z-full/pack-00000.tar.zst", [b"half"])
        (place.tmp / "left").write_bytes(b"half")
        assert len(leftovers(place, repository, cluster.state)) == 2

        stranger = processes.start(["sleep", "60"], cwd=place.folder)
        try:
            assert len(strays(place)) == 1
        finally:
            processes.stop(stranger)

        [first] = [info for info in repository.storage.list("backups/") if "members" in info.name]
        repository.storage.delete(first.name)
        assert any("lacks" in text for text in listed_is_whole(place))
        assert any("verify ended with 1" in text for text in listed_is_whole(place))
