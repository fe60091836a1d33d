"""The witness counts what is missing, and survives a kill."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from knockwood.drill.scorecard import Gate, Scorecard, Seconds
from knockwood.drill.witness import Promise, Witness, altered, loss, read_promises
from knockwood.model import Verdict

entries = st.lists(
    st.builds(
        Promise,
        kind=st.sampled_from(["order", "payment"]),
        token=st.integers(1, 40),
        xid=st.integers(3, 1000),
        at=st.floats(0, 1e6),
    ),
    max_size=30,
)


@given(entries, st.sets(st.integers(1, 40)))
def test_loss_is_exactly_what_is_not_there(promises: list[Promise], there: set[int]) -> None:
    found = loss(tuple(promises), {"order": frozenset(there)})
    assert all(entry.kind == "payment" or entry.token not in there for entry in found.missing)
    kept = [entry for entry in promises if entry not in found.missing]
    assert all(entry.kind == "order" and entry.token in there for entry in kept)
    assert found.acknowledged == len(promises)


def test_the_record_is_read_back_without_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "witness.log"
    witness = Witness(path)
    witness.acknowledged("order", 7, 801)
    witness.acknowledged("payment", 8, 802)
    witness.close()
    with path.open("ab") as file:
        file.write(b"order 9 80")
    assert [(entry.kind, entry.token, entry.xid) for entry in read_promises(path)] == [
        ("order", 7, 801),
        ("payment", 8, 802),
    ]


def card(*gates: Gate) -> Scorecard:
    return Scorecard("s", "t", 1, Seconds(), True, 1, 0, 0, 0, 0.0, (), gates)


def test_one_failed_gate_breaks_the_drill() -> None:
    assert card(Gate("a", True, ""), Gate("b", True, "")).verdict is Verdict.HELD
    assert card(Gate("a", True, ""), Gate("b", False, "")).verdict is Verdict.BROKEN


def test_a_drill_without_gates_proves_nothing() -> None:
    assert card().verdict is Verdict.BROKEN


def test_a_value_is_judged_by_the_last_promise_for_its_token() -> None:
    promises = [
        Promise("order", 1, 10, 0.0, "5.00"),
        Promise("discount", 1, 11, 1.0, "4.50"),
        Promise("order", 2, 12, 2.0, "3.00"),
        Promise("payment", 3, 13, 3.0),
    ]

    assert altered(promises, {1: "4.50", 2: "3.00"}) == ()
    assert [entry.token for entry in altered(promises, {1: "5.00", 2: "3.00"})] == [1]
    assert [entry.token for entry in altered(promises, {1: "4.50"})] == [2]
    assert altered(promises, {1: "5.00", 2: "3.00"}, doubtful={1}) == ()


def test_notes_are_no_promises(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "witness.log")
    witness.acknowledged("order", 7, 801, "1.50")
    witness.note("buggy", 7, 802)
    witness.note("doubt", 9)
    witness.close()

    assert [entry.value for entry in witness.promises()] == ["1.50"]
    assert [entry.xid for entry in witness.notes("buggy")] == [802]
    assert [entry.token for entry in witness.notes("doubt")] == [9]
