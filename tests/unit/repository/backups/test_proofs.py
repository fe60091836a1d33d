"""An incremental backup counts once a proof of it held."""

from __future__ import annotations

from datetime import UTC, datetime

from fix_archive import a_backup
from knockwood.model import Lsn
from knockwood.repository.backups.proofs import proved_clean, trusted

NOW = datetime(2026, 6, 15, tzinfo=UTC)
FULL = a_backup("full", 1, Lsn(1), Lsn(2), NOW)
LATER = a_backup("later", 1, Lsn(3), Lsn(4), NOW, parent="full")
HELD = {"verdict": "held", "backup": "later"}


def test_what_is_not_understood_proves_nothing() -> None:
    assert proved_clean([None, 5, {}, {"verdict": "held", "backup": 7}]) == frozenset()
    assert proved_clean([HELD, {"verdict": "not_checked", "backup": "full"}]) == {"later"}


def test_unproved_ones_are_left_out_where_there_are_others() -> None:
    assert trusted([FULL, LATER], []) == [FULL]
    assert trusted([FULL, LATER], [HELD]) == [FULL, LATER]
    assert trusted([LATER], [HELD | {"verdict": "broken"}]) == [LATER]
    assert trusted([], []) == []
