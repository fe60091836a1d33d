"""Processes that others started."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from knockwood.host import others
from knockwood.host.others import Found
from knockwood.host.processes import ProcessIdentity


def test_a_process_that_was_found_is_handled_like_a_child() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        found = Found(ProcessIdentity.of(child.pid))
        assert found.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            found.wait(0.05)
        # Another one of the same pid is left alone.
        other = Found(ProcessIdentity(child.pid, found.identity.started - 5))
        other.kill()
        assert other.wait() == 0
        assert child.poll() is None
        found.send_signal(signal.SIGTERM)
        assert found.wait(10) == 0
        assert found.poll() == 0
        found.kill()
        assert child.wait() == -signal.SIGTERM


def test_they_are_found_by_folder_and_name_and_parent(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path) as child:
        [found] = others.working_in(tmp_path)
        assert found.pid == child.pid
        assert found.works_in(tmp_path)
        assert not found.works_in(tmp_path.parent)
        assert found.parent == os.getpid()
        assert found.title == "sleep 60"
        assert others.working_in(tmp_path, {"postgres"}) == []
        assert [each.pid for each in others.working_in(tmp_path, {"sleep"})] == [child.pid]
        assert child.pid in {each.pid for each in others.children_of(os.getpid())}
        assert others.wait_for([found], 0.05) == [found]
        found.kill()
        # Not reaped yet: a zombie has ended all the same.
        assert others.wait_for([found], 10) == []
        assert others.working_in(tmp_path) == []
        child.wait()
        assert (found.parent, found.title, found.works_in(tmp_path)) == (None, "", False)
        assert others.children_of(child.pid) == []
