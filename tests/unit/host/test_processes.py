"""Processes: told apart, ended, and never outliving us."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from knockwood.errors import HostError, ProgramFailedError
from knockwood.host import processes
from knockwood.host.processes import ProcessIdentity


def test_our_own_process_lives_and_an_older_one_of_the_same_pid_does_not() -> None:
    own = ProcessIdentity.own()
    assert own.alive()
    assert not ProcessIdentity(own.pid, own.started - 1).alive()


def test_a_zombie_does_not_live() -> None:
    child = processes.start([sys.executable, "-c", "pass"])
    identity = ProcessIdentity.of(child.pid)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not identity.alive()
    child.wait()
    with pytest.raises(HostError, match="no such process"):
        ProcessIdentity.of(child.pid)


def test_a_failure_shows_the_last_lines() -> None:
    with pytest.raises(ProgramFailedError, match="status 7: third / fourth / fifth"):
        processes.run(["/bin/sh", "-c", "printf 'first\\nsecond\\nthird\\nfourth\\nfifth' >&2; exit 7"])


def test_a_program_that_hangs_is_ended() -> None:
    with pytest.raises(ProgramFailedError, match="did not end"):
        processes.run(["/bin/sleep", "60"], timeout=0.1)


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(HostError, match="cannot start"):
        processes.run(["/no/such/program"])


def test_children_die_when_their_parent_is_killed() -> None:
    script = (
        "import time\n"
        "from knockwood.host import processes\n"
        "print(processes.start(['/bin/sleep', '600']).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = ProcessIdentity.of(int(parent.stdout.readline()))
        assert child.alive()
        parent.send_signal(signal.SIGKILL)
    for _ in range(500):
        if not child.alive():
            break
        time.sleep(0.01)
    assert not child.alive()
