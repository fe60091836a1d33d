from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from knockwood.clone.pieces import Piece, bar, fences, stub
from knockwood.postgres.pages import PAGE_BYTES, bad_pages, decode_header

if TYPE_CHECKING:
    from pathlib import Path

_BLOCKS = st.frozensets(st.integers(0, 60), max_size=20)


def read(path: Path, block: int) -> bytes:
    return path.read_bytes()[block * PAGE_BYTES : (block + 1) * PAGE_BYTES]


def fence(block: int) -> bytes:
    [(_, page)] = fences([block])
    return page


def test_a_fence_is_a_sound_empty_page_newer_than_any_record() -> None:
    page = fence(7)
    assert list(bad_pages(page, 7, True)) == []
    header = decode_header(page)
    assert header.lsn.value == (1 << 64) - 1
    assert (header.lower, header.upper, header.special) == (24, PAGE_BYTES, PAGE_BYTES)
    assert list(bad_pages(page, 8, True))


def test_a_bar_is_refused_with_checksums_and_without() -> None:
    assert list(bad_pages(bar(), 3, True))
    assert list(bad_pages(bar(), 3, False))


def test_what_is_here_what_is_fenced_and_what_is_barred(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    piece = Piece("base/9", frozenset([2, 3]), 10)
    piece.make(tmp_path, {2: b"a" * PAGE_BYTES, 3: b"b" * PAGE_BYTES}, None)
    piece.beside(("", 5), 100, made_whole=False)
    piece.beside(("vm", 0), 100, made_whole=False)
    piece.guard(tmp_path, None)
    file = tmp_path / "base/9"
    assert file.stat().st_size == 10 * PAGE_BYTES
    assert [read(file, block)[:1] for block in (2, 3)] == [b"a", b"b"]
    assert read(file, 5) == fence(5)
    assert read(tmp_path / "base/9_vm", 0) == fence(0)
    assert [block for block in range(10) if read(file, block) == bar()] == [0, 4, 6]


def test_what_replay_made_of_a_fence_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    piece = Piece("base/9", frozenset([0]), 4)
    piece.make(tmp_path, {0: b"a" * PAGE_BYTES}, None)
    piece.beside(("", 2), 100, made_whole=False)
    piece.guard(tmp_path, None)
    piece.beside(("", 2), 200, made_whole=True)
    file = tmp_path / "base/9"
    with file.open("r+b") as handle:
        handle.seek(2 * PAGE_BYTES)
        handle.write(b"c" * PAGE_BYTES)
    piece.guard(tmp_path, None)
    assert read(file, 2) == b"c" * PAGE_BYTES
    assert not piece.holds(("", 2), 199)
    assert piece.holds(("", 2), 200)


def test_a_bar_gives_way_to_a_fence_and_a_fork_grows(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    piece = Piece("base/9", frozenset([1]), 4)
    piece.make(tmp_path, {}, None)
    piece.guard(tmp_path, None)
    file = tmp_path / "base/9"
    assert read(file, 0) == bar()
    piece.beside(("", 0), 100, made_whole=False)
    piece.beside(("", 7), 100, made_whole=False)
    piece.guard(tmp_path, None)
    assert read(file, 0) == fence(0)
    assert read(file, 7) == fence(7)


@given(_BLOCKS, _BLOCKS, st.integers(1, 60))
def test_whoever_scans_a_table_of_which_something_is_missing_meets_a_bar(
    held: frozenset[int], fenced: frozenset[int], pages: int
) -> None:
    piece = Piece("base/9", held, pages)
    for block in fenced - held:
        piece.beside(("", block), 1, made_whole=False)
    here = held | fenced
    bars = piece.bars()
    assert not here & set(bars)
    for block in range(pages):
        if block not in here:
            assert any(each <= block and not here & set(range(each, block)) for each in bars)


def test_of_an_index_only_the_first_page_can_be_read(tmp_path: Path) -> None:
    stub(tmp_path, "16400", b"m" * PAGE_BYTES, None)
    assert read(tmp_path / "16400", 0) == b"m" * PAGE_BYTES
    assert read(tmp_path / "16400", 1) == bar()
