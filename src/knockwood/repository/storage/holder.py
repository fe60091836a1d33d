"""Which process holds a lease or writes an object, told so that others can see whether it still lives."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_mine: set[str] = set()
"""Tokens that this process works under now."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds something, and for what. `machine` tells boots and containers of one host name apart.

    `started` is in clock ticks since the boot, so that setting the clock does not change it.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: int | None
    purpose: str
    ttl: float

    @classmethod
    def own(cls, purpose: str, ttl: float) -> Holder:
        pid = os.getpid()
        token, host = secrets.token_hex(16), socket.gethostname()
        return cls(token, host, _machine(), pid, _process(pid)[0], purpose, ttl)

    def __str__(self) -> str:
        return f"{self.purpose}, pid {self.pid} on {self.host}"

    def to_json(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "host": self.host,
            "machine": self.machine,
            "pid": self.pid,
            "process_started": self.started,
            "purpose": self.purpose,
            "ttl_seconds": self.ttl,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Holder:
        return cls(
            str(value["token"]),
            str(value["host"]),
            str(value["machine"]),
            int(value["pid"]),
            value["process_started"],
            str(value["purpose"]),
            float(value["ttl_seconds"]),
        )

    def begin(self) -> None:
        """This process now works under the token."""
        _mine.add(self.token)

    def end(self) -> None:
        """This process works under the token no more."""
        _mine.discard(self.token)

    def here(self) -> bool:
        """Whether the holder was a process of this boot of this machine."""
        return self.machine == _machine()

    def known_dead(self) -> bool:
        """Whether this holder certainly does no more work: its process was on this machine and is gone."""
        if not self.here():
            return False
        if self.pid == os.getpid():
            return self.token not in _mine
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            # Another account's process, which may be hidden from us.
            pass
        started, state = _process(self.pid)
        return state in ("Z", "X") or (None not in (started, self.started) and started != self.started)


@cache
def _machine() -> str:
    # A pid means something only in one boot and one pid namespace: containers share host names.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        # Like no other: then only time tells that a holder is dead.
        return secrets.token_hex(16)


def _process(pid: int) -> tuple[int | None, str]:
    """When a process started (clock ticks since the boot) and its state letter, as far as we may know."""
    try:
        # The name, in parentheses, may hold anything: what follows the last one is fixed.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[19]), fields[0]
    except (OSError, ValueError, IndexError):
        return None, "?"
