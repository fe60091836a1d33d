from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from knockwood.repository.spool import Spool

if TYPE_CHECKING:
    from pathlib import Path


def test_a_wish_is_seen_until_it_is_taken_back_or_old(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    assert not spool.hurried()
    spool.hurry()
    assert spool.hurried()
    assert spool.files() == []
    past = time.time() - 10
    os.utime(tmp_path / "hurry", (past, past))
    assert not spool.hurried()
    spool.hurry()
    assert spool.hurried()
    spool.calm()
    spool.calm()
    assert not spool.hurried()


def test_where_nobody_receives_nothing_happens(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "gone", 1 << 20)
    spool.hurry()
    assert not spool.hurried()
    assert not spool.folder.exists()
