"""What is too old: backups by the schedule of the settings, proofs by how long they count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from knockwood.host import clock
from knockwood.integrity.check import NotChecked, Outcome, Role, Schedule, Subject, Weight
from knockwood.integrity.databases import about_the_server
from knockwood.model import Finding, Location, Severity, Verdict
from knockwood.repository.backups.model import Backup
from knockwood.repository.repository import Repository

PROOFS: Final = "proofs/"
_LEAST_GRACE: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Stale:
    """Something that is missing, too old or broken, in words, and what shows it."""

    summary: str
    evidence: Mapping[str, Any]


def latest(interval: timedelta) -> timedelta:
    """How old the newest of what is made every `interval` may be: a seventh later, an hour at least."""
    return interval + max(interval / 7, _LEAST_GRACE)


def stale_backups(backups: Sequence[Backup], schedule: Schedule, now: datetime) -> Iterator[Stale]:
    """The backups that the schedule wants and that are not there; `backups` oldest first.

    Without data checksums nobody can say more than 'not checked': such a backup still counts.
    """
    usable = [backup for backup in backups if backup.health.verdict is not Verdict.BROKEN]
    if not usable:
        yield Stale("there is no usable backup", {"backups": len(backups)})
    full = [backup for backup in usable if backup.kind == "full"]
    wanted = [("healthy full backup", full, schedule.full)]
    if schedule.incremental is not None and schedule.incremental < schedule.full:
        wanted.append(("healthy backup", usable, schedule.incremental))
    for what, those, interval in wanted:
        # By the WAL, not by a clock that may have been wrong.
        newest = those[-1] if those else None
        if newest is None:
            continue
        if from_the_future(newest.finished_at, now):
            yield Stale(
                f"the newest {what} says that it ended at {newest.finished_at.isoformat()}, which is yet to come:"
                " how old it is nobody knows",
                {"backup": newest.id},
            )
            continue
        age, limit = now - newest.finished_at, latest(interval)
        if age > limit:
            evidence = {"backup": newest.id, "age_seconds": int(age.total_seconds())}
            yield Stale(
                f"the newest {what} is {_shown(age)} old, the schedule allows {_shown(limit)}",
                evidence | {"limit_seconds": int(limit.total_seconds())},
            )
    for backup in backups[-1:]:
        if backup.health.verdict is Verdict.BROKEN:
            count = backup.health.bad_page_count
            yield Stale(f"the newest backup {backup.id} holds {count} damaged pages", {"backup": backup.id})


def _shown(age: timedelta) -> str:
    hours = age.seconds // 3600
    return f"{age.days} days and {hours} hours" if age.days else f"{hours} h {age.seconds % 3600 // 60} min"


def from_the_future(moment: datetime, now: datetime) -> bool:
    """Whether somebody's clock was wrong, there or here, by more than clocks of a fleet differ."""
    return moment - now > _LEAST_GRACE


def newest_proof(repository: Repository) -> dict[str, Any] | None:
    """The newest stored proof, as JSON; None if there is none. One from the future only where there is no other."""
    names = [info.name for info in repository.storage.list(PROOFS) if info.name.endswith(".json")]
    last: dict[str, Any] | None = None
    for name in sorted(names, reverse=True):
        proof: dict[str, Any] = repository.get_json(name)
        last = last or proof
        if not from_the_future(_taken(proof), clock.now()):
            return proof
    return last


def _taken(proof: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(proof.get("taken_at") or proof["valid_until"])


def stale_proof(proof: Mapping[str, Any], schedule: Schedule, now: datetime) -> Iterator[Stale]:
    """What speaks against the newest proof. It counts as long as it said, and as the settings say now."""
    evidence = {key: proof.get(key) for key in ("id", "verdict", "valid_until", "backup")}
    if proof.get("verdict") == "broken":
        yield Stale(f"the newest proof {proof['id']} found something broken", evidence)
    if "taken_at" in proof and from_the_future(_taken(proof), now):
        yield Stale(
            f"the newest proof {proof['id']} says that it was taken at {proof['taken_at']}, which is yet to come",
            evidence,
        )
    until = datetime.fromisoformat(proof["valid_until"])
    if "taken_at" in proof:
        until = min(until, datetime.fromisoformat(proof["taken_at"]) + schedule.proof)
    if until < now:
        yield Stale(f"the newest proof {proof['id']} was valid until {until.isoformat()}", evidence)


@dataclass(frozen=True, slots=True)
class AgeCheck:
    """A check that asks the repository alone; a clone cannot answer it."""

    name: str
    title: str
    meaning: str
    remedy: str
    look: Callable[[Repository, Schedule, datetime], Iterator[Stale]]
    weight: Weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        if subject.role is Role.CLONE:
            yield from about_the_server(subject, self.name)
            return
        if subject.repository is None:
            yield NotChecked(self.name, "no repository is set for this cluster")
            return
        for stale in self.look(subject.repository, subject.schedule, clock.now()):
            yield Finding(
                check=self.name,
                severity=Severity.HIGH,
                location=Location(cluster=subject.cluster),
                summary=stale.summary,
                meaning=self.meaning,
                remedy=self.remedy,
                evidence=dict(stale.evidence),
            )
