"""Ending a repair that was killed: what the dead run left goes too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from knockwood.clone.registry import Registry
from knockwood.errors import KnockwoodError
from knockwood.model.recovery import Plan, Step
from knockwood.operations.cluster import Cluster
from knockwood.operations.recover import resume
from knockwood.recover.journal import Journal, new_folder
from knockwood.settings import ClusterSettings

_DIE = """
import os, sys
from pathlib import Path
from knockwood.clone.registry import Registry, sign
entry = Registry(Path(sys.argv[1])).enter("page repair")
entry.record.root.mkdir()
sign(entry.record)
os._exit(9)
"""


@pytest.mark.parametrize("back", [False, True])
def test_the_clones_of_the_dead_run_are_removed_though_none_is_made(tmp_path: Path, back: bool) -> None:
    state = tmp_path / "state"
    plan = Plan(
        "shop",
        "raise a sequence",
        (Step("setval", "raise it", {"database": "shop", "sequence": "s", "value": 5}),),
    )
    journal = Journal.create(new_folder(state, plan), plan)
    journal.append("begun", plan=plan.id, holder={})
    journal.close()
    subprocess.run([sys.executable, "-c", _DIE, str(state)], check=False)
    [record] = Registry(state).records()
    settings = ClusterSettings(dsn=f"host={tmp_path}", repository=str(tmp_path / "none"))
    try:
        resume(Cluster("shop", settings, state), back=back)
    except KnockwoodError:
        pass  # there is neither a server nor a repository
    assert Registry(state).records() == []
    assert not record.root.exists()
