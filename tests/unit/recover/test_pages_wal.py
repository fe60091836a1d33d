"""Records of any length are seen in what pg_waldump prints."""

from __future__ import annotations

from knockwood.recover.pages_wal import _LINE


def test_records_of_any_length_are_seen() -> None:
    """pg_waldump pads the length to six places; a longer one follows the slash at once."""
    for length in (b"    54/    54", b"    54/100054", b"100054/1100054"):
        line = (
            b"rmgr: XLOG        len (rec/tot): " + length + b", tx:          0, lsn: 0/01755ED0,"
            b" prev 0/01755E98, desc: FPI , blkref #0: rel 1663/5/2 blk 2 FPW\n"
        )
        [(_, size, _, lsn, _, _)] = _LINE.findall(line)
        assert (int(size), lsn) == (int(length.split(b"/")[1]), b"0/01755ED0")
