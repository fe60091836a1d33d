"""What may stand between a transaction and its revert, case by case: the exact rows back, or the exact conflict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_revert import Reverter, fingerprint, unchanged
from knockwood.errors import RefusedError
from knockwood.integrity.check import Invariant
from knockwood.model.recovery import Outcome, StepResult
from knockwood.postgres.connection import connect
from knockwood.recover import execute as execution
from knockwood.recover.plan.rows import Mode
from knockwood.recover.revert_apply import RevertHandler

if TYPE_CHECKING:
    from fix_server import ServerFactory


def same(made: Reverter, before: dict[str, object], *without: str) -> None:
    now = fingerprint(made.dsn)
    for name in before:
        if name not in without and not name.endswith("_seq"):
            assert now[name] == before[name], name


def later_edits(made: Reverter) -> None:
    """Edits of the same and of other columns, rows gone, keys taken again."""
    made.sql(
        "create table le (id int primary key, a int, b int, n numeric(10, 2));"
        "insert into le select i, i, i, i from generate_series(1, 10) i"
    )
    rogue = made.culprit(
        "update le set a = -a, n = n + 5 where id <= 6",
        "delete from le where id >= 9",
        "insert into le values (20, 0, 0, 0), (21, 0, 0, 0)",
    )
    made.sql(
        "update le set b = 77 where id = 1; update le set a = 78 where id = 2; delete from le where id = 3;"
        "insert into le values (9, 9, 8, 9); update le set b = 1 where id = 20; update le set n = n + 1 where id = 4"
    )
    assert sorted(made.conflicts(rogue)) == [
        ("changed since", "le", ("a",)),
        ("changed since", "le", ("n",)),
        ("gone since", "le", ()),
        ("inserted row changed since", "le", ("b",)),
        ("key reused", "le", ("b",)),
    ]
    plan = made.plan(made.request(rogue))
    assert plan.steps == ()
    counted = made.conflicts(rogue, counters=("le.n",))
    assert ("changed since", "le", ("n",)) not in counted
    assert len(made.conflicts(rogue, mode=Mode.FORCE)) == 1, "a row that is gone cannot be forced"
    done = made.revert(rogue, mode=Mode.SKIP, counters=("le.n",))
    assert done.values["rows"] == 6
    assert made.sql("select id, a, b, n::text from le order by id") == [
        (1, 1, 77, "1.00"),
        (2, 78, 2, "7.00"),
        (4, 4, 4, "5.00"),
        (5, 5, 5, "5.00"),
        (6, 6, 6, "6.00"),
        (7, 7, 7, "7.00"),
        (8, 8, 8, "8.00"),
        (9, 9, 8, "9.00"),
        (10, 10, 10, "10.00"),
        (20, 0, 1, "0.00"),
    ]


def good_children(made: Reverter) -> None:
    """A parent that the transaction inserted has children by now; ON DELETE CASCADE would take them along."""
    made.sql(
        "create table gp (id int primary key, k int unique); create table gc (id int primary key,"
        " p int references gp on delete cascade, k int references gp (k) on update cascade);"
        "insert into gp values (1, 1), (2, 2); insert into gc values (1, 1, 1)"
    )
    rogue = made.culprit(
        "insert into gp values (3, 3)", "update gp set k = 20 where id = 2", "delete from gc"
    )
    made.sql("insert into gc values (10, 3, null), (11, 3, null), (12, 1, 20)")
    assert sorted(made.conflicts(rogue)) == [
        ("other rows reference it", "gp", ("id",)),
        ("other rows reference it", "gp", ("k",)),
    ]
    examined = made.examine(made.request(rogue))
    [cascading] = [each for each in examined.conflicts if each.columns == ("id",)]
    assert cascading.count == 2
    assert "2 row(s) of public.gc reference it" in cascading.detail
    assert "CASCADE would delete" in cascading.detail
    with pytest.raises(AssertionError):
        made.revert(rogue, mode=Mode.FORCE)
    made.revert(rogue, mode=Mode.SKIP)
    assert made.sql("select count(*) from gc") == [(4,)]
    assert made.sql("select count(*) from gp") == [(3,)]


def missing_parents(made: Reverter) -> None:
    made.sql(
        "create table mp (id int primary key); create table mc (id int primary key, p int references mp);"
        "insert into mp values (1), (2); insert into mc values (1, 1), (2, 2)"
    )
    rogue = made.culprit("delete from mc where id = 1")
    made.sql("delete from mp where id = 1")
    assert made.conflicts(rogue) == [("referenced row is gone", "mc", ("p",))]


def cascades(made: Reverter) -> None:
    """What a cascade deleted comes back with what it was deleted for: parents first."""
    made.sql(
        "create table cp (id int primary key, v int); create table cc (id int primary key, p int not null"
        " references cp on delete cascade on update cascade);"
        "insert into cp select i, i * 1000 from generate_series(1, 5) i; insert into cc select i, i % 5 + 1"
        " from generate_series(1, 20) i"
    )
    before = fingerprint(made.dsn)
    gone = made.culprit("delete from cp where id <= 3")
    made.revert(gone)
    same(made, before)
    renamed = made.culprit("update cp set id = id + 100")
    done = made.revert(renamed)
    same(made, before)
    assert done.values["rows"] == 25


def triggers(made: Reverter) -> None:
    """The user's triggers do not fire a second time, and foreign keys are still checked."""
    made.sql(
        "create table tp (id int primary key); create table tt (id int primary key, p int references tp, v int);"
        "create table audit (at int generated always as identity primary key, what text);"
        "create function note() returns trigger language plpgsql as $$ begin"
        " insert into audit (what) values (tg_op); return null; end $$;"
        "create trigger note after insert or update or delete on tt for each row execute function note();"
        "insert into tp values (1), (2); insert into tt select i, 1, i from generate_series(1, 5) i"
    )
    before = fingerprint(made.dsn)
    rogue = made.culprit(
        "update tt set v = 0 where id < 3", "delete from tt where id = 5", "insert into tt values (6, 2, 6)"
    )
    plan = made.plan(made.request(rogue))
    assert plan.steps[0].arguments["replica_role"]
    assert "trigger note on public.tt would act a second time" in plan.steps[0].arguments["reasons"]
    made.revert(rogue)
    same(made, before)
    made.sql("alter table tt enable always trigger note")
    rogue = made.culprit("update tt set v = 0 where id < 3")
    refused = made.plan(made.request(rogue)).refused
    assert any("acts even then" in reason for reason in refused)
    made.sql("alter table tt disable trigger note")
    made.revert(rogue)


