"""What a clone of some relations fetches of a backup: what it needs, and nothing of anybody else's."""

from __future__ import annotations

import pytest

from knockwood.clone.partial_files import RelationKey, select
from knockwood.errors import ObjectMissingError
from knockwood.repository.backups.listing import Relation, RelationMap


def relation(database: str, number: int, name: str, oid: int, node: int, **more: object) -> Relation:
    values: dict[str, object] = {
        "kind": "r", "persistence": "p", "table": None, "shared": False, "schema": "public",
    }  # fmt: skip
    values |= more
    return Relation(
        database=database, database_oid=number, name=name, oid=oid, filenode=node,
        path=f"base/{number}/{node}", **values,  # type: ignore[arg-type]
    )  # fmt: skip


MAP = RelationMap(
    (
        relation("shop", 9, "pg_class", 1259, 1259),
        relation("shop", 9, "pg_proc", 1255, 20001),  # rewritten
        relation("shop", 9, "pg_largeobject", 2613, 2613),
        relation("shop", 9, "orders", 17000, 20002),
        relation("shop", 9, "orders_pkey", 17001, 20003, kind="i", table=17000),
        relation("shop", 9, "pg_toast_17000", 17002, 20004, kind="t", table=17000),
        relation("shop", 9, "pg_toast_17000_index", 17003, 20005, kind="i", table=17002),
        relation("shop", 9, "other", 17004, 20006),
        relation("shop", 9, "counter", 17005, 20007, kind="S"),
        relation("blog", 10, "posts", 17000, 20002),
        relation("blog", 10, "pg_class", 1259, 1259),
        relation("template1", 1, "pg_class", 1259, 1259),
    ),
    {"closed": "the database takes no connections"},
)
PATHS = [one.path for one in MAP.relations] + ["base/9/2840", "base/9/20099", "base/4/1259", "global/1260"]


def test_a_table_comes_with_its_family_and_the_catalogs_of_its_database() -> None:
    chosen = select(MAP, PATHS, [RelationKey("shop", "public", "orders")])
    fetched = {path for path in PATHS if chosen.wants(path)}
    assert fetched == {
        "base/9/1259", "base/9/20001", "base/9/2840", "global/1260", "base/9/20007",
        "base/9/20002", "base/9/20003", "base/9/20004", "base/9/20005",
    }  # fmt: skip
    assert chosen.entrance == "shop"
    assert chosen.wants("base/9/20002_vm")
    assert chosen.wants("base/9/20002.7")
    assert chosen.wants("pg_xact/0000")
    assert chosen.wants("base/10/PG_VERSION")
    assert not chosen.wants("log/postgresql.log")
    assert not chosen.wants("dump.sql")
    present, absent = chosen.split(PATHS)
    assert (1663, 10, 20002) in absent
    assert (1663, 9, 2613) in absent
    assert not present & absent


def test_into_a_database_that_was_made_since_nobody_can_log_in_at_first() -> None:
    chosen = select(
        MAP, PATHS, [RelationKey("shop", "public", "orders"), RelationKey("fresh", "public", "t")]
    )
    assert chosen.entrance == "template1"
    assert {path for path in PATHS if chosen.wants(path)} >= {"base/9/20002", "base/1/1259"}


def test_a_relation_is_found_by_its_number_too() -> None:
    by_oid = select(MAP, PATHS, [RelationKey("shop", oid=17004)])
    assert by_oid.wants("base/9/20006")
    assert not by_oid.wants("base/9/20002")
    by_node = select(MAP, PATHS, [RelationKey("shop", filenode=20099)])
    assert by_node.wants("base/9/20099")
    large = select(MAP, PATHS, [RelationKey("shop", "public", "pg_largeobject")])
    assert large.wants("base/9/2613")
    more = select(MAP, PATHS, [RelationKey("shop", "public", "orders")], [(1663, 9, 20006)])
    assert more.wants("base/9/20006")


def test_a_database_whose_map_is_missing_is_no_guess() -> None:
    with pytest.raises(ObjectMissingError, match="were not recorded"):
        select(MAP, PATHS, [RelationKey("closed", "public", "t")])
