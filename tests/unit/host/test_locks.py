"""Locks between processes, also those of the dead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from knockwood.errors import LockHeldError
from knockwood.host.locks import file_lock

_HOLD = """
import os, sys, time
from pathlib import Path
from knockwood.host.locks import file_lock
with file_lock(Path(sys.argv[1]), "test"):
    child = os.fork() if sys.argv[2] == "fork" else None
    if child == 0:
        time.sleep(1)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(path: Path, how: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", _HOLD, path, how], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    return child


def test_a_lock_of_the_living_is_refused_at_once(tmp_path: Path) -> None:
    with _holder(tmp_path / "lock", "alone") as child:
        with pytest.raises(LockHeldError, match=f"another test is at work \\(pid {child.pid}\\)"):
            file_lock(tmp_path / "lock", "test").__enter__()
        child.kill()


def test_what_a_killed_holder_forked_is_waited_for(tmp_path: Path) -> None:
    with _holder(tmp_path / "lock", "fork") as child:
        child.kill()
        # Ended, and not reaped: a zombie is dead too.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with file_lock(tmp_path / "lock", "test"):
            assert (tmp_path / "lock").read_text() != str(child.pid)


def test_a_holder_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with _holder(tmp_path / "lock", "alone") as child:
        (tmp_path / "lock").write_text("not a number")
        with pytest.raises(LockHeldError):
            file_lock(tmp_path / "lock", "test").__enter__()
        child.kill()
