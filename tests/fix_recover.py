"""A repair from the command line that kills itself while it writes its journal."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

from fix_cli import CommandLine

_KILLING: Final = """
import os, signal, sys
from knockwood.cli.main import main
from knockwood.recover.journal import Journal

at, count, append = int(sys.argv[1]), 0, Journal.append

def counted():
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)

def killing(self, event, **values):
    counted()
    append(self, event, **values)
    counted()

Journal.append = killing
sys.exit(main(sys.argv[2:]))
"""


def killed(line: CommandLine, kill_at: int, *words: object) -> int:
    """Run a command as a process that is killed before or after a line of the journal, the n-th such moment.

    The exit status, negative when it was killed.
    """
    return subprocess.run(
        [sys.executable, "-c", _KILLING, str(kill_at), *map(str, words), "--json"],
        env=line._environment(None),
        cwd=line.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        check=False,
    ).returncode
