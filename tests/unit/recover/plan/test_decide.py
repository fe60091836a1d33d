"""The plan for any findings: complete, safe, lossless where it can be, and always the same."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.integrity.registry import all_checks
from knockwood.model.finding import Finding, Location, Severity, Verdict
from knockwood.model.recovery import ExpectedLoss, Precondition, Step
from knockwood.recover.plan.damage import OF_TABLES, PHYSICAL, Kind, classify, known_checks
from knockwood.recover.plan.decide import decide
from knockwood.recover.plan.offer import Offer, Rank, Turn, key
from knockwood.recover.plan.parse import parse_findings, parse_plan
from knockwood.recover.plan.situation import Rates, RelationFact, Situation, WholeRestore

READY = Situation(
    "shop",
    18,
    "local",
    server_up=True,
    in_recovery=False,
    superuser=True,
    checked={"lost_writes": Verdict.HELD},
)


def finding(check: str, *, evidence: dict[str, Any] | None = None, **place: Any) -> Finding:
    return Finding(
        check, Severity.HIGH, Location(**place), f"{check} found it", "", "REMEDY;", evidence or {}
    )


def page(table: str = "public.t", block: int = 3) -> Finding:
    return finding("page_checksums", database="shop", relation=table, file="base/5/16384", block=block)


def index(name: str = "public.t_pkey", table: str = "public.t", check: str = "amcheck_index") -> Finding:
    return finding(check, database="shop", relation=table, index=name, file="base/5/16390")


def sequence() -> Finding:
    return finding(
        "sequences",
        database="shop",
        relation="public.t",
        key="id=100",
        evidence={"sequence": "public.t_id_seq"},
    )


def offer(*heals: Finding, rank: Rank = Rank.PAGE_REPAIR, loss: int | None = 0, title: str = "mend") -> Offer:
    step = Step("mend", title, {"what": title})
    return Offer(
        rank,
        Turn.PAGES,
        title,
        frozenset(key(each) for each in heals),
        (step,),
        ExpectedLoss(loss, loss),
    )


def kinds(*findings: Finding, situation: Situation = READY, offers: tuple[Offer, ...] = ()) -> list[str]:
    return [step.kind for step in decide(findings, situation, offers).steps]


# --- the rules, one by one -------------------------------------------------------------------------


def test_every_check_has_its_rule() -> None:
    assert known_checks() == {check.name for check in all_checks()}


def test_an_unknown_check_is_named_with_its_own_remedy() -> None:
    plan = decide([finding("of_tomorrow")], READY)
    assert plan.steps == ()
    assert "of_tomorrow" in plan.refused[0]
    assert "REMEDY" in plan.refused[0]


def test_a_damaged_index_is_rebuilt_without_blocking_writers() -> None:
    [step] = decide([index(), index(check="page_checksums")], READY).steps
    assert (step.kind, step.blocked_seconds) == ("rebuild-index", 0.0)
    assert step.arguments == {"database": "shop", "index": "public.t_pkey", "concurrently": True}


def test_an_index_of_a_catalog_blocks_and_says_so() -> None:
    plan = decide([index("pg_catalog.pg_class_oid_index", "pg_catalog.pg_class")], READY)
    assert not plan.steps[0].arguments["concurrently"]
    assert plan.steps[0].blocked_seconds is None


@pytest.mark.parametrize("name", ["public.t_pkey_ccnew", "public.t_pkey_ccnew1", 'public."T_ccold"'])
def test_what_a_failed_rebuild_left_is_dropped(name: str) -> None:
    assert kinds(index(name, check="invalid_indexes")) == ["drop-index"]
    assert kinds(index(name, check="amcheck_index")) == ["rebuild-index"]


def test_the_index_of_a_partitioned_table_is_not_rebuilt() -> None:
    found = replace(index(check="invalid_indexes"), evidence={"relkind": "I"})
    plan = decide([found], READY)
    assert not plan.steps
    assert "attach" in plan.refused[0]


def test_no_index_is_built_from_a_table_that_stays_damaged() -> None:
    plan = decide([page(), index()], READY)
    assert plan.steps == ()
    assert len(plan.refused) == 2
    assert kinds(page(), index(), offers=(offer(page()),)) == ["mend", "rebuild-index"]
    assert kinds(page("public.other"), index()) == ["rebuild-index"]


def test_an_index_is_built_where_the_damage_of_its_table_is_gone() -> None:
    """As after a repair that was killed between the two, and then planned anew from the same findings."""
    mended = replace(offer(page()), steps=(), refused="there is nothing to mend", gone=True)
    plan = decide([page(), index()], READY, (mended,))
    assert [step.kind for step in plan.steps] == ["rebuild-index"]
    assert plan.heals == (index(),)
    [told] = plan.refused
    assert told.endswith("there is nothing to mend")
    assert not kinds(page(), index(), offers=(replace(mended, gone=False),))


def test_an_index_that_knows_more_than_its_table_waits_for_lost_writes() -> None:
    found = index(check="index_against_heap")
    assert kinds(found) == ["rebuild-index"]
    plan = decide([found], replace(READY, checked={}))
    assert not plan.steps
    assert "lost_writes" in plan.refused[0]


def test_sequences_are_set_after_the_rows_are_back() -> None:
    rows = finding("invariants", database="shop", evidence={"invariant": "sum"})
    revert = replace(offer(rows, rank=Rank.ROW_REVERT), turn=Turn.ROWS)
    assert kinds(sequence(), rows, index(), offers=(revert,)) == ["mend", "rebuild-index", "setval"]


def test_wrong_rows_need_their_culprit() -> None:
    rows = finding("foreign_keys", database="shop", relation="public.t")
    assert "--xid" in decide([rows], READY).refused[0]
    assert "does not heal" in decide([rows], replace(READY, xids=(7,))).refused[0]


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ("backup_age", "knockwood backup"),
        ("proof_age", "knockwood prove"),
        ("transaction_status", "--in-place"),
        ("configuration", "REMEDY"),
        ("wraparound", "REMEDY"),
        ("wal_archive", "REMEDY"),
        ("collations", "unique_keys"),
    ],
)
def test_what_is_not_repaired_says_what_to_do(check: str, words: str) -> None:
    plan = decide([finding(check, database="shop")], READY)
    assert not plan.steps
    assert words in plan.refused[0]


def test_a_disabled_trigger_is_left_alone_and_named() -> None:
    found = finding("constraints", relation="public.t", key="audit", evidence={"kind": "trigger"})
    plan = decide([found], READY)
    assert not plan.steps
    assert "somebody switched it off" in plan.refused[0]


def test_unlogged_rows_cannot_come_back() -> None:
    facts = {"base/5/16384": RelationFact("shop", "public.t", "r", "u")}
    plan = decide([page()], replace(READY, relations=facts))
    assert "unlogged" in plan.refused[0]


@pytest.mark.parametrize("fork", ["vm", "fsm"])
def test_maps_hold_no_rows(fork: str) -> None:
    found = finding("segment_files", relation="public.t", file=f"base/5/16384_{fork}.1")
    assert classify(found, READY).kind is Kind.MAP


def test_a_standby_is_not_mended() -> None:
    plan = decide([index()], replace(READY, in_recovery=True))
    assert not plan.steps
    assert "standby" in plan.refused[0]


def test_estimates_come_from_measured_rates_only() -> None:
    facts = {
        "base/5/16384": RelationFact("shop", "public.t", "r", bytes=800_000_000),
        "base/5/16390": RelationFact("shop", "public.t_pkey", "i", bytes=200_000_000),
    }
    known = replace(READY, relations=facts, rates=Rates(scan=1e8))
    assert decide([index()], known).steps[0].seconds == 10.0
    assert decide([index()], replace(known, rates=Rates())).steps[0].seconds is None
    plans = {decide([index()], replace(known, rates=Rates(scan=rate))).id for rate in (1e7, 1e8, None)}
    assert len(plans) == 1, "measured again, it is the same plan"


# --- the whole cluster -----------------------------------------------------------------------------

WHOLE = WholeRestore("latest", "B", 1000, 10, free_bytes=5000)


def test_the_whole_cluster_is_never_restored_unordered() -> None:
    plan = decide([page()], replace(READY, whole=WHOLE))
    assert plan.steps == ()
    assert "restore --table shop.public.t --in-place" in plan.refused[0]
    assert [each.title.split(":")[0] for each in plan.alternatives] == [
        "bring the table back from a clone, beside it or with --in-place",
        "restore the cluster beside this one",
        "restore the cluster in place",
    ]


def test_an_alternative_says_that_its_wal_was_not_read() -> None:
    for unread in (False, True):
        plan = decide([page()], replace(READY, whole=replace(WHOLE, unread=unread)))
        told = [each.why_not for each in plan.alternatives if "restore the cluster" in each.title]
        assert [("whether its WAL is whole is read only then" in why) for why in told] == [unread, unread]


def test_an_ordered_restore_replaces_all_smaller_repairs() -> None:
    plan = decide([page(), index()], replace(READY, whole=replace(WHOLE, ordered=True)), (offer(page()),))
    assert [step.kind for step in plan.steps] == ["restore-in-place"]
    assert len(plan.heals) == 2
    assert "mend" in [each.title for each in plan.alternatives]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"free_bytes": 1005}, "no room"),
        ({"free_bytes": None}, "not known"),
        ({"refused": "there is a gap"}, "there is a gap"),
    ],
)
def test_an_ordered_restore_that_is_not_safe_is_refused(change: dict[str, Any], words: str) -> None:
    plan = decide([], replace(READY, whole=replace(WHOLE, ordered=True, **change)))
    assert not plan.steps
    assert words in plan.refused[0]


def test_rows_are_back_only_from_before_they_were_written() -> None:
    rows = finding("invariants", evidence={"invariant": "sum"})
    for back in (True, False):
        whole = replace(WHOLE, ordered=True, rows_back=back)
        plan = decide([rows], replace(READY, whole=whole))
        assert (plan.heals == (rows,)) is back
        assert bool(plan.refused) is not back


# --- any findings ----------------------------------------------------------------------------------

TABLES = ("public.a", "public.b", "pg_catalog.pg_class", "pg_toast.pg_toast_7")


@st.composite
def any_finding(draw: st.DrawFn) -> Finding:
    check = draw(st.sampled_from([*sorted(known_checks()), "unknown"]))
    table = draw(st.sampled_from([*TABLES, None]))
    fork = draw(st.sampled_from(["", "_vm", "_fsm", ".1"]))
    evidence: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {"kind": "not_valid", "object": "c"},
                {"kind": "trigger", "object": "c"},
                {"sequence": "public.s"},
                {"relkind": "I"},
            ]
        )
    )
    return finding(
        check,
        evidence=evidence,
        database=draw(st.sampled_from(["shop", None])),
        relation=table,
        index=draw(st.sampled_from([f"{table}_pkey", "public.x_ccnew", None])),
        file=draw(st.sampled_from([f"base/5/16384{fork}", "global/1260", None])),
        block=draw(st.none() | st.integers(0, 5)),
        key=draw(st.sampled_from(["id=5", "ctid (0,1)", None])),
    )


@st.composite
def any_situation(draw: st.DrawFn) -> Situation:
    unknown = st.none() | st.booleans()
    whole = st.none() | st.builds(
        WholeRestore,
        st.sampled_from(["latest", "0/5000000"]),
        backup_bytes=st.sampled_from([None, 1000]),
        free_bytes=st.sampled_from([None, 900, 5000]),
        rows_back=st.booleans(),
        ordered=st.booleans(),
        refused=st.sampled_from([None, "a gap"]),
    )
    return Situation(
        "shop",
        18,
        draw(st.sampled_from(["local", "remote", "managed", None])),
        server_up=draw(unknown),
        in_recovery=draw(unknown),
        superuser=draw(unknown),
        checked=draw(st.sampled_from([{}, {"lost_writes": Verdict.HELD}])),
        xids=draw(st.sampled_from([(), (7,)])),
        whole=draw(whole),
    )


@st.composite
def any_case(draw: st.DrawFn) -> tuple[list[Finding], Situation, list[Offer]]:
    findings = draw(st.lists(any_finding(), max_size=8))
    offers = []
    for number in range(draw(st.integers(0, 5)) if findings else 0):
        made = offer(
            *draw(st.lists(st.sampled_from(findings), min_size=1, max_size=4)),
            rank=draw(st.sampled_from([Rank.PAGE_REPAIR, Rank.ROW_REVERT, Rank.TABLE_RESTORE])),
            loss=draw(st.sampled_from([0, 0, 3, None])),
            title=f"offer {number}",
        )
        conditions = draw(st.sampled_from([(), ("the server is up",), ("local reach",), ("of their own",)]))
        step = replace(made.steps[0], preconditions=tuple(Precondition(name) for name in conditions))
        refused = draw(st.sampled_from([None, None, "not safe"]))
        offers.append(replace(made, steps=(step,), refused=refused))
    return findings, draw(any_situation()), offers


@given(any_case())
def test_every_finding_is_healed_or_named(case: tuple[list[Finding], Situation, list[Offer]]) -> None:
    findings, situation, offers = case
    plan = decide(findings, situation, offers)
    healed = {key(each) for each in plan.heals}
    assert healed <= {key(each) for each in findings}
    for each in findings:
        named = [line for line in plan.refused if line.startswith(f"{each.check}: {each.summary}")]
        assert (key(each) in healed) or named
    assert bool(plan.heals) <= bool(plan.steps)
    assert all(line.rpartition(": ")[2] for line in plan.refused)


@given(any_case())
def test_no_step_rests_on_what_is_not_known(case: tuple[list[Finding], Situation, list[Offer]]) -> None:
    findings, situation, offers = case
    plan = decide(findings, situation, offers)
    for step in plan.steps:
        names = {each.name for each in step.preconditions}
        assert "the server is up" not in names or situation.server_up
        assert "the server is the primary" not in names or situation.in_recovery is False
        assert "a superuser" not in names or situation.superuser
        assert "local reach" not in names or situation.reach == "local"
        if step.kind == "restore-in-place":
            assert situation.whole is not None
            assert situation.whole.ordered
            assert situation.whole.free_bytes == 5000
            assert situation.whole.backup_bytes == 1000
            assert situation.whole.refused is None


def feasible(made: Offer, situation: Situation) -> bool:
    names = {each.name for step in made.steps for each in step.preconditions}
    return (
        made.refused is None
        and ("the server is up" not in names or bool(situation.server_up))
        and ("local reach" not in names or situation.reach == "local")
    )


@given(any_case())
def test_nothing_is_lost_that_need_not_be(case: tuple[list[Finding], Situation, list[Offer]]) -> None:
    """A lossy repair is chosen only for a finding that no lossless one heals."""
    findings, situation, offers = case
    plan = decide(findings, situation, offers)
    if situation.whole is not None and situation.whole.ordered:
        return
    titles = {step.title for step in plan.steps}
    lossless = [made for made in offers if feasible(made, situation) and made.expected_loss.nothing]
    saved = frozenset().union(*(made.heals for made in lossless))
    lossy = [made for made in offers if not made.expected_loss.nothing and made.steps[0].title in titles]
    assert all(made.heals - saved for made in lossy)
    assert plan.expected_loss.nothing == (not lossy)


@given(any_case())
def test_no_index_is_rebuilt_over_damage(case: tuple[list[Finding], Situation, list[Offer]]) -> None:
    findings, situation, offers = case
    plan = decide(findings, situation, offers)
    healed = {key(each) for each in plan.heals}
    damages = [classify(each, situation) for each in findings]
    unsound = {d.table for d in damages if d.kind in OF_TABLES and key(d.finding) not in healed}
    if any(step.kind == "rebuild-index" for step in plan.steps):
        rebuilt = {step.arguments["index"] for step in plan.steps if step.kind == "rebuild-index"}
        for damage in damages:
            if damage.kind is Kind.INDEX and damage.finding.location.index in rebuilt:
                assert damage.table not in unsound or key(damage.finding) not in healed
    assert PHYSICAL >= OF_TABLES


@given(any_case(), st.randoms())
def test_the_same_findings_make_the_same_plan(
    case: tuple[list[Finding], Situation, list[Offer]], chance: random.Random
) -> None:
    findings, situation, offers = case
    plan = decide(findings, situation, offers)
    shuffled, others = [*findings, *findings[:2]], list(offers)
    chance.shuffle(shuffled)
    chance.shuffle(others)
    assert decide(shuffled, situation, others) == plan


@given(any_case())
def test_a_plan_survives_being_written_down(case: tuple[list[Finding], Situation, list[Offer]]) -> None:
    plan = decide(*case)
    value = json.loads(json.dumps(plan.as_json()))
    assert parse_plan(value).id == plan.id
    assert parse_plan(value).as_json() == value
    assert parse_findings({"findings": value["heals"]}) == plan.heals
