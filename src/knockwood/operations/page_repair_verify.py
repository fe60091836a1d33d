"""After a page repair: the pages, rows and indexes of what was repaired, asked again."""

from __future__ import annotations

from knockwood.host import clock
from knockwood.integrity.check import Budget, Subject
from knockwood.model import Claim, Verdict, worst
from knockwood.model.recovery import Plan
from knockwood.operations.cluster import Cluster
from knockwood.operations.page_repair_plan import MAPS, REINDEX, REPAIR, ROWS
from knockwood.recover import pages_facts as facts
from knockwood.recover.indexes import verify_indexes
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_session import session
from knockwood.repository.repository import Repository


def verify_pages(cluster: Cluster, repository: Repository, plan: Plan) -> tuple[Claim, ...]:
    """Ask again: the pages on disk, the rows of the repaired relations, and their indexes against them.

    Reads the repaired relations whole, nothing else.
    """
    subject = cluster.subject(Budget(), repository=repository)
    claims: list[Claim] = []
    tables: set[tuple[str, int]] = set()
    for step in plan.steps:
        words = step.arguments
        if step.kind in (REPAIR, ROWS, MAPS, REINDEX):
            tables.add((words["database"], words["oid"]))
    for database, oid in sorted(tables):
        claims += _verified(subject, database, oid)
    return tuple(claims)


def _verified(subject: Subject, database: str, oid: int) -> list[Claim]:
    with session(subject, database, ("amcheck",)) as tools:
        target = facts.target_of(tools.connection, database, oid)
        count = facts.length(tools.connection, target)
        problems = _bad_on_disk(subject, target, count)
        found = tools.verify_heap(target, 0, count - 1) if count and target.kind in ("r", "t", "m") else []
    claims = [
        Claim(
            f"pages of {target.name}",
            Verdict.BROKEN if problems else Verdict.HELD,
            "; ".join(problems[:5]) or f"{count} pages on disk hold",
        ),
        Claim(
            f"rows of {target.name}",
            Verdict.NOT_CHECKED if found is None else Verdict.BROKEN if found else Verdict.HELD,
            "amcheck is not installed" if found is None else "; ".join(found[:5]),
        ),
    ]
    indexes = verify_indexes(subject, database, oid)
    told = [f"{each.index.name}: {each.detail}" for each in indexes if each.verdict is not Verdict.HELD]
    verdict = worst(each.verdict for each in indexes) if indexes else Verdict.HELD
    claims.append(Claim(f"indexes of {target.name} against its rows", verdict, "; ".join(told[:5])))
    return claims


def _bad_on_disk(subject: Subject, target: Target, count: int) -> list[str]:
    problems = []
    for block in range(count):
        seen = facts.on_disk(facts.read_page(subject, target.path, block), block, count)
        if seen.state not in ("good", "zero"):
            # Half-written pages settle within a moment; a page not written yet is no fault.
            clock.sleep(0.05)
            seen = facts.on_disk(facts.read_page(subject, target.path, block), block, count)
        if seen.state in ("bad", "unreadable"):
            problems.append(f"block {block}: {seen.reason}")
    return problems
