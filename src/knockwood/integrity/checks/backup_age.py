"""How old the newest backup is that can be relied on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from knockwood.host import clock
from knockwood.integrity.check import NotChecked, Outcome, Role, Subject, Weight
from knockwood.integrity.databases import about_the_server
from knockwood.model import Finding, Location, Severity, Verdict
from knockwood.repository.backups.listing import list_backups


@dataclass(frozen=True, slots=True)
class BackupAge:
    """There is a backup whose pages were all whole, no older than `limit`."""

    limit: timedelta = timedelta(days=8)

    name = "backup_age"
    title = "The newest healthy backup is recent"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        if subject.role is Role.CLONE:
            yield from about_the_server(subject, self.name)
            return
        if subject.repository is None:
            yield NotChecked(self.name, "no repository is set for this cluster")
            return
        backups = list_backups(subject.repository)
        # Without data checksums nobody can say more than 'not checked': such a backup still counts.
        usable = [backup for backup in backups if backup.health.verdict is not Verdict.BROKEN]
        newest = max(usable, key=lambda backup: backup.finished_at, default=None)
        if newest is None:
            yield self._finding(subject, "there is no usable backup", {"backups": len(backups)})
        elif (age := clock.now() - newest.finished_at) > self.limit:
            shown = f"the newest healthy backup is {age.days} days and {age.seconds // 3600} hours old"
            yield self._finding(
                subject, shown, {"backup": newest.id, "age_seconds": int(age.total_seconds())}
            )
        for backup in backups[-1:]:
            if backup.health.verdict is Verdict.BROKEN:
                summary = f"the newest backup {backup.id} holds {backup.health.bad_page_count} damaged pages"
                yield self._finding(subject, summary, {"backup": backup.id})

    def _finding(self, subject: Subject, summary: str, evidence: dict[str, object]) -> Finding:
        return Finding(
            check=self.name,
            severity=Severity.HIGH,
            location=Location(cluster=subject.cluster),
            summary=summary,
            meaning="a restore starts from an old copy and replays more WAL, or cannot start at all",
            remedy="knockwood backup",
            evidence={**evidence, "limit_seconds": int(self.limit.total_seconds())},
        )


CHECK = BackupAge()
