"""Messages that say what was mended: written, read, and told from others."""

from __future__ import annotations

from knockwood.integrity.mended import Mended, mended
from knockwood.model import Lsn

ONE = Mended("pg_tblspc/16400/PG_18_202506291/5/16384", 7, Lsn.parse("1/A0B0C0D0"))


def test_what_is_written_is_read() -> None:
    assert mended([ONE.text.encode()]) == {ONE}
    assert ONE.text in ONE.statement


def test_other_messages_say_nothing() -> None:
    others = (b"page repair", b"mended base/5/1 x 0/1", b"mended base/5/1 1 0/1 more", b"\xff\xfe", b"")
    assert mended(others) == frozenset()
