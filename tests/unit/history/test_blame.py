"""Versions and deletions out of a log of changes."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from knockwood.history.blame import Deleted, Log, deletions, owners_of, stops_for, times_used, versions
from knockwood.history.chains import place
from knockwood.history.transaction import Transaction
from knockwood.model import Lsn, Timeline

FILE, OTHER = (1663, 5, 100), (1663, 5, 200)


def commit(xid: int, at: int, subxids: tuple[int, ...] = ()) -> Transaction:
    return Transaction(
        xid, Timeline(1), Lsn(at - 50), Lsn(at), Lsn(at + 8), datetime.fromtimestamp(at, UTC), subxids
    )


def test_versions_go_back_through_reused_places_and_partitions() -> None:
    owners = owners_of([commit(10, 100), commit(20, 200, (21,)), commit(30, 300), commit(40, 400)])
    log, other = Log(), Log()
    log.insert(1, 10, 10)
    log.update(1, 2, 110, 21)
    log.delete(2, 210, 30, moved=True)
    other.insert(5, 211, 30)
    log.insert(2, 310, 40)
    other.update(5, 6, 320, 40)
    logs = {FILE: log, OTHER: other}

    def told(file: tuple[int, int, int], where: int, xmin: int) -> list[tuple[str, int | None]]:
        found = versions(logs, owners, file, where, xmin)
        return [(each.kind, each.transaction.xid if each.transaction else None) for each in found]

    assert told(OTHER, 6, 40) == [("update", 40), ("move", 30), ("update", 20), ("insert", 10)]
    assert told(FILE, 2, 40) == [("insert", 40)]
    assert told(FILE, 2, 21) == [("update", 20), ("insert", 10)]
    assert told(FILE, 9, 40) == []
    assert told((1, 1, 1), 9, 40) == []


def test_rows_that_copy_put_somewhere() -> None:
    owners = owners_of([commit(10, 100), commit(20, 200)])
    log = Log()
    log.insert_somewhere(0, 10, 10)
    log.update(place(0, 7), place(0, 8), 110, 20)
    (update, insert) = versions({FILE: log}, owners, FILE, place(0, 8), 20)
    assert (update.kind, insert.kind) == ("update", "insert")
    assert insert.transaction is not None
    assert insert.transaction.xid == 10
    log.insert_somewhere(0, 120, 20)
    (_, insert) = versions({FILE: log}, owners, FILE, place(0, 8), 20)
    assert insert.transaction is not None
    log.insert_somewhere(0, 20, 20)
    (_, insert) = versions({FILE: log}, owners, FILE, place(0, 8), 20)
    assert insert.transaction is None


def test_deletions_tell_where_the_row_could_last_be_seen() -> None:
    first, second, third = commit(10, 100), commit(20, 200), commit(30, 300)
    log = Log()
    log.insert(1, 10, 10)
    log.update(1, 2, 110, 20)
    log.update(7, 8, 120, 20)
    log.insert(3, 130, 20)
    log.delete(3, 140, 20)
    log.update(2, 4, 210, 30)
    log.delete(4, 220, 30)
    log.delete(8, 230, 30)
    log.delete(50, 240, 30, moved=True)
    log.delete(9, 250, 30)
    found = list(deletions({FILE: log}, owners_of([first, second, third])))
    assert found == [
        Deleted(FILE, 2, Lsn(200), third),
        Deleted(FILE, 8, Lsn(200), third),
        Deleted(FILE, 9, Lsn(0), third),
    ]


def test_a_row_that_moved_and_was_deleted_is_followed() -> None:
    first, second = commit(10, 100), commit(20, 200)
    log, other = Log(), Log()
    log.delete(1, 10, 10, moved=True)
    other.insert(5, 11, 10)
    other.delete(5, 110, 20)
    log.delete(2, 120, 20, moved=True)
    other.insert(6, 121, 20)
    other.delete(6, 130, 20)
    found = list(deletions({FILE: log, OTHER: other}, owners_of([first, second])))
    assert found == [Deleted(OTHER, 5, Lsn(100), second), Deleted(FILE, 2, Lsn(0), second)]


lifetimes = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=30)


@given(lifetimes)
def test_every_deleted_row_is_seen_at_its_stop_with_as_few_stops_as_can_be(
    pairs: list[tuple[int, int]],
) -> None:
    rows = [
        Deleted(FILE, number, Lsn(start * 10), commit(1000 + start + length, (start + length) * 10))
        for number, (start, length) in enumerate(pairs)
    ]
    stops = stops_for(rows)
    assert sorted(row.place for _, group in stops for row in group) == list(range(len(rows)))
    for by, group in stops:
        # Just before a commit all earlier ones can be seen, and its own deletions not yet.
        assert all(row.since < by.commit_lsn <= row.by.commit_lsn for row in group)
    # The rows that made a stop necessary do not overlap: no fewer stops can do.
    makers = [group[0] for _, group in stops]
    assert all(later.since >= earlier.by.commit_lsn for earlier, later in itertools.pairwise(makers))


def test_how_often_a_number_was_used() -> None:
    assert times_used(700, 800) == 1
    assert times_used(900, 800) == 0
    assert times_used(700, (1 << 32) + 800) == 2
    assert times_used(900, (1 << 32) + 800) == 1
    assert times_used(2, (1 << 32) + 800) == 0
