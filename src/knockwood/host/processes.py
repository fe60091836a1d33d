"""Child processes: started so that none outlives us, run to their end with their output kept."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from knockwood.errors import HostError, ProgramFailedError
from knockwood.host.privileges import Account

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended and what it printed."""

    status: int
    out: str
    err: str


def _dies_with_us(parent: int, death_signal: int) -> Any:
    # PDEATHSIG fires when the *thread* that forked ends, so long-lived children are started from
    # long-lived threads. The parent may be gone before the call: then we end at once.
    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(125)

    return prepare


def start(
    command: Sequence[str | Path],
    *,
    account: Account | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = subprocess.DEVNULL,
    stderr: int | IO[bytes] | None = subprocess.DEVNULL,
    death_signal: int = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own that gets `death_signal` when we die, however we die."""
    identity: dict[str, Any] = {}
    if account is not None:
        identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        return subprocess.Popen(
            [str(word) for word in command],
            env=dict(env) if env is not None else None,
            # An account without rights on our current folder could not even start there.
            cwd=str(cwd) if cwd is not None else "/",
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_dies_with_us(os.getpid(), death_signal),
            **identity,
        )
    except OSError as error:
        raise HostError(f"cannot start: {error.strerror}".lower(), where=str(command[0])) from error


def run(
    command: Sequence[str | Path],
    *,
    account: Account | None = None,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,
    timeout: float | None = None,
    check: bool = True,
    errors: str = "replace",
) -> Completed:
    """Run a program to its end; raises ProgramFailedError with its last lines unless it succeeds.

    `errors` is what becomes of bytes in its output that are no UTF-8, as `bytes.decode` knows it.
    """
    child = start(
        command,
        account=account,
        env=env,
        stdin=subprocess.PIPE if input is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        death_signal=signal.SIGKILL,
    )
    try:
        out, err = child.communicate(input, timeout)
    except subprocess.TimeoutExpired as error:
        raise ProgramFailedError(f"did not end within {timeout:.0f} s", where=str(command[0])) from error
    finally:
        stop(child, grace=0)
        for pipe in (child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
    done = Completed(child.returncode, out.decode(errors=errors), err.decode(errors="replace"))
    if check and done.status != 0:
        last = " / ".join((done.err.strip() or done.out.strip()).splitlines()[-3:])
        raise ProgramFailedError(f"ended with status {done.status}: {last}", where=str(command[0]))
    return done


def stop(child: subprocess.Popen[bytes], grace: float = 10) -> int:
    """End a child (SIGTERM, then SIGKILL after `grace` seconds), reap it, and return its status."""
    if child.poll() is None and grace > 0:
        child.terminate()
        try:
            return child.wait(grace)
        except subprocess.TimeoutExpired:
            pass
    if child.poll() is None:
        child.kill()
    return child.wait()


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that can be told from a later one with the same pid.

    `started` is in seconds since the machine booted, so that setting the clock changes nothing.
    """

    pid: int
    started: float

    @classmethod
    def own(cls) -> ProcessIdentity:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        try:
            return cls(pid, _started(pid))
        except psutil.Error as error:
            raise HostError("no such process", where=f"pid {pid}") from error

    def alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        try:
            process = psutil.Process(self.pid)
            same = abs(_started(self.pid) - self.started) < 0.05
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def _started(pid: int) -> float:
    try:
        # The name in the second field may hold spaces and parentheses; field 22 is the start in ticks.
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError as error:
        raise psutil.NoSuchProcess(pid) from error
