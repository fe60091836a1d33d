"""Rows before and after, kept in a private file until they are joined: memory does not grow with them."""

from __future__ import annotations

import marshal
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Final

from knockwood.history.chains import ChainId
from knockwood.history.transaction import ColumnValue

BEFORE: Final = 0
AFTER: Final = 1

Values = Sequence[ColumnValue]
Entry = tuple[int, int, bytes | None, Values]
"""File number, chain number, the key that pairs a delete with an insert (None: no key), column values."""

_TABLES = """
create table row (side integer, file integer, chain integer, family integer, key blob, content blob,
                  primary key (side, file, chain)) without rowid;
create table change (number integer primary key, before_file integer, before_chain integer,
                     after_file integer, after_chain integer);
create table move (file integer, chain integer, to_file integer, to_chain integer,
                   primary key (file, chain)) without rowid;
create temp table done (side integer, file integer, chain integer,
                        primary key (side, file, chain)) without rowid;
"""

# What is left over on both sides under one key was deleted and inserted again: an update of that row.
# The count makes equal keys (tables without one are paired by the whole row) meet one to one.
_PAIR = """
insert into change (before_file, before_chain, after_file, after_chain)
with rest as (
    select side, file, chain, family, key,
           row_number() over (partition by side, family, key order by file, chain) as copy
    from row where key is not null and not exists (
        select 1 from done where done.side = row.side and done.file = row.file and done.chain = row.chain))
select b.file, b.chain, a.file, a.chain from rest b join rest a
    on a.family = b.family and a.key = b.key and a.copy = b.copy
where b.side = 0 and a.side = 1
"""

_SAME = """
insert into change (before_file, before_chain, after_file, after_chain)
select b.file, b.chain, a.file, a.chain from row b join row a
    on a.side = 1 and a.file = b.file and a.chain = b.chain where b.side = 0
"""

_MOVED = """
insert into change (before_file, before_chain, after_file, after_chain)
select b.file, b.chain, a.file, a.chain from move m
    join row b on b.side = 0 and b.file = m.file and b.chain = m.chain
    join row a on a.side = 1 and a.file = m.to_file and a.chain = m.to_chain
"""

_REST = """
insert into change (before_file, before_chain, after_file, after_chain)
select case side when 0 then file end, case side when 0 then chain end,
       case side when 1 then file end, case side when 1 then chain end
from row where not exists (
    select 1 from done where done.side = row.side and done.file = row.file and done.chain = row.chain)
"""

_DONE = """
insert or ignore into done
select 0, before_file, before_chain from change where before_file is not null
union all select 1, after_file, after_chain from change where after_file is not null
"""

_JOINED = """
select c.before_file, b.content, c.after_file, a.content
from change c
left join row b on b.side = 0 and b.file = c.before_file and b.chain = c.before_chain
left join row a on a.side = 1 and a.file = c.after_file and a.chain = c.after_chain
order by coalesce(c.before_file, c.after_file), coalesce(c.before_chain, c.after_chain), c.before_file is null
"""


class RowStore:
    """Rows by side, file and chain. Its file is of this run only, and goes with its folder."""

    def __init__(self, path: Path) -> None:
        # No promise about crashes is needed: a killed run's folder is thrown away.
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("pragma journal_mode = off")
        self._database.execute("pragma synchronous = off")
        self._database.executescript(_TABLES)

    def put(self, side: int, family: int, entries: Iterable[Entry]) -> int:
        """Keep rows; how many. Rows of one `family` (a table, or a partitioned one) can be paired by key."""
        before = self._database.total_changes
        self._database.execute("begin")
        self._database.executemany(
            "insert into row values (?, ?, ?, ?, ?, ?)",
            (
                (side, file, chain, family, key, marshal.dumps([(v.text, v.image) for v in values]))
                for file, chain, key, values in entries
            ),
        )
        self._database.execute("commit")
        return self._database.total_changes - before

    def has(self, side: int, file: int, chain: int) -> bool:
        found = self._database.execute(
            "select 1 from row where side = ? and file = ? and chain = ?", (side, file, chain)
        )
        return found.fetchone() is not None

    def leave_out(self, file: int) -> None:
        """After `join`: drop the changes that a file has part in."""
        self._database.execute("delete from change where before_file = ?1 or after_file = ?1", (file,))

    def forget(self, file: int) -> int:
        """Drop a file's rows; how many there were."""
        return self._database.execute("delete from row where file = ?", (file,)).rowcount

    def move(self, moves: Iterable[tuple[ChainId, ChainId]]) -> None:
        """Say where chains went on that left their partition."""
        self._database.executemany(
            "insert into move values (?, ?, ?, ?)", ((*start, *end) for start, end in moves)
        )

    def join(self) -> None:
        """Settle which row before is which row after: by chain, by move, then by key."""
        for statement in (_SAME, _MOVED, _DONE, _PAIR, _DONE, _REST):
            self._database.execute(statement)

    def changes(
        self,
    ) -> Iterator[tuple[int | None, list[ColumnValue] | None, int | None, list[ColumnValue] | None]]:
        """File and row before, file and row after, of every change, file by file in order of the WAL."""
        for before, old, after, new in self._database.execute(_JOINED):
            was, becomes = _values(old), _values(new)
            if was is not None and becomes is not None:
                # Most columns of an update stay as they are: one value does for both.
                becomes = [a if a == b else b for a, b in zip_longest(was, becomes) if b is not None]
            yield before, was, after, becomes

    def close(self) -> None:
        self._database.close()


def _values(content: bytes | None) -> list[ColumnValue] | None:
    if content is None:
        return None
    return [ColumnValue(text, image) for text, image in marshal.loads(content)]