def exchanged(made: Reverter) -> None:
    """Rows exchange unique values: deferred, parked as NULL, or written anew."""
    made.sql(
        "create table xd (id int primary key, u int not null unique deferrable);"
        "create table xn (id int primary key, u int unique);"
        "create table xw (id int primary key, u int not null, unique (u));"
        "create table xk (id int primary key deferrable, v text);"
        "insert into xd values (1, 1), (2, 2), (3, 3); insert into xn table xd; insert into xw table xd;"
        "insert into xk values (1, 'a'), (2, 'b'), (3, 'c')"
    )
    before = fingerprint(made.dsn)
    rogue = made.culprit(
        "set constraints all deferred",
        "update xd set u = 4 - u",
        "update xn set u = null; update xn set u = 4 - id",
        "update xw set u = u + 10; update xw set u = 4 - id",
        "update xk set id = 4 - id",
    )
    assert len(rogue.changes) == 8
    made.revert(rogue)
    same(made, before)


def cycles(made: Reverter) -> None:
    """Two tables reference each other; a table references itself."""
    made.sql(
        "create table ya (id int primary key, b int);"
        "create table yb (id int primary key, a int not null references ya);"
        "alter table ya add foreign key (b) references yb;"
        "create table ys (id int primary key, boss int references ys on delete cascade);"
        "insert into ya values (1, null), (2, null); insert into yb values (1, 1), (2, 2); update ya set b = id;"
        "insert into ys select i, nullif(i / 2, 0) from generate_series(1, 9) i"
    )
    before = fingerprint(made.dsn)
    rogue = made.culprit(
        "update ya set b = null where id = 2; delete from yb where id = 2; delete from ya where id = 2",
        "delete from ys where id = 2",
        "insert into ya values (3, null); insert into yb values (3, 3); update ya set b = 3 where id = 3",
    )
    plan = made.plan(made.request(rogue))
    assert not plan.steps[0].arguments["replica_role"]
    made.revert(rogue)
    same(made, before)


