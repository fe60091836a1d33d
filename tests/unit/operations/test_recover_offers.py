"""What page repair offers for findings of which a part is mended already."""

from __future__ import annotations

from dataclasses import replace

from knockwood.model.finding import Finding, Location, Severity
from knockwood.model.recovery import ExpectedLoss, Plan, Step
from knockwood.operations.page_repair import REPAIR
from knockwood.operations.recover_offers import offers_of
from knockwood.recover.plan.offer import key

FILE = "base/5/16384"


def finding(*blocks: int, check: str = "page_checksums") -> Finding:
    place = Location(database="shop", relation="public.t", file=FILE)
    return Finding(check, Severity.HIGH, place, "damaged", "", "", {"blocks": list(blocks)})


def plan(*blocks: int, heals: tuple[Finding, ...], refused: tuple[str, ...] = ()) -> Plan:
    steps = (Step(REPAIR, "mend", {"path": FILE, "blocks": list(blocks)}),) if blocks else ()
    return Plan("shop", "mend damaged pages", steps, ExpectedLoss(0, 0, ""), heals, (), refused)


def test_a_finding_of_which_one_page_is_mended_already_is_healed_by_the_others() -> None:
    found = finding(3, 4)
    [made] = offers_of(plan(4, heals=(found,)), [found])
    assert (made.heals, made.refused) == (frozenset((key(found),)), None)
    assert made.steps


def test_a_finding_of_which_one_page_is_refused_is_not_healed() -> None:
    found = finding(3, 4)
    [made] = offers_of(plan(4, heals=(), refused=("public.t block 3: no image is proven",)), [found])
    assert made.refused == "public.t block 3: no image is proven"
    assert not made.gone


def test_damage_of_a_page_that_is_sound_is_gone_but_not_that_of_its_rows() -> None:
    found = finding(3)
    [made] = offers_of(plan(heals=(found,)), [found])
    assert made.gone
    assert "nothing to mend" in str(made.refused)
    rows = replace(found, check="amcheck_heap")
    [made] = offers_of(plan(heals=(rows,)), [rows])
    assert not made.gone
