"""The pure parts of the checks in SQL."""

from __future__ import annotations

import pytest

from knockwood.integrity.checks.foreign_keys import ForeignKey, orphans_query
from knockwood.integrity.checks.unique_keys import UniqueIndex, conflicts_query, duplicates_query
from knockwood.integrity.checks.wal_archive import archive_end, command_fault
from knockwood.integrity.checks.wraparound import severity_of
from knockwood.model import Lsn, Severity
from knockwood.repository.inventory import ArchiveInventory


@pytest.mark.parametrize(
    "command",
    ["/bin/true", "true", " /usr/bin/true ", ":", "exit 0", "cp %p x || true", "cp %p x; exit 0", "a || :"],
)
def test_commands_that_always_succeed_are_told(command: str) -> None:
    fault = command_fault(command)
    assert fault is not None
    assert fault[0] is Severity.CRITICAL


@pytest.mark.parametrize("command", ["cp %p /a/%f", "/bin/cp %p /a/%f", "mv %p /a/%f", "scp %p host:%f"])
def test_commands_that_overwrite_are_told(command: str) -> None:
    fault = command_fault(command)
    assert fault is not None
    assert fault[0] is Severity.HIGH


@pytest.mark.parametrize(
    "command",
    [
        "knockwood wal push %p",
        "test ! -f /a/%f && cp %p /a/%f",
        "pgbackrest --stanza=true archive-push %p",
        "cp -n %p /a/%f",
        "/opt/true-archive %p",
    ],
)
def test_commands_that_archive_are_left_alone(command: str) -> None:
    assert command_fault(command) is None


@pytest.mark.parametrize(
    ("age", "severity"),
    [(500_000_000, None), (500_000_001, Severity.HIGH), (1_600_000_001, Severity.CRITICAL)],
)
def test_ages(age: int, severity: Severity | None) -> None:
    assert severity_of(age) is severity


def test_the_end_of_the_archive_is_the_furthest_position() -> None:
    assert archive_end(ArchiveInventory(1 << 20)) == Lsn(0)
    assert archive_end(ArchiveInventory(1 << 20, {1: (1, 2), 2: (2, 3)})) == Lsn(4 << 20)  # type: ignore[dict-item]


def key(match: str = "s", kind: str = "r", period: bool = False) -> ForeignKey:
    equal, same = "operator(pg_catalog.=)", ' collate pg_catalog."C"'
    return ForeignKey(
        "k",
        "public.r",
        kind,
        "public.f",
        "p",
        match,
        True,
        period,
        ["a", "b"],
        ["x", "y"],
        [equal] * 2,
        ["", same],
    )


def test_orphans_are_asked_for_with_the_keys_own_operators_and_collations() -> None:
    query = orphans_query(key())
    assert "from only public.r r" in query
    assert "from public.f t" in query
    assert 't.y collate pg_catalog."C" operator(pg_catalog.=) r.b collate pg_catalog."C"' in query
    assert " or " not in query
    assert "r.a is null or r.b is null" in orphans_query(key("f"))
    assert "from public.r r" in orphans_query(key(kind="p"))
    assert "range_agg(t.y)" in orphans_query(key(period=True))


def index(nulls_distinct: bool = True, operators: list[str] | None = None) -> UniqueIndex:
    return UniqueIndex(
        "i", "t", True, nulls_distinct, "true", ["a", "lower(b)"], ["", ""], False, operators, False, 9
    )


def test_null_keys_are_distinct_unless_declared_otherwise() -> None:
    assert "k0 is not null and k1 is not null" in duplicates_query(index())
    assert "is not null" not in duplicates_query(index(nulls_distinct=False))


def test_exclusion_constraints_compare_each_pair_once() -> None:
    query = conflicts_query(index(operators=["operator(pg_catalog.=)", "operator(pg_catalog.&&)"]))
    assert "a.k0 operator(pg_catalog.=) b.k0 and a.k1 operator(pg_catalog.&&) b.k1 and a.c < b.c" in query
