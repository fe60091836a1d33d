"""Executes or resumes a page repair as a process of its own, which may kill itself at a point that is counted.

Words: JSON with dsn, repository, data_directory, programs, folder, pages (list of [path, block]), kill_at (0: never).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from knockwood.host import direct
from knockwood.operations.cluster import Cluster
from knockwood.operations.page_repair import PageRef, PageRepairs, plan_pages, verify_pages
from knockwood.recover import indexes, pages_facts, pages_write
from knockwood.recover.execute import execute, resume, unfinished
from knockwood.recover.journal import StepJournal
from knockwood.recover.pages_session import Session
from knockwood.settings import ClusterSettings
from knockwood.settings.schema import ProofSettings


class Killer:
    """Counts what is called, and kills the process before the call of a number."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    def step(self) -> bool:
        self.count += 1
        return self.count == self.at

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any, **more: Any) -> Any:
            if self.step():
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*words, **more)

        return counted

    def writing(self, path: Path, offset: int, data: bytes) -> None:
        """Kill before, in the middle of, or after the write of a page."""
        if self.step():
            os.kill(os.getpid(), signal.SIGKILL)
        if self.step():
            direct.write_block(path, offset, data[:4096])
            os.kill(os.getpid(), signal.SIGKILL)
        direct.write_block(path, offset, data)
        if self.step():
            os.kill(os.getpid(), signal.SIGKILL)


def patch(killer: Killer) -> None:
    pages_write.write_block = killer.writing
    pages_facts.flush_wal = killer.before(pages_facts.flush_wal)
    indexes.clear_leftovers = killer.before(indexes.clear_leftovers)
    for owner, name in (
        (StepJournal, "evidence"),
        (StepJournal, "note"),
        (Session, "lock"),
        (Session, "evict"),
        (Session, "verify_heap"),
    ):
        setattr(owner, name, killer.before(getattr(owner, name)))


def main() -> None:
    words = json.loads(sys.argv[1])
    folder = Path(words["folder"])
    settings = ClusterSettings(
        dsn=words["dsn"],
        repository=words["repository"],
        data_directory=Path(words["data_directory"]),
        programs=Path(words["programs"]),
        proof=ProofSettings(clones=folder),
    )
    cluster = Cluster("shop", settings, folder / "state")
    repository = cluster.repository()
    state = folder / "journal"
    killer = Killer(words["kill_at"])
    patch(killer)
    with PageRepairs(cluster, repository) as repairs:
        left = unfinished(state)
        if left:
            plan = left[-1].plan
            done = resume(
                left[-1].folder, repairs.handlers, verify=lambda: verify_pages(cluster, repository, plan)
            )
        else:
            plan = plan_pages(cluster, repository, [PageRef(path, block) for path, block in words["pages"]])
            if not plan.steps:
                print(json.dumps({"steps": 0, "refused": plan.refused}))
                return
            done = execute(
                plan,
                repairs.handlers,
                state,
                approve=plan.id,
                verify=lambda: verify_pages(cluster, repository, plan),
            )
    print(
        json.dumps(
            {"steps": len(plan.steps), "refused": plan.refused, "count": killer.count} | done.as_json()
        )
    )


if __name__ == "__main__":
    main()