def partitions(made: Reverter) -> None:
    """A row moved to another partition moves back, through the root."""
    made.sql(
        "create table pt (id int, region text, v int, primary key (id, region)) partition by list (region);"
        "create table pt_a partition of pt for values in ('a');"
        "create table pt_b (v int, region text not null, id int not null);"
        "alter table pt attach partition pt_b for values in ('b');"
        "insert into pt select i, 'a', i from generate_series(1, 10) i"
    )
    before = fingerprint(made.dsn)
    rogue = made.culprit("update pt set region = 'b', v = 0 where id <= 4", "delete from pt where id = 9")
    assert made.sql("select count(*) from pt_b") == [(4,)]
    made.revert(rogue)
    same(made, before)


def without_key(made: Reverter) -> None:
    """Rows are found by being equal in every byte; what cannot be told apart is a conflict."""
    made.sql(
        "create table nk (a int, b text); insert into nk values (1, 'x'), (1, 'x'), (2, null), (3, 'z'), (1, 'X')"
    )
    before = fingerprint(made.dsn)
    gone = made.culprit("delete from nk where a = 2", "insert into nk values (9, 'n'), (9, 'n')")
    made.revert(gone)
    same(made, before)
    assert ("cannot be told apart", "nk", ()) in made.conflicts(gone)
    one = made.culprit("delete from nk where ctid = (select min(ctid) from nk where b = 'x')")
    assert made.conflicts(one) == [("cannot be told apart", "nk", ())]
    made.revert(one, mode=Mode.FORCE)
    same(made, before)


def key_changes(made: Reverter) -> None:
    made.sql("create table kc (id int primary key, v int); insert into kc values (1, 91), (2, 92), (3, 93)")
    before = fingerprint(made.dsn)
    rogue = made.culprit(
        "update kc set id = 11 where id = 1",
        "update kc set id = 1 where id = 2",
        "insert into kc values (2, 99)",
    )
    after = fingerprint(made.dsn)
    done = made.revert(rogue)
    same(made, before)
    [own] = [int(done.values["xid"]) & 0xFFFFFFFF]
    assert own > rogue.xid
    assert made.plan(made.request(rogue)).refused == ("nothing is left to be reverted",)
    assert after != before


def several(made: Reverter) -> None:
    """Transactions that wrote the same rows, with good work between them, taken back together."""
    made.sql(
        "create table sv (id int primary key, a int, b int); insert into sv select i, 0, 0 from generate_series(1, 5) i"
    )
    before = fingerprint(made.dsn)
    first = made.culprit("update sv set a = 1", "insert into sv values (6, 1, 1)")
    made.sql("update sv set b = 5 where id = 1")
    second = made.culprit("update sv set a = 2 where id < 4", "delete from sv where id >= 5")
    assert made.conflicts(first)
    made.revert(second, first)
    made.sql("update sv set b = 0 where id = 1")
    same(made, before)


CASES = (
    later_edits,
    good_children,
    missing_parents,
    cascades,
    triggers,
    exchanged,
    cycles,
    partitions,
    without_key,
    key_changes,
    several,
)


@pytest.mark.parametrize(
    "version", [pytest.param(15, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow), 18]
)
def test_the_matrix(new_server: ServerFactory, tmp_path: Path, version: int) -> None:
    made = Reverter(new_server(version), tmp_path)
    made.sql("create table bystander as select i, md5(i::text) from generate_series(1, 100) i")
    for case in CASES:
        with unchanged(made.dsn, *_tables(case)):
            case(made)
            made.sql(f"drop table if exists {', '.join(_tables(case))} cascade")


