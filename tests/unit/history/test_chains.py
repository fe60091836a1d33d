"""Net changes by chains of versions, against a model that knows each row by name."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from knockwood.history.chains import Chains, ctid, follow_moves, parse_place, place

FREE = [place(block, offset) for block in range(3) for offset in range(1, 5)]


@dataclass
class Heap:
    """A table's file with named rows, and the chains that are told of its changes."""

    rows: dict[int, str] = field(default_factory=dict)
    chains: Chains = field(default_factory=Chains)

    def free(self) -> list[int]:
        return [where for where in FREE if where not in self.rows]


Change = tuple[str, int, int, int]
changes = st.lists(
    st.tuples(
        st.sampled_from(["insert", "update", "delete", "move"]),
        st.integers(0, 1),
        st.integers(0, 1000),
        st.integers(0, 1000),
    ),
    max_size=60,
)


def play(heaps: list[Heap], steps: list[Change]) -> None:
    """Carry the steps out on model and chains alike; places that are free are used again."""
    for lsn, (kind, number, pick, other) in enumerate(steps, 1):
        heap = heaps[number]
        used, free = sorted(heap.rows), heap.free()
        if kind == "insert" and free:
            where = free[pick % len(free)]
            heap.rows[where] = f"new {lsn}"
            heap.chains.insert(where, lsn * 10, 7)
        elif kind == "update" and used and free:
            old, new = used[pick % len(used)], free[other % len(free)]
            heap.rows[new] = heap.rows.pop(old)
            heap.chains.update(old, new, lsn * 10, 7)
        elif kind == "delete" and used:
            old = used[pick % len(used)]
            del heap.rows[old]
            heap.chains.delete(old, lsn * 10, 7)
        elif kind == "move" and used and (there := heaps[1 - number].free()):
            old, new = used[pick % len(used)], there[other % len(there)]
            heaps[1 - number].rows[new] = heap.rows.pop(old)
            heap.chains.delete(old, lsn * 10, 7, moved=True)
            heaps[1 - number].chains.insert(new, lsn * 10 + 1, 7)


@given(st.sets(st.sampled_from(FREE), max_size=8), changes)
def test_net_changes_are_those_of_named_rows(begin: set[int], steps: list[Change]) -> None:
    heap = Heap({where: f"old {where}" for where in begin})
    before = dict(heap.rows)
    play([heap], [(kind, 0, pick, other) for kind, _, pick, other in steps if kind != "move"])
    found = list(heap.chains.net())
    after = {name: where for where, name in heap.rows.items()}
    for net in found:
        if net.origin is not None:
            assert after.get(before[net.origin]) == net.head
        else:
            assert net.head is not None
            assert heap.rows[net.head].startswith("new")
    touched = {net.origin for net in found}
    assert len([net for net in found if net.origin is not None]) == len(touched - {None})
    # What is not told did not change its place; every new row that is there is told.
    for where, name in before.items():
        assert where in touched or heap.rows.get(where) == name
    new = {where for where, name in heap.rows.items() if name.startswith("new")}
    assert {net.head for net in found if net.origin is None} == new


@given(st.sets(st.sampled_from(FREE), max_size=6), st.sets(st.sampled_from(FREE), max_size=6), changes)
def test_rows_are_followed_from_partition_to_partition(
    left: set[int], right: set[int], steps: list[Change]
) -> None:
    heaps = [Heap({where: f"{side} {where}" for where in begin}) for side, begin in enumerate((left, right))]
    before = {name: (side, where) for side, heap in enumerate(heaps) for where, name in heap.rows.items()}
    play(heaps, steps)
    after = {name: (side, where) for side, heap in enumerate(heaps) for where, name in heap.rows.items()}
    moves = follow_moves({side: heap.chains for side, heap in enumerate(heaps)})
    nets = {(side, net.number): net for side, heap in enumerate(heaps) for net in heap.chains.net()}
    origins = {
        (side, net.origin): (side, net.number) for (side, _), net in nets.items() if net.origin is not None
    }
    for name, start in before.items():
        chain = origins.get(start)
        if chain is None:
            assert after[name] == start
            continue
        end = moves.get(chain, chain)
        head = nets[end].head if end in nets else None
        assert after.get(name) == (None if head is None else (end[0], head))


def test_a_file_emptied_by_who_made_it_begins_anew() -> None:
    chains = Chains()
    chains.insert(place(0, 1))
    chains.clear()
    chains.insert(place(0, 1))
    assert [(net.origin, net.head) for net in chains.net()] == [(None, place(0, 1))]


def test_places_are_printed_as_ctids() -> None:
    assert ctid(place(70000, 12)) == "(70000,12)"
    assert parse_place("(70000,12)") == place(70000, 12)
    assert Counter(ctid(where) for where in FREE).most_common(1)[0][1] == 1
