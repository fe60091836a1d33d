"""Steps of the scenarios that mend a running cluster: plan, carry out, prove, and ask the witness."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from knockwood.drill.sandbox import Sandbox
from knockwood.drill.scenarios.base import Scenario, gate, missing
from knockwood.drill.scorecard import Gate, Scorecard, Seconds
from knockwood.drill.story import Kind, Story
from knockwood.drill.witness import altered
from knockwood.drill.workload import totals_present
from knockwood.errors import PostgresError
from knockwood.host import clock
from knockwood.integrity.run import Report
from knockwood.model import Finding, Proof, Recovery, Verdict
from knockwood.model.recovery import Outcome
from knockwood.operations import recover, revert
from knockwood.operations.proving import prove_cluster
from knockwood.repository.targets import Latest


@dataclass(frozen=True, slots=True)
class Mended:
    """What came of a plan: its recovery, after those of plans that the server outran; none where nothing was safe."""

    refused: tuple[str, ...]
    recoveries: tuple[Recovery, ...] = ()
    verdict: Verdict = Verdict.BROKEN


def repair(box: Sandbox, story: Story, findings: Iterable[Finding]) -> Mended:
    """Have `knockwood recover` plan and carry out the repair of what was found, the shop running throughout."""
    proposal = recover.propose(box.cluster, findings=findings)
    plan = proposal.plan
    for reason in plan.refused:
        story.say(Kind.FAILED, f"refused: {reason}")
    if not plan.steps:
        return Mended(plan.refused)
    loss = "nothing" if plan.expected_loss.nothing else plan.expected_loss.detail
    story.say(Kind.FOUND, f"plan {plan.id}: {len(plan.steps)} steps, to be lost: {loss}")
    for step in plan.steps[:6]:
        story.say(Kind.FOUND, f"{step.title} (locks {step.locks})")
    done = recover.carry_out(box.cluster, proposal)
    for each in done.earlier:
        left = next(result for result in each.recovery.results if result.outcome is Outcome.REFUSED)
        story.say(Kind.FOUND, f"planned anew, as the shop went on meanwhile: {left.detail}")
    recoveries = (*(each.recovery for each in done.earlier), done.recovery)
    return _told(story, Mended(plan.refused, recoveries, done.verdict))


def blocked(recoveries: Sequence[Recovery]) -> float | None:
    """Seconds that writers were kept waiting, all steps together; None where nothing was done."""
    waits = [result.blocked_seconds for recovery in recoveries for result in recovery.results]
    return sum(waits) if recoveries else None


def _told(story: Story, mended: Mended) -> Mended:
    """Say what each step did, and how long writers waited."""
    *_, last = mended.recoveries
    for recovery in mended.recoveries:
        for result in recovery.results:
            if result.outcome is Outcome.REFUSED and recovery is not last:
                continue
            story.say(
                Kind.DONE if last.complete else Kind.FAILED,
                f"{result.title}: {str(result.outcome).replace('_', ' ')} in {result.seconds:.2f} s,"
                f" writers waited {result.blocked_seconds:.2f} s"
                + ("" if last.complete else f": {result.detail}"),
            )
    story.say(
        Kind.PROVED if mended.verdict is Verdict.HELD else Kind.FAILED,
        f"asked again afterwards: {mended.verdict}",
    )
    return mended


def prove_live(box: Sandbox, story: Story) -> Proof:
    """Restore a backup beside, and compare every table with production at one LSN, writers going on."""
    proof = prove_cluster(box.cluster, backup=None, target=Latest())
    held = sum(claim.verdict is Verdict.HELD for claim in proof.claims)
    story.say(
        Kind.PROVED if proof.verdict is Verdict.HELD else Kind.FAILED,
        f"a clone restored to {proof.reached_lsn} equals production, table by table:"
        f" {held} of {len(proof.claims)} claims held",
    )
    for claim in proof.claims:
        if claim.verdict is not Verdict.HELD:
            story.say(Kind.FAILED, f"{claim.name}: {claim.verdict}: {claim.detail}"[:300])
    return proof


@dataclass(frozen=True, slots=True)
class Kept:
    """What the running shop holds of what its customers were promised; all of it is lost where it cannot be read."""

    promised: int
    lost: int
    changed: int = 0
    unreadable: str = ""

    @property
    def all(self) -> bool:
        return self.lost == 0 and self.changed == 0 and not self.unreadable

    def __str__(self) -> str:
        return self.unreadable or f"{self.lost + self.changed} of {self.promised}"


def ask_witness(box: Sandbox, story: Story) -> Kept:
    """Stop the clients and look for every promise in the running database: rows, and the totals in them."""
    box.workload.stop()
    promises = box.witness.promises()
    doubtful = frozenset(entry.token for entry in box.witness.notes("doubt"))
    try:
        wrong = altered(promises, totals_present(box.dsn), doubtful)
        kept = Kept(len(promises), missing(promises, box.dsn), len(wrong))
    except PostgresError as error:
        kept = Kept(len(promises), len(promises), unreadable=f"production cannot be read: {error}")
    story.say(
        Kind.PROVED if kept.all else Kind.FAILED,
        kept.unreadable
        or f"the witness: {kept.promised:,} commits promised to clients, {kept.lost} missing in production,"
        f" {kept.changed} with another total",
    )
    counters = box.workload.counters
    story.say(
        Kind.FOUND,
        f"the application: {counters.failed} failed requests, longest stall {counters.longest_stall:.2f} s",
    )
    return kept


def _live_gates(mended: Mended, kept: Kept, proof: Proof) -> tuple[Gate, ...]:
    """The gates of a repair in place."""
    complete = bool(mended.recoveries) and mended.verdict is Verdict.HELD
    told = str(mended.verdict) if mended.recoveries else "; ".join(mended.refused) or "nothing done"
    return (
        gate("repaired in place", complete, told),
        gate("no acknowledged commit lost", kept.all, str(kept)),
        gate("production proved", proof.verdict is Verdict.HELD, _why(proof)),
    )


def _why(proof: Proof) -> str:
    """The verdict, and the claims that did not hold."""
    doubts = (f"{claim.name}: {claim.detail}" for claim in proof.claims if claim.verdict is not Verdict.HELD)
    return "; ".join((str(proof.verdict), *doubts))[:1000]


@dataclass(frozen=True, slots=True)
class Played:
    """What a scenario of a repair in place came to; `gates` are its own, beside those of every such repair."""

    healthy: Report
    report: Report
    cause_first: bool
    gates: tuple[Gate, ...]
    done: Mended


def finish(
    box: Sandbox, story: Story, scenario: Scenario, seed: int, struck: float, played: Played, seconds: Seconds
) -> Scorecard:
    """Prove production, ask the witness, and write the scorecard; `seconds` are known up to the repair's end."""
    proof = prove_live(box, story)
    verified = clock.monotonic() - struck
    kept = ask_witness(box, story)
    later = sum(entry.at > struck for entry in box.witness.promises())
    counters = box.workload.counters
    silent = gate(
        "silent while healthy",
        not played.healthy.findings,
        f"{len(played.healthy.findings)} findings before the fault",
    )
    return Scorecard(
        scenario=scenario.name,
        title=scenario.title,
        seed=seed,
        seconds=replace(seconds, verify=verified),
        cause_first=played.cause_first,
        acknowledged_commits=kept.promised,
        good_transactions_lost=kept.lost + kept.changed,
        later_work_kept=later if kept.all else 0,
        failed_requests=counters.failed,
        longest_stall=counters.longest_stall,
        findings=tuple(finding.summary for finding in played.report.findings),
        gates=(silent, *played.gates, *_live_gates(played.done, kept, proof)),
        writers_blocked=blocked(played.done.recoveries),
    )


def take_back(box: Sandbox, story: Story, xids: tuple[int, ...]) -> Mended:
    """Have `knockwood revert` plan and carry out the revert of transactions, keeping what came after them."""
    proposal = revert.propose(box.cluster, revert.Wish(xids))
    for reason in proposal.plan.refused:
        story.say(Kind.FAILED, f"refused: {reason}")
    for conflict in proposal.conflicts[:3]:
        story.say(Kind.FAILED, f"conflict: {conflict.as_json()}")
    if not proposal.plan.steps:
        return Mended(proposal.plan.refused)
    kept = sum(known.dependent.kept for known in proposal.dependents)
    for step in proposal.plan.steps:
        story.say(Kind.FOUND, f"plan {proposal.plan.id}: {step.title} (locks {step.locks})")
    story.say(Kind.FOUND, f"{kept} later transactions wrote the same rows; their work stays")
    recovery = revert.execute(box.cluster, proposal).recovery
    return _told(story, Mended(proposal.plan.refused, (recovery,), recovery.verdict))