def _tables(case: Callable[[Reverter], None]) -> list[str]:
    return {
        "later_edits": ["le"],
        "good_children": ["gp", "gc"],
        "missing_parents": ["mp", "mc"],
        "cascades": ["cp", "cc"],
        "triggers": ["tt", "tp", "audit"],
        "exchanged": ["xd", "xn", "xw", "xk"],
        "cycles": ["ya", "yb", "ys"],
        "partitions": ["pt"],
        "without_key": ["nk"],
        "key_changes": ["kc"],
        "several": ["sv"],
    }[case.__name__]


def test_roles_security_and_invariants(new_server: ServerFactory, tmp_path: Path) -> None:
    made = Reverter(new_server(18), tmp_path)
    made.sql(
        "create role plain login; create table t (id int primary key, v int, total int);"
        "insert into t select i, i, i from generate_series(1, 10) i; grant all on t to plain"
    )
    rogue = made.culprit("update t set v = 0 where id <= 5")
    plan = made.plan(made.request(rogue))
    made.role = "plain"
    made.sql("alter table t enable row level security; create policy p on t using (id > 3)")
    [hidden] = made.apply(plan).results
    assert hidden.outcome is Outcome.REFUSED
    assert "row-level security" in hidden.detail
    assert made.sql("select count(*) from t where v = 0") == [(5,)]


def test_what_breaks_an_invariant_is_rolled_back(new_server: ServerFactory, tmp_path: Path) -> None:
    made = Reverter(new_server(18), tmp_path)
    made.sql(
        "create table t (id int primary key, v int, w int); insert into t select i, i, i from generate_series(1, 9) i"
    )
    made.invariants = (Invariant("v equals w", "select id from t where v <> w"),)
    rogue = made.culprit("update t set v = v + 10 where id <= 5")
    made.sql("update t set w = w + 10 where id = 1")  # a good transaction that followed the wrong value
    plan = made.plan(made.request(rogue))
    with unchanged(made.dsn):
        [refused] = made.apply(plan).results
    assert refused.outcome is Outcome.REFUSED
    assert 'invariant "v equals w" would be broken by 1 row(s) more, such as (1)' in refused.detail
    made.sql("update t set w = w - 10 where id = 1")
    made.revert(rogue)
    assert made.sql("select count(*) from t where v <> w") == [(0,)]


def test_rows_edited_between_plan_and_apply(new_server: ServerFactory, tmp_path: Path) -> None:
    made = Reverter(new_server(18), tmp_path)
    made.sql(
        "create table t (id int primary key, v int, w int); insert into t select i, i, i from generate_series(1, 9) i"
    )
    rogue = made.culprit("update t set v = 0")
    plan = made.plan(made.request(rogue))
    made.sql("update t set w = 70 where id = 7")
    made.sql("vacuum full t")
    [done] = made.apply(plan).results  # another column: the plan is still the plan
    assert done.outcome is Outcome.DONE
    assert made.sql("select v, w from t where id = 7") == [(7, 70)]
    rogue = made.culprit("update t set v = 0")
    plan = made.plan(made.request(rogue))
    made.sql("update t set v = 70 where id = 7")
    with unchanged(made.dsn):
        [refused] = made.apply(plan).results
    assert refused.outcome is Outcome.REFUSED
    assert "1 conflict(s) now" in refused.detail

    # Between reading and locking: another column again, and again the plan holds.
    made.sql("update t set v = 0 where id = 7")
    plan = made.plan(made.request(rogue))
    edits = iter(("update t set w = 30 where id = 3", "update t set w = 31 where id = 3"))

    def edit(reached: str) -> None:
        if reached == "evidence":
            for statement in edits:
                made.sql(statement)

    [done] = made.apply(plan, reached=edit).results
    assert done.outcome is Outcome.DONE
    assert made.sql("select v, w from t where id = 3") == [(3, 31)]
    assert len(done.evidence) == 2


