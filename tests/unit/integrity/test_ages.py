"""What counts as too old follows the schedule."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from fix_archive import a_backup
from knockwood.integrity.ages import latest, stale_backups, stale_proof
from knockwood.integrity.check import Schedule
from knockwood.model import Lsn, Verdict
from knockwood.repository.backups.model import Backup, BackupHealth

NOW = datetime(2026, 6, 15, 12, tzinfo=UTC)
DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
WEEKLY = Schedule()
DAILY = Schedule(full=DAY)
HOURLY = Schedule(full=HOUR)
BETWEEN = Schedule(full=7 * DAY, incremental=HOUR)


def aged(age: timedelta, *, incremental: bool = False, verdict: Verdict = Verdict.HELD) -> Backup:
    parent = "another" if incremental else None
    made = a_backup(f"made {age} ago", 1, Lsn(5), Lsn(9), NOW - age, parent=parent)
    return replace(made, finished_at=NOW - age, health=BackupHealth(verdict, (), 0, ""))


@pytest.mark.parametrize(
    ("schedule", "age", "stale"),
    [
        (WEEKLY, 8 * DAY, False),
        (WEEKLY, 8 * DAY + MINUTE, True),
        (DAILY, 27 * HOUR, False),
        (DAILY, 28 * HOUR, True),
        (HOURLY, 2 * HOUR, False),
        (HOURLY, 2 * HOUR + MINUTE, True),
    ],
)
def test_a_full_backup_is_due_by_the_schedule(schedule: Schedule, age: timedelta, stale: bool) -> None:
    found = list(stale_backups([aged(age)], schedule, NOW))
    assert bool(found) is stale
    if found:
        assert found[0].evidence["limit_seconds"] == int(latest(schedule.full).total_seconds())
        assert "healthy full backup" in found[0].summary


def test_incremental_backups_have_a_schedule_of_their_own() -> None:
    young = aged(HOUR, incremental=True)
    assert list(stale_backups([aged(3 * DAY), young], BETWEEN, NOW)) == []
    [late] = stale_backups([aged(3 * DAY)], BETWEEN, NOW)
    assert "healthy backup is 3 days and 0 hours old" in late.summary
    [none] = stale_backups([aged(9 * DAY), young], BETWEEN, NOW)
    assert "full" in none.summary


def test_damaged_backups_do_not_count() -> None:
    bad = aged(HOUR, verdict=Verdict.BROKEN)
    assert [one.summary for one in stale_backups([], WEEKLY, NOW)] == ["there is no usable backup"]
    assert len(list(stale_backups([bad], WEEKLY, NOW))) == 2
    assert len(list(stale_backups([aged(DAY), bad], WEEKLY, NOW))) == 1
    assert list(stale_backups([aged(DAY, verdict=Verdict.NOT_CHECKED)], WEEKLY, NOW)) == []


@pytest.mark.parametrize(
    ("verdict", "taken", "valid", "allowed", "count"),
    [
        ("held", DAY, 7 * DAY, 7 * DAY, 0),
        ("broken", DAY, 7 * DAY, 7 * DAY, 1),
        ("held", 8 * DAY, 7 * DAY, 30 * DAY, 1),
        ("held", 3 * DAY, 7 * DAY, 2 * DAY, 1),
        ("broken", 8 * DAY, 7 * DAY, 7 * DAY, 2),
    ],
)
def test_a_proof_counts_as_long_as_it_and_the_settings_say(
    verdict: str, taken: timedelta, valid: timedelta, allowed: timedelta, count: int
) -> None:
    at = NOW - taken
    proof = {
        "id": "p",
        "verdict": verdict,
        "taken_at": at.isoformat(),
        "valid_until": (at + valid).isoformat(),
    }
    assert len(list(stale_proof(proof, Schedule(proof=allowed), NOW))) == count


def test_what_says_that_it_is_from_the_future_is_not_recent() -> None:
    """A clock was wrong once: without this it would count as new until that day comes."""
    [found] = stale_backups([aged(3 * DAY), aged(-4000 * DAY)], DAILY, NOW)
    assert "yet to come" in found.summary
    assert list(stale_backups([aged(-4000 * DAY), aged(HOUR)], DAILY, NOW)) == []
    assert list(stale_backups([aged(-30 * MINUTE)], DAILY, NOW)) == []
    proof = {"id": "p", "verdict": "held", "backup": "b"}
    taken, until = (NOW + 4000 * DAY).isoformat(), (NOW + 4008 * DAY).isoformat()
    [found] = stale_proof(proof | {"taken_at": taken, "valid_until": until}, WEEKLY, NOW)
    assert "yet to come" in found.summary
