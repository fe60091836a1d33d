"""What a scenario is, and the steps that scenarios share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from knockwood.drill.sandbox import Sandbox
from knockwood.drill.scorecard import Gate, Scorecard
from knockwood.drill.story import Kind, Story
from knockwood.drill.witness import Promise, loss
from knockwood.drill.workload import tokens_present
from knockwood.host import clock
from knockwood.integrity.check import Budget
from knockwood.integrity.run import Report, run_checks
from knockwood.model import Finding
from knockwood.operations.protect import take
from knockwood.postgres.connection import ServerFacts, connect, server_facts

DETECTORS = ("page_checksums", "invariants")


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a drill is: seed orders, clients, and seconds of load before and after the fault."""

    orders: int = 60_000
    clients: int = 16
    warm_up: float = 4.0
    aftermath: float = 3.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of outage, made on purpose in a sandbox."""

    name: str
    title: str
    about: str
    play: Callable[[Story, Scale, int, Path | None], Scorecard]


def protect_under_load(box: Sandbox, story: Story, scale: Scale) -> Report:
    """Start the clients, take a full backup while they write, and check: nothing may be found yet."""
    version = server_facts_of(box.server.dsn()).version
    story.say(
        Kind.SETUP,
        f"a shop on PostgreSQL {version // 10000}.{version % 10000} with {scale.orders:,} orders;"
        f" {scale.clients} clients order and pay, a witness notes every commit they were promised",
    )
    box.workload.start()
    clock.sleep(scale.warm_up / 2)
    backup = take(box.cluster, box.repository)
    story.say(
        Kind.SETUP,
        f"full backup {backup.id}: {backup.raw_bytes / 1e6:.0f} MB stored as {backup.stored_bytes / 1e6:.0f} MB,"
        f" every page verified ({backup.health.verdict})",
    )
    clock.sleep(scale.warm_up / 2)
    report = run_checks(box.cluster.subject(Budget(), repository=box.repository), DETECTORS)
    story.say(Kind.SETUP, f"checks before the fault: {len(report.findings)} findings")
    return report


def watch(
    box: Sandbox, story: Story, since: float, limit: float = 60, names: tuple[str, ...] = DETECTORS
) -> tuple[Report, float]:
    """Check again and again until something is found; the report and the seconds it took."""
    while True:
        report = run_checks(box.cluster.subject(Budget(), repository=box.repository), names)
        took = clock.monotonic() - since
        if report.findings or took > limit:
            break
        clock.sleep(0.2)
    for finding in report.findings[:4]:
        place = finding.location.index or finding.location.relation or finding.location.key or ""
        block = f" block {finding.location.block}" if finding.location.block is not None else ""
        story.say(Kind.FOUND, f"{finding.check}: {place}{block}: {finding.summary}")
    if len(report.findings) > 4:
        story.say(Kind.FOUND, f"and {len(report.findings) - 4} more findings")
    for gap in report.not_checked[:4]:
        story.say(Kind.FOUND, f"{gap.check}: not checked: {gap.reason}")
    return report, took


def server_facts_of(dsn: str) -> ServerFacts:
    """What the server of a connection string is."""
    with connect(dsn) as connection:
        return server_facts(connection)


def missing(promises: Iterable[Promise], *dsns: str) -> int:
    """How many acknowledged transactions none of the databases holds."""
    left = tuple(promises)
    for dsn in dsns:
        left = loss(left, tokens_present(dsn)).missing
    return len(left)


def blocks_named(findings: Iterable[Finding], relation: str) -> set[int]:
    """The blocks of a relation that findings name."""
    return {
        finding.location.block
        for finding in findings
        if finding.location.block is not None
        and (finding.location.index or finding.location.relation or "").rpartition(".")[2] == relation
    }


def gate(name: str, passed: bool, detail: str) -> Gate:
    return Gate(name, passed, detail)
