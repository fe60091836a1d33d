"""Programs that the server's account cannot reach are copied once, and what a killed copy left goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from knockwood.host.processes import ProcessIdentity
from knockwood.postgres import binaries


def _package(folder: Path) -> Path:
    package = folder / "embedded"
    (package / "pginstall" / "bin").mkdir(parents=True)
    (package / "pginstall" / "bin" / "postgres").write_text("a program")
    return package


def _dead() -> ProcessIdentity:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        return ProcessIdentity.of(child.pid)


def test_what_a_killed_copy_left_is_removed_by_the_next(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    dead, own = _dead(), ProcessIdentity.own()
    left = shelf / f".copy-{dead.pid}-{dead.started:.2f}-abc"
    at_work = shelf / f".copy-{own.pid}-{own.started:.2f}-abc"
    old, young = shelf / ".copy-old12345", shelf / ".copy-young123"
    for folder in (left, at_work, old, young):
        (folder / "embedded").mkdir(parents=True)
    os.utime(old, (1, 1))
    binaries._copy_package(_package(tmp_path), shelf / "18.6-1")
    assert (shelf / "18.6-1" / "embedded" / "pginstall" / "bin" / "postgres").read_text() == "a program"
    assert sorted(path.name for path in shelf.iterdir()) == sorted([at_work.name, young.name, "18.6-1"])


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with pytest.raises(OSError, match="pginstall"):
        binaries._copy_package(tmp_path / "nothing", shelf / "18.6-1")
    assert list(shelf.iterdir()) == []


def test_a_copy_made_by_another_process_meanwhile_is_taken(tmp_path: Path) -> None:
    target = tmp_path / "shelf" / "18.6-1"
    (target / "embedded").mkdir(parents=True)
    binaries._copy_package(_package(tmp_path), target)
    assert [path.name for path in target.parent.iterdir()] == ["18.6-1"]
