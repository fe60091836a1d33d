"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil


def describe() -> str:
    """Processor, cores, memory and system in one line; no host's name."""
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory().total / (1 << 30)
    return ", ".join(
        (
            processor(),
            f"{cores} cores",
            f"{memory:.0f} GiB memory",
            system(),
            f"Python {platform.python_version()}",
        )
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def system() -> str:
    try:
        return str(platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()))
    except OSError:
        return platform.system()


def load() -> float:
    """How many processes wanted a core in the last minute; above the cores, measurements are disturbed."""
    return os.getloadavg()[0]
