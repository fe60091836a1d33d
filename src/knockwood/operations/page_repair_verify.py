"""After a page repair: the pages that it touched, their rows, and the indexes that may have suffered, asked again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from knockwood.errors import KnockwoodError
from knockwood.host import clock
from knockwood.integrity.check import Budget, Subject
from knockwood.integrity.relation_files import parse_path
from knockwood.model import Claim, Finding, Lsn, Verdict, worst
from knockwood.model.recovery import Plan
from knockwood.operations.cluster import Cluster
from knockwood.operations.page_repair_plan import MAPS, REINDEX, REPAIR, ROWS, pages_of
from knockwood.recover import pages_facts as facts
from knockwood.recover.indexes import verify_indexes
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_session import Session, session
from knockwood.recover.plan.pages import Procedure
from knockwood.repository.repository import Repository

_SHOWN: Final = 5


@dataclass(slots=True)
class _Touched:
    """What a plan does to one table: blocks by fork, and whether its indexes may have suffered.

    `beyond` are starts of records that the pages have to hold.
    """

    blocks: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    beyond: dict[int, Lsn] = field(default_factory=dict)
    indexes: bool = False


def verify_pages(cluster: Cluster, repository: Repository, plan: Plan) -> tuple[Claim, ...]:
    """Ask again: the mended pages on disk, their rows, and the indexes of tables of which a page could be read
    while it was wrong, against all rows.

    An index scan that meets a page which nobody can read ends with an error and changes nothing: of a table with
    only such pages no index is compared. Other pages of the tables are not read: the claims say so.
    """
    subject = cluster.subject(Budget(), repository=repository)
    claims: list[Claim] = []
    for (database, oid), touched in sorted(_touched(plan).items()):
        try:
            claims += _verified(subject, database, oid, touched)
        except KnockwoodError as error:
            claims.append(Claim(f"pages of relation {oid} in {database}", Verdict.NOT_CHECKED, str(error)))
    return tuple(claims)


def _touched(plan: Plan) -> dict[tuple[str, int], _Touched]:
    tables: dict[tuple[str, int], _Touched] = {}
    for step in plan.steps:
        if step.kind not in (REPAIR, ROWS, MAPS, REINDEX):
            continue
        words = step.arguments
        table = tables.setdefault((words["database"], words["oid"]), _Touched())
        if step.kind == MAPS:
            table.blocks[words["fork"]].update(words["blocks"])
        elif step.kind != REINDEX:
            table.blocks["main"].update(words["blocks"])
            table.beyond |= {int(block): Lsn.parse(lsn) for block, lsn in words.get("beyond", {}).items()}
        unread = words.get("procedure") in (Procedure.WRITE, Procedure.SAVE_BUFFER)
        table.indexes |= step.kind != MAPS and not (step.kind == REPAIR and unread)
    return tables


def _verified(subject: Subject, database: str, oid: int, touched: _Touched) -> list[Claim]:
    claims: list[Claim] = []
    with session(subject, database, ("amcheck",)) as tools:
        target = facts.target_of(tools.connection, database, oid)
        main = touched.blocks.pop("main", set())
        if main:
            count = facts.length(tools.connection, target)
            problems = _bad_on_disk(subject, target.path, main, count, touched.beyond)
            claims += [_claim_pages(target.name, main, problems), _claim_rows(tools, target, main)]
        for fork, blocks in sorted(touched.blocks.items()):
            if not blocks:  # the whole map was made anew: the check that found it says whether it holds
                continue
            problems = _bad_on_disk(subject, f"{target.path}_{fork}", blocks, max(blocks, default=0) + 1)
            claims.append(_claim_pages(f"the {fork} map of {target.name}", blocks, problems))
    if touched.indexes:
        indexes = verify_indexes(subject, database, oid)
        told = [f"{each.index.name}: {each.detail}" for each in indexes if each.verdict is not Verdict.HELD]
        verdict = worst(each.verdict for each in indexes) if indexes else Verdict.HELD
        claims.append(Claim(f"indexes of {target.name} against its rows", verdict, "; ".join(told[:_SHOWN])))
    return claims


def _claim_pages(name: str, blocks: Collection[int], problems: list[str]) -> Claim:
    covered = (
        f"{len(blocks)} mended pages on disk hold; the others were not read again (knockwood check does)"
    )
    told = "; ".join(problems[:_SHOWN]) or covered
    return Claim(f"mended pages of {name}", Verdict.BROKEN if problems else Verdict.HELD, told)


def _claim_rows(tools: Session, target: Target, blocks: Collection[int]) -> Claim:
    found = tools.verify_heap(target, blocks) if target.kind in ("r", "t", "m") else None
    verdict = Verdict.NOT_CHECKED if found is None else Verdict.BROKEN if found else Verdict.HELD
    told = "amcheck cannot look at them here" if found is None else "; ".join(found[:_SHOWN])
    return Claim(f"rows on the mended pages of {target.name}", verdict, told)


def _bad_on_disk(
    subject: Subject, path: str, blocks: Collection[int], count: int, beyond: Mapping[int, Lsn] | None = None
) -> list[str]:
    problems = []
    for block in sorted(blocks):
        seen = facts.on_disk(facts.read_page(subject, path, block), block, count)
        if seen.state not in ("good", "zero"):
            # Half-written pages settle within a moment; a page not written yet is no fault.
            clock.sleep(0.05)
            seen = facts.on_disk(facts.read_page(subject, path, block), block, count)
        if seen.state in ("bad", "unreadable"):
            problems.append(f"block {block}: {seen.reason}")
        lsn = (beyond or {}).get(block)
        if lsn is not None and seen.state in ("good", "zero") and (seen.lsn is None or seen.lsn <= lsn):
            problems.append(f"block {block}: it lacks the record at {lsn}")
    return problems


def asks_again(plan: Plan, finding: Finding) -> bool:
    """Whether `verify_pages` asks again what a finding of page_checksums says: its check, which reads every
    page of the cluster, is then not needed."""
    place = finding.location
    parsed = parse_path(place.file or "")
    if finding.check != "page_checksums" or parsed is None:
        return False
    pages = {
        (step.arguments["path"], fork, block)
        for step in plan.steps
        if step.kind in (REPAIR, MAPS)
        for fork in [step.arguments.get("fork", "main")]
        for block in step.arguments["blocks"]
    }
    wanted = {(parsed.relation_path, parsed.fork, ref.block) for ref in pages_of(finding)}
    return bool(wanted) and wanted <= pages
