"""Culprits as they come in life: what they do, the good work that follows, and what a revert must come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from knockwood.recover.plan.rows import Mode


@dataclass(frozen=True, slots=True)
class Culprit:
    """One case. In all SQL `{s}` is the schema: the one the culprit runs in, or its mirror, where it never ran.

    `setup` and `later` (the good work) run in both, `only` in the mirror alone: what the revert is to come to
    beside them. `beside` holds a transaction of another session open meanwhile. `conflicts` are those that
    must refuse the revert, by kind, table and columns; `refused` a part of the reason where it is refused
    outright.
    """

    name: str
    setup: str
    does: tuple[str, ...]
    later: str = ""
    only: str = ""
    beside: str = ""
    copies: tuple[str, ...] = ()
    two_phase: bool = False
    mode: Mode = Mode.STRICT
    counters: tuple[str, ...] = ()
    conflicts: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    refused: str = ""


_T: Final = (
    "create table {s}.t (id int primary key, a int, b text);"
    " insert into {s}.t select i, i, 'row ' || i from generate_series(1, 40) i"
)
_FAMILY: Final = (
    "create table {s}.p (id int primary key, v int); create table {s}.c (id int primary key,"
    " p int not null references {s}.p on delete cascade on update cascade);"
    " insert into {s}.p select i, i from generate_series(1, 10) i;"
    " insert into {s}.c select i, i % 10 + 1 from generate_series(1, 40) i"
)
_LONG: Final = "(select string_agg(md5((i * {0})::text), '') from generate_series(1, 400) i)"

CULPRITS: Final = (
    Culprit(
        "subtransactions, some rolled back",
        _T,
        (
            "update {s}.t set a = 0 where id <= 10; savepoint one; update {s}.t set a = -1 where id <= 5",
            "delete from {s}.t where id = 20; rollback to one; savepoint two",
            "delete from {s}.t where id = 30; insert into {s}.t values (50, 0, 'x'); release two",
            "savepoint three; update {s}.t set b = 'gone' where id = 7; rollback to three",
        ),
        "update {s}.t set b = 'good' where id in (1, 7, 20)",
    ),
    Culprit(
        "rows locked by others meanwhile (multixacts)",
        _T,
        ("update {s}.t set a = 0 where id <= 10", "savepoint s; update {s}.t set b = 'x' where id <= 3"),
        "update {s}.t set a = 5 where id = 30",
        beside="select 1 from {s}.t where id <= 20 for key share",
    ),
    Culprit(
        "cascade",
        _FAMILY,
        ("delete from {s}.p where id <= 3", "update {s}.p set id = id + 100 where id > 8"),
        "insert into {s}.c values (100, 5); update {s}.p set v = 50 where id = 5",
    ),
    Culprit(
        "partition moves",
        "create table {s}.t (id int, r text, v int, primary key (id, r)) partition by list (r);"
        " create table {s}.t_a partition of {s}.t for values in ('a');"
        " create table {s}.t_b partition of {s}.t for values in ('b');"
        " insert into {s}.t select i, 'a', i from generate_series(1, 20) i",
        ("update {s}.t set r = 'b', v = 0 where id <= 5", "update {s}.t set r = 'a' where id = 5"),
        "insert into {s}.t values (21, 'b', 21); update {s}.t set v = 90 where id = 9",
    ),
    Culprit(
        "TOAST: large values changed, and kept beside a change",
        "create table {s}.t (id int primary key, big text, n int);"
        f" insert into {{s}}.t select g, {_LONG.format('g')}, g from generate_series(1, 6) g",
        (
            f"update {{s}}.t set big = {_LONG.format('7')} where id = 1; update {{s}}.t set n = 0 where id = 2",
            "update {s}.t set big = null where id = 3; delete from {s}.t where id = 4",
            "update {s}.t set big = big || 'x' where id = 5; update {s}.t set big = big || 'y' where id = 5",
        ),
        "update {s}.t set n = 77 where id in (1, 5, 6)",
    ),
    Culprit(
        "COPY", _T, (), "update {s}.t set a = 1 where id = 2", copies=("t", "60\t1\tcopied", "61\t\\N\t")
    ),
    Culprit(
        "two-phase commit",
        _T,
        ("update {s}.t set a = 0 where id <= 3", "savepoint s; delete from {s}.t where id = 4"),
        "update {s}.t set b = 'good' where id = 1",
        two_phase=True,
    ),
    Culprit(
        "rows written several times",
        _T,
        (
            "update {s}.t set a = 0 where id <= 3; update {s}.t set a = 1, b = '' where id <= 3",
            "update {s}.t set a = id where id = 2",
            "insert into {s}.t values (70, 1, ''); delete from {s}.t where id = 70",
            "delete from {s}.t where id = 9; insert into {s}.t values (9, 0, 'again')",
            "update {s}.t set a = 4 where id = 9",
        ),
        "update {s}.t set a = 8 where id = 30",
    ),
    Culprit("TRUNCATE", _T, ("truncate {s}.t",), "insert into {s}.t values (90, 90, 'good')"),
    Culprit(
        "DDL",
        _T,
        ("alter table {s}.t add column extra int", "update {s}.t set a = 0"),
        refused="changed the schema",
    ),
    Culprit(
        "key change",
        _T,
        ("update {s}.t set id = id + 1000 where id <= 5", "update {s}.t set id = 1 where id = 6"),
        "update {s}.t set a = 70 where id = 7",
    ),
    Culprit(
        "later edits of other columns",
        _T,
        ("update {s}.t set a = 0",),
        "update {s}.t set b = 'good' where id <= 20; delete from {s}.t where a is null",
    ),
    Culprit(
        "later edits of the same columns",
        _T,
        ("update {s}.t set a = 0",),
        "update {s}.t set a = 5, b = 'good' where id <= 2",
        conflicts=(("changed since", "t", ("a",)), ("changed since", "t", ("a",))),
    ),
    Culprit(
        "the same, skip-conflicts",
        _T,
        ("update {s}.t set a = 0",),
        "update {s}.t set a = 5, b = 'good' where id <= 2",
        mode=Mode.SKIP,
    ),
    Culprit(
        "the same, force",
        _T,
        ("update {s}.t set a = 0",),
        "update {s}.t set a = 5, b = 'good' where id <= 2",
        "update {s}.t set a = id where id <= 2",
        mode=Mode.FORCE,
    ),
    Culprit(
        "the same, cascade",
        _T,
        ("update {s}.t set a = 0",),
        "update {s}.t set a = 5, b = 'dependent' where id <= 2",
        "update {s}.t set a = id, b = 'row ' || id where id <= 2",
        mode=Mode.CASCADE,
    ),
    Culprit(
        "a number that only adds up",
        "create table {s}.t (id int primary key, total numeric(12, 2)); insert into {s}.t values (1, 10.5), (2, 20)",
        ("update {s}.t set total = total + 100.25",),
        "update {s}.t set total = total + 3 where id = 1",
        counters=("t.total",),
    ),
    Culprit(
        "inserted parent with good children",
        _FAMILY,
        ("insert into {s}.p values (99, 1), (98, 1)",),
        "",
        conflicts=(("other rows reference it", "p", ("id",)),) * 2,
    ),
    Culprit(
        "deleted row whose key is taken",
        _T,
        ("delete from {s}.t where id <= 2",),
        "delete from {s}.t where id = 1; insert into {s}.t values (1, 0, 'new')",
        conflicts=(("key reused", "t", ("a", "b")),),
    ),
    Culprit(
        "updated row that is gone, inserted row that was changed",
        _T,
        ("update {s}.t set a = 0 where id = 1", "insert into {s}.t values (80, 1, 'x')"),
        "delete from {s}.t where id = 1; update {s}.t set b = 'edited' where id = 80",
        conflicts=(("gone since", "t", ()), ("inserted row changed since", "t", ("b",))),
    ),
    Culprit(
        "child put back, its parent gone",
        _FAMILY,
        ("delete from {s}.c where p = 2",),
        "delete from {s}.p where id = 2",
        conflicts=(("referenced row is gone", "c", ("p",)),) * 4,
    ),
    Culprit(
        "the table rewritten since",
        _T,
        ("update {s}.t set a = 0 where id <= 3",),
        "vacuum full {s}.t; alter table {s}.t add column late int default 3;"
        " alter table {s}.t alter column late type bigint",
    ),
    Culprit(
        "deleted and inserted rows, a column added since",
        _T,
        ("delete from {s}.t where id = 9", "insert into {s}.t values (80, 1, 'x')"),
        "alter table {s}.t add column late int default 3",
        conflicts=(("table altered since", "t", ("late",)),) * 2,
    ),
    Culprit(
        "an unlogged table beside",
        _T + "; create unlogged table {s}.u (id int)",
        ("update {s}.t set a = 0", "insert into {s}.u values (1)"),
        only="insert into {s}.u values (1)",
    ),
)
"""The matrix, in the order of the table."""

AFTER: Final = {
    "inserted parent with good children": "insert into {s}.c values (200, 99), (201, 98)",
}
"""Good work that the mirror, without the culprit, cannot have."""
