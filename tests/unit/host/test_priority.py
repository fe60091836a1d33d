"""The lowest priority, in a process of its own: there is no way back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_CODE = """
import os, pathlib
from knockwood.host.priority import wait_behind_everybody as wait
wait()
wait()
group = pathlib.Path("/proc/self/autogroup")
said = group.read_text().split() if group.exists() else []
print(os.nice(0), said[-1] if said else None)  # empty for who is in no group
"""


def _said(own_session: bool) -> list[str]:
    command = [sys.executable, "-c", _CODE]
    done = subprocess.run(command, check=True, capture_output=True, text=True, start_new_session=own_session)
    return done.stdout.split()


def test_the_lowest_priority_is_taken_and_may_be_taken_twice() -> None:
    nice, group = _said(own_session=True)
    assert nice == "19"
    assert group in ("19", "None")


def test_the_session_of_others_keeps_its_priority() -> None:
    group = Path("/proc/self/autogroup")
    before = group.read_text() if group.exists() else None
    assert _said(own_session=False)[0] == "19"
    assert (group.read_text() if group.exists() else None) == before
