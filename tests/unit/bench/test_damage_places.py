"""The damage table's own judgement: what counts as found, as a consequence, and as a false alarm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from damage_places import Damage


def finding(check: str = "page_checksums", evidence: dict[str, Any] | None = None, **location: Any) -> Any:
    place = {"database": "shop", "relation": "public.orders", "file": "base/5/7", "block": 4} | location
    return {
        "check": check,
        "summary": "damaged",
        "location": {name: value for name, value in place.items() if value is not None},
        "evidence": evidence or {},
    }


def page(**more: Any) -> Damage:
    from damage_places import Damage, Place

    place = Place("shop", relation="public.orders", file="base/5/7", block=4)
    return Damage("", "shop", (place,), frozenset({"public.orders"}), **more)


def test_a_finding_at_the_place_finds_it() -> None:
    from damage_places import judge

    judgement = judge([page()], [finding(), finding(), finding("lost_writes")])
    assert judgement.all_found
    assert judgement.outcomes[0].checks == ["page_checksums", "lost_writes"]
    assert judgement.false_alarms == []


@pytest.mark.parametrize(
    "other", [{"block": 5}, {"block": None}, {"file": "base/5/8"}, {"relation": None}], ids=str
)
def test_a_finding_beside_the_place_does_not_find_it(other: dict[str, Any]) -> None:
    from damage_places import judge

    assert not judge([page()], [finding(**other)]).all_found


def test_a_finding_elsewhere_is_a_false_alarm() -> None:
    from damage_places import judge

    elsewhere = [finding(relation="public.payments"), finding(database="bench")]
    judgement = judge([page()], elsewhere)
    assert judgement.false_alarms == elsewhere
    assert not judgement.all_found


def test_another_page_of_a_harmed_table_is_a_consequence() -> None:
    from damage_places import judge

    toast = finding("toast", {"toast_of": "public.orders"}, relation="pg_toast.pg_toast_7")
    judgement = judge([page()], [finding(block=9), toast])
    assert judgement.false_alarms == []
    assert judgement.outcomes[0].consequences == ["page_checksums", "toast"]


@pytest.mark.parametrize("breaks", [True, False])
def test_broken_rules_count_only_where_the_damage_may_break_them(breaks: bool) -> None:
    from damage_places import judge

    rules = [
        finding("invariants", relation=None, file=None, block=None, key="id=7"),
        finding("foreign_keys", {"referenced": "public.orders"}, relation="public.order_lines"),
    ]
    assert (judge([page(breaks_rules=breaks)], rules).false_alarms == []) is breaks
    unrelated = finding("foreign_keys", {"referenced": "public.products"}, relation="public.order_lines")
    assert judge([page(breaks_rules=True)], [unrelated]).false_alarms == [unrelated]


def test_a_key_and_a_check_can_be_asked_for() -> None:
    from damage_places import Place

    place = Place("shop", key="xid 77", check="transaction_status")
    assert place.named_by(finding("transaction_status", key="xid 77"))
    assert not place.named_by(finding("transaction_status", key="xid 78"))
    assert not place.named_by(finding("compare", key="xid 77"))


def test_what_is_true_of_the_bench_server_is_told_apart() -> None:
    from damage_places import judge

    judgement = judge([page()], [finding("configuration")])
    assert judgement.false_alarms == []
    assert len(judgement.about_the_server) == 1
    assert not judgement.all_found


def results(**more: Any) -> dict[str, Any]:
    def damage(database: str, found: bool = True) -> dict[str, Any]:
        checks = ["page_checksums"] if found else []
        return {"database": database, "line": "", "found": found, "checks": checks, "note": "why"}

    def case(row: str, *damages: dict[str, Any]) -> dict[str, Any]:
        return {
            "row": row,
            "title": f"the {row}",
            "seconds": {"light": 1.0},
            "damages": list(damages),
            "false_alarms": [],
        }

    cases = [case(row, damage("shop"), damage("bench")) for row in ("bit-flip", "lost-write", "collation")]
    cases[0]["damages"].append(damage("bench", more.pop("found", True)))
    cases.append(case("wal", damage("", more.pop("wal", True))))
    return {"versions": "v", "machine": "m", "cases": cases, "healthy": None} | more


def test_the_table_says_what_was_found_where() -> None:
    from damage_report import found_rows, report, shortfalls

    value = results(found=False)
    assert (found_rows(value["cases"], "shop"), found_rows(value["cases"], "bench")) == (3, 2)
    text = report(value)
    assert "**not found**" in text
    assert "not found. why" in text
    assert "2 of 3 rows found" in text
    assert shortfalls(value) == []  # one row is within the bar


def test_a_false_alarm_or_an_unseen_damage_of_the_repository_fails_the_table() -> None:
    from damage_report import shortfalls

    assert shortfalls(results(wal=False)) == ["damage to the repository was not found"]
    value = results()
    value["cases"][1]["false_alarms"].append(finding())
    assert shortfalls(value) == ["1 false alarms"]


def test_more_rows_than_the_bar_allows_fail_the_table() -> None:
    from damage_report import shortfalls

    value = results()
    for case in value["cases"][:3]:
        case["damages"][0]["found"] = False
    assert shortfalls(value) == ["shop, with invariants: 3 rows not found"]
