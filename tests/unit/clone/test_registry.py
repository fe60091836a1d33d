"""The registry of clones: what is swept, and what never is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from knockwood.clone.registry import Record, Registry, remove, sign, stop_server
from knockwood.clone.spool import runs
from knockwood.host.processes import ProcessIdentity
from knockwood.model import Timeline, WalSegment

_DIE = """
import os, sys
from pathlib import Path
from knockwood.clone.registry import Registry, sign
entry = Registry(Path(sys.argv[1])).enter("die", Path(sys.argv[2]) if len(sys.argv) > 2 else None)
entry.record.root.mkdir()
sign(entry.record)
(entry.record.root / "data").mkdir()
(entry.record.root / "data" / "file").touch()
os.kill(os.getpid(), 9)
"""


def die(*words: Path) -> None:
    subprocess.run([sys.executable, "-c", _DIE, *map(str, words)], check=False)


def test_the_clones_of_the_living_stay_and_those_of_the_dead_go(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    entry = registry.enter("mine")
    entry.record.root.mkdir()
    sign(entry.record)
    die(tmp_path)
    assert len(registry.records()) == 2
    (swept,) = registry.sweep()
    assert swept.purpose == "die"
    assert not swept.root.exists()
    assert [record.purpose for record in registry.records()] == ["mine"]
    assert entry.record.root.exists()
    entry.remove()
    assert registry.records() == []
    assert not entry.record.root.exists()
    assert sorted(path.name for path in registry.folder.iterdir()) == ["sweep.lock"]


def test_a_folder_that_is_not_signed_is_not_ours(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "state")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").touch()
    dead = ProcessIdentity(2**22 + 1, 1.0)
    entry = registry.enter("x", mine)
    remove(entry.record)
    assert (mine / "file").exists()
    sign(replace(entry.record, id="another"))
    remove(entry.record)
    assert (mine / "file").exists()
    path = registry.folder / f"{entry.record.id}.json"
    path.write_text(json.dumps(replace(entry.record, owner=dead).as_json()))
    assert registry.sweep() == []  # its lock is held
    os.close(entry._handle)
    assert len(registry.sweep()) == 1
    assert (mine / "file").exists()
    assert registry.records() == []


def test_what_died_while_it_was_written_down_is_tidied_up(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    entry = registry.enter("mine")
    (registry.folder / "20260101T000000Z-dead.lock").touch()
    old, young = registry.folder / ".tmp-old", registry.folder / ".tmp-young"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    registry.sweep()
    names = {path.name for path in registry.folder.iterdir()}
    assert names == {f"{entry.record.id}.json", f"{entry.record.id}.lock", "sweep.lock", ".tmp-young"}
    entry.close()


def test_a_record_survives_its_json(tmp_path: Path) -> None:
    entry = Registry(tmp_path).enter("purpose")
    assert Record.from_json(json.loads(json.dumps(entry.record.as_json()))) == entry.record
    entry.close()
    entry.close()


def test_a_process_elsewhere_is_never_stopped(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "60"], cwd="/")
    try:
        (tmp_path / "postmaster.pid").write_text(f"{bystander.pid}\n")
        stop_server(tmp_path)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([], []), ([3], [(3, 3)]), ([5, 3, 4], [(3, 5)]), ([1, 2, 4, 7, 8], [(1, 2), (4, 4), (7, 8)])],
)
def test_runs_are_stretches_without_a_hole(numbers: list[int], expected: list[tuple[int, int]]) -> None:
    found = runs(WalSegment(Timeline(1), number) for number in numbers)
    assert [(first.number, last.number) for first, last in found] == expected
