"""The kills of repairs in small, and that they see what they are there to see. In full: `make bench-repair-kills`."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

from knockwood.host import processes

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dozen_kills_end_well(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "repair_kills.py", "pages", "revert", "cluster in place"]
    options = ["--scale", "0.07", "--seed", "7", "--pieces", tmp_path, "--out", os.devnull]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    said = processes.run([*command, *options], env=environment, timeout=1700, check=False)
    assert said.status == 0, said.out + said.err
    found = re.search(r"^(\d+) kills, 0 violations", said.out, re.MULTILINE)
    assert found is not None
    assert int(found[1]) >= 8
    pieces = [json.loads(path.read_text())[0] for path in sorted(tmp_path.glob("*.json"))]
    assert [piece["operation"] for piece in pieces] == ["cluster in place", "pages", "revert"]
    assert all(piece["ends"] for piece in pieces)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.usefixtures("bench")
def test_most_kills_fall_where_something_is_done() -> None:
    from kill_run import aims

    steps = (
        [f"early {number}" for number in range(30)]
        + ["both"] * 3
        + [f"late {n}" for n in range(20)]
        + ["both"]
    )
    chosen = list(islice(aims(steps, 3.0, 40, 3, random.Random(1), 33), 70))
    places = [aim.place for aim in chosen if aim.place and not aim.server]
    assert {f"late {number}" for number in range(20)} <= set(places[:50])
    assert sum(place.startswith("early") for place in places) < len(places) / 3
    assert all(aim.occurrence == 4 for aim in chosen if aim.place == "both")
    assert all(not str(aim.place).startswith("early") for aim in chosen if aim.server)


@pytest.mark.usefixtures("bench")
def test_runs_add_up(tmp_path: Path) -> None:
    from kill_run import Result, save
    from repair_kills import merged, report

    one = Result("revert", 1, steps=5, hit=["a"], ours=2, known=["a", "b"], ends={"resumed": 1})
    other = Result(
        "revert",
        2,
        steps=6,
        hit=["a", "c"],
        ours=3,
        server=1,
        known=["c"],
        ends={"resumed": 1},
        violations=["bad"],
    )
    save([one], tmp_path / "1.json")
    save([other], tmp_path / "2.json")
    [both] = merged(tmp_path)
    assert (both.kills, both.steps, both.known, both.ends) == (6, 6, ["a", "b", "c"], {"resumed": 2})
    assert "6 kills, 1 violations" in report([both])
    assert "2 of 3" in report([both])


@pytest.mark.slow
@pytest.mark.usefixtures("bench")
def test_what_a_kill_must_not_leave_is_seen() -> None:
    import psycopg

    from kill_site import site
    from repair_kill_base import READER, ask, backends
    from repair_kill_operations import PAGE, Pages, Revert, Table

    with site(orders=200, clients=1, seed=1, reach=True) as place:
        revert = Revert()
        revert.prepare(place)
        assert (revert.state(place), revert.healed(place), revert.as_damaged(place)) == ([], False, True)
        assert revert.clean(place) == []
        ask(place.dsn, "delete from credit where id = 1001")
        assert "it should not have" in revert.state(place)[0]
        ask(place.dsn, "create table left_over (id int)")
        ask(place.dsn, "select pg_create_physical_replication_slot('left')")
        assert len(revert.clean(place)) == 2
        ask(place.dsn, "select pg_drop_replication_slot('left')")
        ask(place.dsn, "drop table used, credit, left_over")

        table = Table()
        table.prepare(place)
        assert (table.state(place), table.healed(place)) == ([], False)
        ask(place.dsn, "create table credit (id int primary key, v int, n numeric, note text)")
        assert table.state(place) != []

        pages = Pages("pages", ("page_checksums",), (("flip", "torn"),))
        pages.prepare(place)
        assert (pages.state(place), pages.healed(place)) == ([], False)
        path, block = next(iter(pages.bad))
        pages.bad[path, block] = (bytes(PAGE), 0)
        with (place.server.data_directory / path).open("r+b") as file:
            file.seek(0)
            other = file.read(PAGE)
            file.seek(block * PAGE)
            file.write(other)
        # A page of another block is not accepted, so it is taken for a torn one; an older good one is not.
        assert pages.state(place) == []
        first = next(iter(pages.bad))
        pages.bad[first[0], 0] = (bytes(PAGE), 1 << 62)
        assert len(pages.state(place)) == 1

        with psycopg.connect(place.dsn, application_name="dead"):
            assert "dead" in backends(place)[0]
        with psycopg.connect(place.dsn, application_name=READER):
            assert backends(place) == []
