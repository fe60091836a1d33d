"""The first bad commit of real archives: over two backups and the WAL between, and what cannot be said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fix_clones import Protected, protected
from knockwood.errors import UsageError
from knockwood.history.bisect import Outcome
from knockwood.host import reflink
from knockwood.model import Verdict
from knockwood.operations.bisect import Bisection, bisect
from knockwood.operations.bisect_question import question
from knockwood.operations.cluster import Cluster
from knockwood.repository.targets import parse_target
from knockwood.settings import parse

if TYPE_CHECKING:
    from fix_server import ServerFactory

_NEGATIVE = "select a from t where a < 0"


def cluster_of(made: Protected, *invariants: str) -> Cluster:
    tables = "".join(f"\n[[cluster.shop.invariant]]\n{text}\n" for text in invariants)
    text = f"""
state = "{made.folder / "state"}"
[cluster.shop]
dsn = "{made.server.dsn()}"
repository = "{made.folder / "repository"}"
{tables}"""
    return Cluster.of(parse(text), "shop")


def ask(made: Protected, *, since: str | None = None, until: str | None = None, **words: Any) -> Bisection:
    made.flush()
    confirm = words.pop("confirm", 0)
    invariants = words.pop("invariants", ())
    cluster = cluster_of(made, *invariants)
    found = bisect(
        cluster,
        question(cluster, **words),
        since=parse_target(since) if since else None,
        until=parse_target(until) if until else None,
        confirm=confirm,
        wait=0,
    )
    assert made.registry.records() == []
    assert len(found.probes) <= found.promised or any(
        probe.seen.verdict is Verdict.NOT_CHECKED for probe in found.probes
    )
    return found


@pytest.fixture(
    params=[pytest.param(15, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow), 18]
)
def history(
    new_server: ServerFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Protected, dict[int, int]]]:
    """Two backups and 24 commits around them; the 17th is the first to write a negative number."""
    server = new_server(request.param, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        xids = {}
        for number in range(1, 25):
            xids[number] = made.insert(-number if number in (17, 20) else number)
            if number == 9:
                made.backup()
            if number % 5 == 0:
                made.execute("select pg_switch_wal()")
        yield made, xids


def test_the_first_bad_commit_is_found_and_named(history: tuple[Protected, dict[int, int]]) -> None:
    made, xids = history
    lines: list[str] = []
    cluster = cluster_of(made, f'name = "none below zero"\nsql = "{_NEGATIVE}"')
    made.flush()
    found = bisect(cluster, question(cluster, invariant="none below zero"), wait=0, progress=lines.append)
    assert (found.outcome, found.verdict) == (Outcome.FOUND, Verdict.BROKEN)
    assert found.first_bad is not None
    assert found.first_bad.xid == xids[17]
    assert found.last_good is not None
    assert found.last_good.commit is not None
    assert found.last_good.commit.xid == xids[16]
    assert found.examples == ({"a": "-17"},)
    assert found.culprit is not None
    assert [(table.name, table.inserted) for table in found.culprit.tables] == [("public.t", 1)]
    assert found.commits >= 24
    assert found.backups == 2
    assert len(found.probes) <= found.promised
    assert found.probes[0].lsn == max(probe.lsn for probe in found.probes)
    assert found.tally.fetched + found.tally.copies <= len(found.probes)
    assert any(line.startswith(f"probe 1 of about {found.promised}") for line in lines)
    assert made.registry.records() == []
    if not reflink.can_share(made.folder):
        assert found.tally.shared_bytes == 0


def test_an_incremental_backup_is_a_beginning_once_it_was_proved(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1, summarize_wal="on")
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        for number in range(1, 5):
            made.insert(number)
        middle = made.backup(incremental=True)
        for number in (-5, 6):
            made.insert(number)
        assert ask(made, sql=_NEGATIVE).backups == 1
        made.repository.put_json(
            "proofs/20260101T000000Z-0000.json", {"verdict": "held", "backup": middle.id}
        )
        found = ask(made, sql=_NEGATIVE)
        assert (found.outcome, found.backups) == (Outcome.FOUND, 2)
        assert found.examples == ({"a": "-5"},)


def test_what_is_bad_from_the_start_never_bad_or_no_question(
    history: tuple[Protected, dict[int, int]],
) -> None:
    made, xids = history
    start = ask(made, sql="select 1")
    assert (start.outcome, start.verdict) == (Outcome.BAD_FROM_START, Verdict.BROKEN)
    assert start.first_bad is None
    never = ask(made, sql="select a from t where a > 1000;")
    assert (never.outcome, never.verdict, len(never.probes)) == (Outcome.NEVER_BAD, Verdict.HELD, 1)
    wrong = ask(made, sql="select no_such_column from t")
    assert (wrong.outcome, wrong.verdict) == (Outcome.NOT_CHECKABLE, Verdict.NOT_CHECKED)
    assert "no_such_column" in " ".join(wrong.notes)
    two = ask(made, sql="select 1; delete from t")
    assert two.verdict is Verdict.NOT_CHECKED
    before = ask(made, sql=_NEGATIVE, until=f"before-{xids[17]}")
    assert (before.outcome, before.verdict) == (Outcome.NEVER_BAD, Verdict.HELD)
    with pytest.raises(UsageError, match="before it begins"):
        ask(made, sql=_NEGATIVE, since=f"before-{xids[17]}", until=f"before-{xids[12]}")


@pytest.mark.slow
def test_a_rule_that_was_mended_and_broken_again_is_told(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        made.insert(1)
        made.insert(-2)
        made.execute("delete from t where a < 0")
        made.insert(3)
        last = made.insert(-4)
        made.insert(5)
        once = ask(made, sql=_NEGATIVE)
        assert once.outcome is Outcome.FOUND  # one of the two turns: more was not asked
        again = ask(made, sql=_NEGATIVE, confirm=100)
        assert (again.outcome, again.verdict) == (Outcome.NOT_MONOTONE, Verdict.BROKEN)
        narrowed = ask(made, sql=_NEGATIVE, since=f"before-{last}", confirm=100)
        assert narrowed.outcome is Outcome.FOUND
        assert narrowed.first_bad is not None
        assert narrowed.first_bad.xid == last


@pytest.mark.slow
def test_states_before_the_table_was_there_are_not_checked(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.backup()
        for number in range(6):
            made.insert(number)
        made.execute("create table late (b int)")
        for number in range(6):
            made.execute(f"insert into late values ({number})")
        [(bad,)] = made.execute("insert into late values (-1) returning pg_current_xact_id()::text::bigint")
        made.execute("insert into late values (9)")
        found = ask(made, sql="select * from late where b < 0")
        assert found.outcome is Outcome.FOUND
        assert found.first_bad is not None
        assert found.first_bad.xid == bad
        assert Verdict.NOT_CHECKED in {probe.seen.verdict for probe in found.probes}
        since_ever = ask(made, sql="select * from late union all select -1")
        assert (since_ever.outcome, since_ever.verdict) == (Outcome.NARROWED, Verdict.BROKEN)
        assert since_ever.last_good is None
        assert since_ever.suspect_count > 0


def test_a_check_is_asked_of_copies_opened_for_writes(new_server: ServerFactory, tmp_path: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute("create table child (a bigint references t)")
        made.backup()
        made.insert(1)
        made.execute("insert into child values (1)")
        sql = "begin; set local session_replication_role = replica; insert into child values (7); commit"
        made.execute(sql)
        [(bad,)] = made.execute("select xmin::text::bigint from child where a = 7")
        made.insert(8)
        found = ask(made, check="foreign-keys")
        assert (found.outcome, found.question.name) == (Outcome.FOUND, "foreign_keys")
        assert found.first_bad is not None
        assert found.first_bad.xid == bad


def test_one_question_is_asked(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        cluster = cluster_of(made)
        with pytest.raises(UsageError, match="one thing"):
            question(cluster)
        with pytest.raises(UsageError, match="one thing"):
            question(cluster, sql="select 1", check="toast")
        with pytest.raises(UsageError, match="empty"):
            question(cluster, sql=" ; ")
        with pytest.raises(UsageError, match="no invariant"):
            question(cluster, invariant="x")
        with pytest.raises(UsageError, match="how the server is run"):
            question(cluster, check="backup_age")
        with pytest.raises(UsageError, match="no check"):
            question(cluster, check="nope")
