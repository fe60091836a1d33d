"""Random transactions on every built-in type there and back, in small; in full: `make bench-round-trip`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_revert import Reverter
from knockwood.errors import RefusedError
from knockwood.history.reading import Reader
from knockwood.history.shapes import Catalog
from knockwood.integrity.tables import open_pinned, types_of
from knockwood.postgres.connection import connect

if TYPE_CHECKING:
    from fix_server import ServerFactory

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.slow
@pytest.mark.usefixtures("bench")
@pytest.mark.timeout(600)
def test_there_and_back(shared_folder: Path) -> None:
    from round_trip import Tally, run

    tally = Tally()
    run(18, 4, 10, tally, size=10, parent=shared_folder)
    assert tally.wrong == []
    assert (tally.cases, tally.back, tally.forth) == (10, 10, 10)
    assert tally.rows > 20


@pytest.mark.slow
@pytest.mark.usefixtures("bench")
@pytest.mark.timeout(600)
def test_culprits_are_reverted_exactly_or_refused_exactly(shared_folder: Path) -> None:
    from culprit_cases import CULPRITS
    from culprit_matrix import run

    came = run(18, CULPRITS, shared_folder)
    assert [each for each in came if each.wrong] == []
    assert sum(each.answer.startswith("reverted") for each in came) == 17
    assert sum(each.answer.startswith("refused") for each in came) == 7


@pytest.mark.usefixtures("bench")
def test_the_judge_sees_what_compares_as_equal(new_server: ServerFactory) -> None:
    from round_schema import Judge

    server = new_server(18)
    with connect(server.dsn()) as connection:
        connection.execute(
            "create table a (id int, n numeric); create table b (id int, f float8); create table c (id int);"
            "insert into a values (1, 1.0), (2, null); insert into b values (1, 0), (1, 0); insert into c values (1)"
        )
        judge = Judge(connection, ["public"])
        judge.keep(5)
        connection.execute("update c set id = id; delete from a where id = 2; insert into a values (2, null)")
        assert judge.differences(5) == {}
        connection.execute("update a set n = 1.00 where id = 1; update b set f = '-0' where ctid = '(0,1)'")
        assert judge.differences(5) == {"public.a": 1, "public.b": 1}
        connection.execute("delete from c")
        assert judge.differences(5)["public.c"] == 1


def test_send_functions_take_the_types_that_have_them(new_server: ServerFactory, every_version: int) -> None:
    server = new_server(every_version)
    with open_pinned(server.dsn(), None) as connection:
        connection.execute(
            "create schema s; create domain s.cursors as refcursor; create type s.e as enum ('a')"
        )
        types = types_of(connection)
        named = {each.name.split(".")[1]: each for each in types.values()}
        assert named["refcursor"].send is None
        assert named["int4range"].send is not None
        skipped = 0
        for each in types.values():
            if each.send is None or each.kind in "pd":
                skipped += 1
                continue
            connection.execute(f"select {each.send}(null::{each.name})".encode())
        assert skipped < len(types) / 2


def test_what_cannot_be_read_back_is_refused(new_server: ServerFactory, tmp_path: Path) -> None:
    made = Reverter(new_server(18), tmp_path)
    made.sql(
        "create table t (id int primary key, at timestamp(0)); create table u (id int primary key, of regclass);"
        "create table named (); insert into u values (1, 'named');"
        "insert into t values (1, '294276-12-31 23:59:59.999999')"
    )
    rounded = made.culprit("delete from t")
    with pytest.raises(RefusedError, match="t back: timestamp out of range"):
        made.examine(made.request(rounded))
    renamed = made.culprit("delete from u")
    made.sql("alter table named rename to anew")
    with pytest.raises(RefusedError, match=r'u back: relation "public\.named" does not exist'):
        made.examine(made.request(renamed))


def test_xml_is_read_with_its_declaration(new_server: ServerFactory) -> None:
    """PostgreSQL shows and sends it without."""
    server = new_server(17)
    value = "<?xml version='1.0'?><r/>"
    with open_pinned(server.dsn(), None) as connection:
        connection.execute("create table public.t (a xml, b xml[], c xml[])")
        connection.execute("insert into public.t values (%s, array[%s::xml, null], '{}')", [value, value])
        catalog = Catalog(server.dsn(), "postgres")
        [shape] = catalog.shapes(catalog.named("public", "t")).values()
        [row] = Reader(catalog, shape, None).all()
        texts = [each.text for each in row.values]
        back = connection.execute(
            "select (%s::xml)::text, (%s::xml[])[1]::text, (%s::xml[])[2] is null, %s::xml[]::text",
            [texts[0], texts[1], texts[1], texts[2]],
        ).fetchone()
        catalog.connection.close()
    assert back == (value, value, True, "{}")
