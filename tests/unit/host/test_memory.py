"""Large buffers are used again."""

from __future__ import annotations

import subprocess
import sys

_FAULTS = """
import resource
from knockwood.host import memory
if {keep}:
    memory.keep_large_buffers()
bytes(4 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    first, second = bytearray(b"x" * (4 << 20)), bytearray(b"y" * (4 << 20))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keep: bool) -> int:
    return int(subprocess.check_output([sys.executable, "-c", _FAULTS.format(keep=keep)]))


def test_buffers_come_back_without_fresh_pages() -> None:
    # The first round makes them; without it, glibc's own threshold would grow only slowly.
    assert faults(keep=True) <= faults(keep=False)
    assert faults(keep=True) < 20 * 2 * (4 << 20) // 4096 // 2
