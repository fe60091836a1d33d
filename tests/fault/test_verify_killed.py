"""What a killed verification leaves: nothing in the repository, and files that the next one removes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from knockwood.repository.walk import workplace

_HOLD = """
import sys, time
from knockwood.repository.walk import workplace
with workplace() as folder:
    (folder / "000000010000000000000001").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(60)
"""


def test_the_folder_of_a_killed_walk_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLD], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert child.stdout is not None
        left = Path(child.stdout.readline().strip())
        assert left.is_dir()
        with workplace() as own:
            assert left.is_dir()  # its process lives
            assert own.is_dir()
        assert not own.exists()
        child.send_signal(signal.SIGKILL)
        child.wait()
        with workplace():
            assert not left.exists()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]
