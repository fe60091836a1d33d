"""Pages checked in pieces; torn pages told from damaged ones."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import MissingPrivilegeError, ServerDownError
from knockwood.model import Lsn, Verdict
from knockwood.postgres.pages import PAGE_BYTES, checksums
from knockwood.repository.backups.pagecheck import PageCheck
from knockwood.repository.backups.tar import Member

START = Lsn(1000)
STOP = Lsn(9000)


def page(block: int, *, lsn: int = 500, good: bool = True) -> bytes:
    header = struct.pack("<IIHHHHHHI", lsn >> 32, lsn & 0xFFFFFFFF, 0, 0, 28, 8000, 8192, PAGE_BYTES | 4, 0)
    data = bytearray(header + bytes([block % 200 + 1]) * (PAGE_BYTES - 24))
    data[8:10] = struct.pack("<H", int(checksums(bytes(data), block)[0]))
    if not good:
        data[6000] ^= 1
    return bytes(data)


def run(path: str, content: bytes, sizes: list[int]) -> PageCheck:
    """Check a file cut into pieces of so many pages."""
    check = PageCheck(True)
    file = check.open(Member(path, len(content)))
    assert file is not None
    at = 0
    for size in [*(s * PAGE_BYTES for s in sizes), len(content)]:
        view = memoryview(content)[at : at + size]
        piece = file.piece(view, at)
        if piece is not None:
            check.check(piece, view)
        at += len(view)
        if at >= len(content):
            break
    return check


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.lists(st.integers(1, 4), max_size=5))
def test_bad_pages_are_found_however_a_file_is_cut(good: list[bool], sizes: list[int]) -> None:
    first = 131072
    content = b"".join(page(first + n, good=keep) for n, keep in enumerate(good))
    found = run("base/5/16384.1", content, sizes).suspects
    assert [one.block for one in found] == [first + n for n, keep in enumerate(good) if not keep]


@given(
    st.lists(st.tuples(st.integers(0, 131071), st.booleans()), max_size=12, unique_by=lambda t: t[0]),
    st.lists(st.integers(1, 4), max_size=4),
)
def test_blocks_of_an_incremental_file_are_checked_by_their_own_numbers(
    blocks: list[tuple[int, bool]], sizes: list[int]
) -> None:
    head = struct.pack(f"<III{len(blocks)}I", 0xD3AE1F0D, len(blocks), 100, *(b for b, _ in blocks))
    head += bytes(-len(head) % PAGE_BYTES if blocks else 0)
    content = head + b"".join(page(131072 + block, good=keep) for block, keep in blocks)
    found = run("base/5/INCREMENTAL.16384.1", content, sizes).suspects
    assert {one.block for one in found} == {131072 + block for block, keep in blocks if not keep}


def test_an_incremental_file_that_cannot_be_read_is_bad() -> None:
    check = run("base/5/INCREMENTAL.1", b"garbage" * 3000, [])
    health = check.health(START, STOP, lambda *_: None)
    assert (health.verdict, health.bad_page_count) == (Verdict.BROKEN, 1)


def judged(stored: bytes, now: bytes | None, path: str = "base/5/1") -> tuple[Verdict, list[str]]:
    health = run(path, stored, []).health(START, STOP, lambda *_: now)
    return health.verdict, [bad.reason for bad in health.bad_pages]


def test_a_page_torn_while_the_server_wrote_it_is_no_damage() -> None:
    assert judged(page(0, good=False), page(0, lsn=1001)) == (Verdict.HELD, [])


def test_a_page_still_bad_on_disk_is_damage_whatever_its_lsn_says() -> None:
    for lsn in (500, 5000):
        verdict, reasons = judged(page(0, good=False), page(0, lsn=lsn, good=False))
        assert verdict == Verdict.BROKEN
        assert "checksum" in reasons[0]


def test_a_page_that_nobody_wrote_must_be_the_same_in_the_copy() -> None:
    verdict, reasons = judged(page(0, good=False), page(0, lsn=500))
    assert verdict == Verdict.BROKEN
    assert "copy in the backup is bad" in reasons[0]


@pytest.mark.parametrize("path", ["base/5/1_fsm", "base/5/1_vm"])
def test_maps_change_without_an_lsn(path: str) -> None:
    assert judged(page(0, good=False), page(0, lsn=500), path) == (Verdict.HELD, [])


def test_a_file_dropped_or_truncated_since_is_no_damage() -> None:
    assert judged(page(0, good=False), None) == (Verdict.HELD, [])
    assert judged(page(0, good=False), b"") == (Verdict.HELD, [])


def test_a_file_caught_growing_is_no_damage_and_one_that_stays_cut_is() -> None:
    stored = page(0) + page(1)[:4096]
    assert judged(stored, page(1, lsn=2000)) == (Verdict.HELD, [])
    verdict, reasons = judged(stored, page(1)[:4096])
    assert (verdict, reasons) == (Verdict.BROKEN, ["the file ends in the middle of a page"])


@pytest.mark.parametrize(("lsn", "listed"), [(500, 1), (1000, 0), (9000, 0), (9001, 1)])
def test_where_files_may_not_be_read_the_lsn_tells_torn_pages(lsn: int, listed: int) -> None:
    def refuse(path: str, offset: int, length: int) -> bytes | None:
        raise MissingPrivilegeError("permission denied for function pg_read_binary_file")

    health = run("base/5/1", page(0, lsn=lsn, good=False), []).health(START, STOP, refuse)
    assert health.bad_page_count == listed
    if listed:
        assert "could not be read again" in health.bad_pages[0].reason


def test_what_cannot_be_read_again_is_listed() -> None:
    def gone(path: str, offset: int, length: int) -> bytes | None:
        raise ServerDownError("connection refused")

    health = run("base/5/1", page(0, lsn=2000, good=False), []).health(START, STOP, gone)
    assert health.verdict == Verdict.BROKEN


def test_many_bad_pages_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knockwood.repository.backups.pagecheck._SUSPECTS_KEPT", 5)
    monkeypatch.setattr("knockwood.repository.backups.pagecheck.BAD_PAGES_LISTED", 3)
    content = b"".join(page(n, good=False) for n in range(9))

    def same(path: str, offset: int, length: int) -> bytes:
        return content[offset : offset + length]

    health = run("base/5/1", content, [4]).health(START, STOP, same)
    assert (len(health.bad_pages), health.bad_page_count) == (3, 9)
