"""What servers said when recovery went wrong, and what it is told as."""

from __future__ import annotations

import pytest

from knockwood.clone import log as logs
from knockwood.clone.goal import Goal
from knockwood.errors import KnockwoodError, NoSpaceError, RecoveryFailedError, WrongSystemError
from knockwood.model import Lsn, Timeline

GOAL = Goal(Timeline(1), Lsn.parse("0/C000A8"), True, Lsn.parse("0/900100"))
STOP = '2026-11-21 05:00:00 UTC [1] LOG:  recovery stopping after WAL location (LSN) "0/C000A8"\n'
GUARD = (
    '2026-11-21 05:00:00 UTC [1] FATAL:  could not restore file "00000002.history" from archive:'
    " child process exited with exit code 200\n"
)


def fatal(text: str) -> str:
    return f"2026-11-21 05:00:00.000 UTC [7] FATAL:  {text}\n"


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        (
            "recovery ended before configured recovery target was reached",
            RecoveryFailedError,
            "the WAL ends before after",
        ),
        (
            "requested recovery stop point is before consistent recovery point",
            RecoveryFailedError,
            "0/00900100",
        ),
        (
            "WAL file database system identifier is 12, pg_control database system identifier is 34",
            WrongSystemError,
            "cluster 12, the backup of cluster 34",
        ),
        ("could not locate required checkpoint record", RecoveryFailedError, "makes the backup consistent"),
        (
            "could not locate a valid checkpoint record at 0/2000028",
            RecoveryFailedError,
            "missing or damaged",
        ),
        (
            "requested timeline 3 is not a child of this server's history",
            RecoveryFailedError,
            "does not descend",
        ),
        ("recovery target timeline 7 does not exist", RecoveryFailedError, "its history is missing"),
        (
            'could not access file "timescaledb": No such file or directory',
            RecoveryFailedError,
            "timescaledb",
        ),
        (
            "resource manager with ID 128 not registered",
            RecoveryFailedError,
            "an extension that is not loaded",
        ),
        ("WAL contains references to invalid pages", RecoveryFailedError, "files are missing"),
        ('could not write to file "x": No space left on device', NoSpaceError, "filled up"),
        (
            'could not restore file "000000010000000000000003" from archive: child process exited with exit code 201',
            RecoveryFailedError,
            "out of the spool: 000000010000000000000003",
        ),
        ("something never seen", RecoveryFailedError, "something never seen"),
    ],
)
def test_a_cause_is_named(text: str, kind: type[KnockwoodError], says: str) -> None:
    error = logs.failure(fatal(text), GOAL, "/data")
    assert type(error) is kind
    assert says in str(error)
    assert "/data" in str(error)


def test_damage_is_told_from_a_plain_end() -> None:
    log = (
        "2026-11-21 05:00:00 UTC [1] LOG:  incorrect resource manager data checksum in record at 0/C000A8\n"
        + fatal("recovery ended before configured recovery target was reached")
    )
    assert "checksum in record at 0/C000A8" in str(logs.failure(log, GOAL, "x"))


def test_the_stop_must_be_the_one_asked_for() -> None:
    assert logs.check_stop(STOP, GOAL).lsn == GOAL.lsn
    with pytest.raises(RecoveryFailedError, match="stopped after"):
        logs.check_stop(STOP.replace("A8", "B8"), GOAL)
    with pytest.raises(RecoveryFailedError, match="stopped before"):
        logs.check_stop(STOP.replace("after", "before"), GOAL)
    with pytest.raises(RecoveryFailedError, match="without saying where"):
        logs.check_stop("", GOAL)
    at_once = Goal(Timeline(1), None, True, Lsn(0))
    assert logs.check_stop("[1] LOG:  recovery stopping after reaching consistency", at_once).lsn is None
    with pytest.raises(RecoveryFailedError):
        logs.check_stop(STOP, at_once)


def test_a_stopped_promotion_is_told_from_a_missing_file() -> None:
    assert logs.stopped_by_guard(STOP + GUARD)
    assert not logs.stopped_by_guard(GUARD)
    assert not logs.stopped_by_guard(STOP + GUARD.replace("200", "2001"))


def test_settings_that_are_too_low_are_read_with_what_they_must_be() -> None:
    detail = "DETAIL:  {} = {} is a lower setting than on the primary server, where its value was {}.\n"
    log = detail.format("max_connections", 20, 60) + detail.format("max_wal_senders", 5, 12)
    assert logs.too_low(log) == {"max_connections": 60, "max_wal_senders": 12}
    assert logs.too_low("") == {}


def test_that_a_standby_waits_for_wal_is_told() -> None:
    line = "2026-11-21 05:00:00.000 UTC [7] LOG:  waiting for WAL to become available at 0/67002000\n"
    assert logs.waits(line + fatal("waiting")) == ["waiting for WAL to become available at 0/67002000"]