def test_only_what_changed_is_decided_again_under_the_lock(new_server: ServerFactory, tmp_path: Path) -> None:
    """Rows edited between reading and locking: kept, refused, and told by the evidence as they were locked."""
    made = Reverter(new_server(18), tmp_path)
    made.sql(
        "create table t (id int primary key, v int, w int, u int unique);"
        "insert into t select i, i, i, i from generate_series(1, 300) i"
    )
    rogue = made.culprit("update t set v = 0 where id > 2", "update t set id = id + 1000, v = 1 where id < 3")

    def apply(*statements: str) -> StepResult:
        plan = made.plan(made.request(rogue))
        left = list(statements)

        def edit(reached: str) -> None:
            while reached == "evidence" and left:
                made.sql(left.pop(0))

        [result] = made.apply(plan, reached=edit).results
        return result

    # A value that would be overwritten, a row that goes, a key that moves, a key taken.
    for forbidden, back in (
        ("update t set v = 5 where id = 9", "update t set v = 0 where id = 9"),
        ("delete from t where id = 9", "insert into t values (9, 0, 9, 9)"),
        ("update t set id = 5000 where id = 1001", "update t set id = 1001 where id = 5000"),
        ("insert into t values (1, 1, 1, 777)", "delete from t where id = 1"),
    ):
        assert apply(forbidden).outcome is Outcome.REFUSED, forbidden
        assert made.sql("select count(*) from t where v not in (0, 1, 5)") == [(0,)]
        made.sql(back)

    edits = ["update t set w = -w where id in (7, 8)", "update t set u = 900 where id = 20"]
    done = apply(*edits)
    assert done.outcome is Outcome.DONE
    assert len(done.values["evidence_later"]) == 1
    assert len(done.evidence) == 2
    assert made.sql("select count(*) from t where v = id and abs(w) = id and u in (id, 900)") == [(300,)]
    assert made.sql("select id, v, w from t where w < 0 order by 1") == [(7, 7, -7), (8, 8, -8)]

    # Killed after that and taken back: the rows are as they were when they were locked.
    plan = made.plan(made.request(rogue := made.culprit("update t set v = 0 where id > 2")))
    edits = ["update t set w = 70 where id = 70"]
    before = made.sql("select * from t where id <> 70 order by 1")

    def edit_and_die(reached: str) -> None:
        if reached == "evidence":
            made.sql(edits.pop())
        if reached == "committed":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.apply(plan, reached=edit_and_die)
    assert made.sql("select v, w from t where id = 70") == [(70, 70)]
    [entry] = execution.unfinished(made.state, "shop")
    [back] = execution.roll_back(entry.folder, [RevertHandler(made.dsn)]).results
    assert back.outcome is Outcome.ROLLED_BACK
    assert made.sql("select v, w from t where id = 70") == [(0, 70)]
    assert made.sql("select * from t where id <> 70 order by 1") == before


def test_a_row_that_stays_locked(new_server: ServerFactory, tmp_path: Path) -> None:
    made = Reverter(new_server(18), tmp_path)
    made.sql("create table t (id int primary key, v int); insert into t values (1, 1)")
    rogue = made.culprit("update t set v = 0")
    plan = made.plan(made.request(rogue), wait=0.2)
    with connect(made.dsn, autocommit=False) as other:
        other.execute("select from t for update")
        [refused] = made.apply(plan).results
        assert refused.outcome is Outcome.REFUSED
        assert "stayed locked for 0.2 s" in refused.detail
        other.rollback()
    [done] = made.apply(plan).results
    assert done.outcome is Outcome.DONE


def test_another_plan_than_the_approved_one(new_server: ServerFactory, tmp_path: Path) -> None:
    from knockwood.recover.execute import execute
    from knockwood.recover.revert_apply import RevertHandler

    made = Reverter(new_server(18), tmp_path)
    made.sql("create table t (id int primary key, v int); insert into t values (1, 1)")
    rogue = made.culprit("update t set v = 0")
    plan = made.plan(made.request(rogue))
    assert made.plan(made.request(rogue)).id == plan.id
    with pytest.raises(RefusedError, match="approved was"):
        execute(plan, [RevertHandler(made.dsn)], made.state, approve="0" * 16)
