"""Images where a clone cannot simply stand before the commit and be read, and where WAL is long."""

from __future__ import annotations

import pytest

from fix_clones import protected
from fix_history import committed
from fix_receive import first_lsn
from fix_server import ServerFactory
from knockwood.errors import RefusedError
from knockwood.history.images import row_changes
from knockwood.history.spawners import clones_for
from knockwood.history.staging import StagedArchive
from knockwood.history.touched import Decoder, read_stretch, touched
from knockwood.model import WalSegment
from knockwood.postgres.connection import connect

_THREE = (
    "create table {0} (id int primary key, v int); insert into {0} select i, i from generate_series(1, 10) i;"
)


def test_tables_locked_one_after_the_other_while_others_write(new_server: ServerFactory) -> None:
    """Each is read just before its own lock: what others committed in between is in it, and is not blamed."""
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute("".join(_THREE.format(name) for name in ("a", "b", "c")))
        since = made.backup().start_lsn
        with connect(server.dsn()) as culprit:
            culprit.execute("begin")
            culprit.execute("update c set v = -1 where id = 1")
            culprit.execute("truncate a")
            made.execute("update b set v = 99 where id = 2")
            made.execute("update c set v = 99 where id = 2")
            culprit.execute("truncate b")
            culprit.execute("insert into b values (3, 33), (50, 50)")
            row = culprit.execute("select pg_current_xact_id()::text::bigint").fetchone()
            made.execute("update c set v = 100 where id = 3")
            culprit.execute("commit")
        assert row is not None
        transaction = committed(made, since)[row[0]]
        with row_changes(made.repository, [transaction], registry=made.registry) as changes:
            found = {(c.table.name, c.key["id"].text): c for c in changes}
            assert changes.complete
            assert changes.ddl == ()
        assert len(found) == 10 + 11 + 1
        assert {c.kind for (name, _), c in found.items() if name == "a"} == {"delete"}
        gone = found["b", "2"]
        assert gone.before is not None
        assert gone.before["v"].text == "99"
        kept = found["b", "3"]
        assert kept.before is not None
        assert kept.after is not None
        assert (kept.kind, kept.before["v"].text, kept.after["v"].text) == ("update", "3", "33")
        assert found["b", "50"].kind == "insert"
        assert found["c", "1"].kind == "update"
        assert made.registry.records() == []


def test_long_wal_is_read_in_stretches_and_a_clone_of_the_table_is_enough(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(_THREE.format("a"))
        made.execute("create table wide as select i, repeat('x', 500) as v from generate_series(1, 4000) i")
        since = made.backup().start_lsn
        with connect(server.dsn()) as connection, connection.transaction():
            connection.execute("update wide set v = repeat('y', 500) where i <= 3000")
            connection.execute("savepoint s")
            connection.execute("delete from wide where i > 3990")
            row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
        assert row is not None
        transaction = committed(made, since)[row[0]]
        size = made.repository.header.segment_bytes
        assert transaction.commit_lsn - transaction.first_lsn > 2 * size
        whole = touched(made.repository, server.programs, [transaction])
        assert transaction.subxids
        # The same, a segment at a time: records on the borders are neither lost nor taken twice.
        decoder = Decoder(transaction.xids)
        archive = StagedArchive(made.repository, transaction.timeline, transaction.commit_lsn)
        stretches = 0
        for stretch in archive.stretches(transaction.first_lsn, transaction.commit_lsn, chunk_bytes=1):
            until = stretch.end.value

            def take(block: bytes, until: int = until) -> None:
                decoder.take(block, until)

            read_stretch(server.programs, stretch, [], take)
            stretches += 1
        assert stretches > 2
        assert decoder.result.files.keys() == whole.files.keys()
        for file, found in whole.files.items():
            assert list(decoder.result.files[file].chains.net()) == list(found.chains.net())
        spawner = clones_for(made.repository, [transaction], registry=made.registry)
        with row_changes(made.repository, [transaction], spawner=spawner) as changes:
            kinds = [change.kind for change in changes]
        assert (kinds.count("update"), kinds.count("delete"), len(kinds)) == (3000, 10, 3010)
        assert made.registry.records() == []


@pytest.mark.slow
def test_a_clone_that_cannot_pause_is_promoted_and_another_made(new_server: ServerFactory) -> None:
    """More than 64 subtransactions were open at the backup: nobody can read before they end, unpromoted."""
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.execute(_THREE.format("a"))
        with connect(server.dsn()) as culprit:
            culprit.execute("begin")
            for number in range(1, 101):
                culprit.execute(f"savepoint s{number}".encode())
                culprit.execute(f"insert into a values ({number} + 100, {number})".encode())
            made.execute("select pg_switch_wal()")
            begun = made.backup().start_lsn
            culprit.execute("update a set v = 0 where id in (1, 101)")
            row = culprit.execute("select pg_current_xact_id()::text::bigint").fetchone()
            culprit.execute("commit")
        assert row is not None
        made.insert(1)
        made.flush()
        transaction = committed(made, first_lsn(made.repository))[row[0]]
        assert len(transaction.subxids) == 100
        with row_changes(made.repository, [transaction], registry=made.registry) as changes:
            kinds = [change.kind for change in changes]
        assert (kinds.count("update"), kinds.count("insert"), len(kinds)) == (1, 100, 101)
        # Without the WAL of its beginning it must not be told in part.
        lost = begun.value // made.repository.header.segment_bytes
        for path in (made.folder / "repository" / "wal").glob("*/*/*.zst"):
            segment = WalSegment.parse(path.name[:24], made.repository.header.segment_bytes)
            if segment.number < lost:
                path.unlink()
        rest = committed(made, WalSegment.containing(transaction.timeline, begun, 1 << 20).start)[row[0]]
        with pytest.raises(RefusedError, match="may have been running before"):
            row_changes(made.repository, [rest], registry=made.registry)
        assert made.registry.records() == []
