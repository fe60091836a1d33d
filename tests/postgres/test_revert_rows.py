"""Reverts of known changes on a real server: the rows come back, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest

from fix_revert import Reverter, fingerprint
from knockwood.recover.plan.rows import Culprit
from knockwood.recover.revert_spool import decode

if TYPE_CHECKING:
    from fix_server import ServerFactory

_SHOP = """
create schema "Odd ""s%";
create type mood as enum ('sad', 'ok', 'happy');
create domain amount as numeric(12, 2) check (value >= 0);
create type pair as (a int, b text);
create domain tags as text[];
create table customer (id int primary key, name text not null, balance amount not null default 0, note text);
create table orders (
    id bigint generated always as identity primary key,
    customer int references customer on delete cascade,
    total amount,
    doubled numeric generated always as (total * 2) stored
);
create table "Odd ""s%"."All % types" (
    "the %s key" uuid primary key default gen_random_uuid(),
    i2 smallint, f8 double precision, n numeric, m money, c char(5), v varchar(10) collate "C", q "char",
    b bytea, j json, jb jsonb, mo mood, am amount, p pair, ps pair[], tg tags, ia int[], ia2 int[][], ba box[],
    bx box, ir int4range, mr int4multirange, iv interval, ts timestamptz, tr tsrange, ip inet, bi bit(3),
    ts_v tsvector, moods mood[], d date
);
insert into customer select i, 'name ' || i, i, 'note ' || i from generate_series(1, 100) i;
insert into orders (customer, total) select i % 100 + 1, i from generate_series(1, 300) i;
insert into "Odd ""s%"."All % types"
select md5(i::text)::uuid, i, i / 3.0, i::numeric / 7, i::text::money, 'c' || i, 'v', 'q', '\\xdeadbeef',
       '{"a": [1 ,2]}',
       '{"b": 1}', 'ok', i, row(i, 'x,"y')::pair, array[row(i, null)::pair, null],
       array['a"', '{b}', null], array[i, null],
       array[[1, 2], [3, 4]], array[box '((0,0),(1,1))', box '((2,2),(3,3))'],
       box '((0,0),(5,5))', '[1,5)', '{[1,3),[5,7)}',
       '1 mon 2 days 24 hours', '2026-01-01 12:00+00', '[2026-01-01, 2026-02-01)',
       '10.0.0.1/8', '101', to_tsvector('english', 'a fat cat'),
       array['sad', 'happy']::mood[], 'infinity'
from generate_series(1, 20) i;
"""


@pytest.fixture
def shop(new_server: ServerFactory, tmp_path: Path) -> Reverter:
    return _shop(new_server, tmp_path, 18)


def _shop(new_server: ServerFactory, tmp_path: Path, version: int) -> Reverter:
    # An identity column that is always generated cannot be updated.
    made = Reverter(new_server(version), tmp_path, by_key=("orders",))
    made.sql(_SHOP)
    return made


@pytest.mark.parametrize("version", [15, pytest.param(17, marks=pytest.mark.slow), 18])
def test_updates_deletes_and_inserts_come_back_and_go_again(
    new_server: ServerFactory, tmp_path: Path, version: int
) -> None:
    shop = _shop(new_server, tmp_path, version)
    before = fingerprint(shop.dsn)
    rogue = shop.culprit(
        "update customer set balance = balance * 10, name = upper(name) where id <= 40",
        "delete from orders where id > 250",
        "delete from customer where id = 100",
        "insert into customer values (1000, 'new', 1, null)",
        "insert into orders (customer, total) values (1000, 7)",
        'update "Odd ""s%"."All % types" set i2 = -1, f8 = \'-0\','
        " n = 1.500, m = '5', c = '', v = '', q = 'x', b = '',"
        " j = '[]', jb = 'null', mo = 'sad', am = null, p = null, ps = '{}', tg = '{}', ia = null,"
        " ia2 = '{}', ba = null, bx = null,"
        " ir = 'empty', mr = '{}', iv = '1 day', ts = 'infinity', tr = null, ip = '::1', bi = '000', ts_v = '',"
        " moods = '{}', d = '4713-01-01 BC' where i2 <= 10",
        'delete from "Odd ""s%"."All % types" where i2 > 15',
    )
    after = fingerprint(shop.dsn)
    assert before != after
    done = shop.revert(rogue)
    again = fingerprint(shop.dsn)
    assert {name: rows for name, rows in again.items() if "_seq" not in name} == {
        name: rows for name, rows in before.items() if "_seq" not in name
    }
    assert again["orders_id_seq"] == after["orders_id_seq"]
    assert done.values["rows"] == len(rogue.changes)
    # Twice: nothing is left to be done.
    plan = shop.plan(shop.request(rogue))
    assert plan.steps == ()
    assert plan.refused == ("nothing is left to be reverted",)


_STATEMENTS = (
    "update customer set balance = balance + {n} where id % 7 = {n} % 7",
    "update customer set name = 'n{n}', note = null where id between {n} and {n} + 9",
    (
        "update customer c set id = id + 100000 where id % 10 = {n} % 10"
        " and not exists (select from orders o where o.customer = c.id)"
    ),
    "delete from customer where id % 31 = {n} % 31",
    "delete from orders where id % 11 = {n} % 11",
    "insert into customer select 10000 + {n} * 10 + i, 'fresh' from generate_series(1, 5) i on conflict do nothing",
    "insert into orders (customer, total) select id, {n} from customer where id % 13 = {n} % 13",
    "update orders set total = null where id % 17 = {n} % 17",
    "update orders set customer = (select min(id) from customer) where id % 19 = {n} % 19",
    (
        "update {types} set i2 = i2 + 1, ps = ps || ps[:1], jb = jsonb_build_array(d), moods = null"
        " where i2 % 3 = {n} % 3"
    ),
    "delete from {types} where i2 % 5 = {n} % 5",
    (
        'insert into {types} ("the %s key", i2, am, p, ir, ts)'
        " select gen_random_uuid(), i, {n}, row(i, 'x')::pair, int4range(i, i + 9), now() from generate_series(1, 3) i"
    ),
    "update customer set balance = 0; update customer set balance = {n} where id % 2 = 0",
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_transactions_there_and_back(new_server: ServerFactory, tmp_path: Path, seed: int) -> None:
    """Revert equals before, and the revert of the revert equals after; forty transactions for each seed."""
    shop = _shop(new_server, tmp_path, (15, 17, 18)[seed % 3])
    random = Random(seed)
    for _ in range(40):
        chosen = random.sample(_STATEMENTS, random.randint(1, 4))
        before = _rows_only(shop)
        rogue = shop.culprit(
            *(each.format(n=random.randint(1, 60), types='"Odd ""s%"."All % types"') for each in chosen)
        )
        after = _rows_only(shop)
        if not rogue.changes:
            continue
        done = shop.revert(rogue)
        assert _rows_only(shop) == before
        evidence = next(path for path in done.evidence)
        [undone] = decode(Path(evidence).read_bytes())
        shop.revert(Culprit(1, undone.changes))
        assert _rows_only(shop) == after


def _rows_only(shop: Reverter) -> dict[str, object]:
    return {name: rows for name, rows in fingerprint(shop.dsn).items() if not name.endswith("_seq")}
