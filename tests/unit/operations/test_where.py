"""Expressions and table names as people type them."""

from __future__ import annotations

import pytest

from knockwood.errors import UsageError
from knockwood.operations.diff import name_parts, parse_table
from knockwood.operations.where import checked_expression


@pytest.mark.parametrize(
    "text",
    [
        "id = 7",
        "name = 'a;b' and (x or y)",
        "name = 'it''s'",
        r"name = E'a\';b'",
        '"odd;name)" = 1',
        "body = $$a;)b$$ or body = $q$;$$;$q$",
        "id = 1 -- a comment; with all (sorts",
        "id /* ; ( /* nested */ ) */ = 1",
        "a.b$c = 1",
        "x::text like '%s'",
    ],
)
def test_expressions(text: str) -> None:
    assert checked_expression(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "-- nothing",
        "id = 1; drop table t",
        "1 = 1) or (1 = 1",
        "(id = 1",
        "name = 'open",
        r"name = 'a\'; drop table t",
        r"name = somE'a\'; drop table t --'",
        "body = $q$ open",
        "x /* open",
        '"open',
    ],
)
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(UsageError):
        checked_expression(text)


def test_table_names() -> None:
    assert parse_table("orders") == (None, "orders")
    assert parse_table("public.orders") == ("public", "orders")
    assert parse_table('"Sa.les"."Or""ders"') == ("Sa.les", 'Or"ders')
    assert name_parts("shop.public.orders") == ["shop", "public", "orders"]
    for text in ("", ".", "a.", ".a", "a..b", "a.b.c.d", '"open', '"a"b', '"a".'):
        with pytest.raises(UsageError):
            name_parts(text)
    with pytest.raises(UsageError):
        parse_table("shop.public.orders")
