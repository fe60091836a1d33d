"""Lines of pg_waldump that are not as wide as the others."""

from __future__ import annotations

from knockwood.postgres.waldump import commit_from, raw_lsn
from knockwood.postgres.walreader import records

# `%6u/%6u`: from 100,000 bytes on no blank is left before the total length.
_LONG_COMMIT = (
    b"rmgr: Transaction len (rec/tot): 104457/104457, tx:        757, lsn: 0/0101ED48, prev 0/0101ED10,"
    b" desc: COMMIT 2026-11-21 08:09:57.576248 UTC; subxacts: 758 759\n"
)


def test_a_record_of_more_than_99_999_bytes_is_read() -> None:
    from knockwood.postgres.waldump import _COMMIT

    [record] = records(_LONG_COMMIT)
    assert record[:3] == (0x101ED48, 104457, b"Transaction")
    [raw] = _COMMIT.findall(_LONG_COMMIT)
    assert raw_lsn(raw) == 0x101ED48
    assert commit_from(raw).xid == 757
