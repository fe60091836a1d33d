"""What the repairers that look at the damage itself offer: pages, rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from knockwood.errors import KnockwoodError
from knockwood.integrity.relation_files import parse_path
from knockwood.model import Finding
from knockwood.model.recovery import Alternative, Plan, Step
from knockwood.operations.cluster import Cluster
from knockwood.operations.page_repair import MAPS, REPAIR, ROWS, PageRef, pages_of, plan_pages
from knockwood.recover.plan.damage import Kind, classify
from knockwood.recover.plan.offer import Offer, Rank, Turn, key
from knockwood.recover.plan.situation import Situation
from knockwood.repository.repository import Repository

SOUND = (
    "looked at again, its page on disk, in the server's buffers and in the WAL agree, or its file is gone: there"
    " is nothing to mend page by page"
)
# What these say of a page is no longer so where disk, buffers and WAL agree; others speak of the rows on it.
_OF_THE_PAGE = ("page_checksums", "lost_writes")
_NO_PAGE = "it names no page: run page_checksums, lost_writes and amcheck_heap, whose findings do"


def page_offers(
    cluster: Cluster, repository: Repository | None, findings: Sequence[Finding], known: Situation
) -> tuple[list[Offer], tuple[Alternative, ...]]:
    """Repairs of pages and maps, and what could be done instead."""
    wanted = [f for f in findings if classify(f, known).kind in (Kind.PAGE, Kind.FILE, Kind.MAP)]
    if not wanted or known.server_up is not True or known.in_recovery is not False:
        return [], ()
    # The page that a toast finding names is that of the row, which is sound.
    named = [f for f in wanted if f.check != "toast" and (pages_of(f) or _of_map(f) or _gone_map(f))]
    nameless = [f for f in wanted if f not in named]
    offers = [_refused(nameless, _NO_PAGE)] if nameless else []
    if known.superuser is not True:
        return [*offers, _refused(named, "page repair needs a superuser: say one with --role")], ()
    if repository is None:
        return [*offers, _refused(named, "there is no repository to take good pages from")], ()
    if not named:
        return offers, ()
    try:
        plan = plan_pages(
            cluster,
            repository,
            [PageRef(str(f.location.file), 0) if _gone_map(f) else f for f in named],
        )
    except KnockwoodError as error:
        return [*offers, _refused(named, str(error))], ()
    return [*offers, *offers_of(plan, named)], plan.alternatives


def row_offers(
    cluster: Cluster, findings: Sequence[Finding], known: Situation
) -> tuple[list[Offer], tuple[Alternative, ...]]:
    """Taking back the transactions that the operator named, for rows that are wrong.

    That it heals them is tried, not known: the revert holds the invariants before it commits, and the checks
    are asked again afterwards.
    """
    wrong = [finding for finding in findings if classify(finding, known).kind is Kind.ROWS]
    if not wrong or not known.xids:
        return [], ()
    title = f"take back {', '.join(map(str, known.xids))}, and keep what came later"
    heals = frozenset(key(finding) for finding in wrong)
    from knockwood.operations import revert

    try:
        proposal = revert.propose(cluster, revert.Wish(known.xids))
    except KnockwoodError as error:
        return [Offer(Rank.ROW_REVERT, Turn.ROWS, title, heals, refused=str(error))], ()
    plan = proposal.plan
    refused = None
    if not plan.steps:
        refused = "; ".join(plan.refused) or "every row is as it was before them"
    offer = Offer(Rank.ROW_REVERT, Turn.ROWS, title, heals, plan.steps, plan.expected_loss, refused=refused)
    return [offer], plan.alternatives


def _of_map(finding: Finding) -> bool:
    return finding.check == "visibility_map" and finding.location.file is not None


def _gone_map(finding: Finding) -> bool:
    """A visibility map of which the whole file is missing or cut."""
    parsed = parse_path(finding.location.file or "")
    return finding.check == "segment_files" and parsed is not None and parsed.fork == "vm"


def offers_of(plan: Plan, findings: Iterable[Finding]) -> list[Offer]:
    """One offer for all that the steps of a page plan cover; the others are refused with the reasons given."""
    healed = {key(finding) for finding in plan.heals}
    covered = [each for each in findings if any(_covers(plan.steps, each, key(each) in healed))]
    offers = []
    if covered:
        offers.append(
            Offer(
                Rank.PAGE_REPAIR,
                Turn.PAGES,
                plan.purpose,
                frozenset(key(finding) for finding in covered),
                plan.steps,
                plan.expected_loss,
            )
        )
    for finding in findings:
        if finding in covered:
            continue
        sound = key(finding) in healed
        told = "; ".join(line for line in plan.refused if _about(line, finding))
        offer = _refused([finding], SOUND if sound else told or "; ".join(plan.refused) or SOUND)
        offers.append(replace(offer, gone=sound and finding.check in _OF_THE_PAGE))
    return offers


def _about(line: str, finding: Finding) -> bool:
    place = finding.location
    return any(name and name in line for name in (place.relation, place.file, place.index))


def _covers(steps: Iterable[Step], finding: Finding, healed: bool) -> list[bool]:
    """Whether steps write every page, or make the map anew, that the finding names; `healed`: what they do not
    write of it is sound."""
    place = finding.location
    parsed = parse_path(place.file or "")
    if parsed is None:
        return []
    path = parsed.relation_path
    if _of_map(finding) or parsed.fork in ("vm", "fsm"):
        return [
            s.kind == MAPS and s.arguments["path"] == path and s.arguments["fork"] == _fork(finding)
            for s in steps
        ]
    blocks: set[int] = set()
    for step in steps:
        if step.arguments.get("path") == path and step.kind in (REPAIR, ROWS):
            blocks.update(step.arguments["blocks"])
    wanted = {page.block for page in pages_of(finding)}
    return [bool(wanted & blocks) and (healed or wanted <= blocks)]


def _fork(finding: Finding) -> str:
    parsed = parse_path(finding.location.file or "")
    return parsed.fork if parsed and parsed.fork != "main" else "vm"


def _refused(findings: Sequence[Finding], reason: str) -> Offer:
    return Offer(
        Rank.PAGE_REPAIR,
        Turn.PAGES,
        "mend damaged pages",
        frozenset(key(finding) for finding in findings),
        refused=reason,
    )
