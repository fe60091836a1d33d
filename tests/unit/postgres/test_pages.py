"""Page checksums and headers against a slow, literal reading of PostgreSQL's checksum_impl.h."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.postgres import pages
from knockwood.postgres.pages import PAGE_BYTES, bad_pages, checksums, decode_header, relation_file

M32 = 0xFFFFFFFF


def literal_checksum(page: bytes, block: int) -> int:
    """pg_checksum_page, word by word."""
    words = list(struct.unpack("<2048I", page))
    words[2] &= 0xFFFF0000
    sums = [int(base) for base in pages._BASES]

    def mix(total: int, value: int) -> int:
        mixed = total ^ value
        return ((mixed * 16777619) & M32) ^ (mixed >> 17)

    for row in range(64):
        for column in range(32):
            sums[column] = mix(sums[column], words[row * 32 + column])
    for _ in range(2):
        sums = [mix(total, 0) for total in sums]
    result = 0
    for total in sums:
        result ^= total
    return ((result ^ block) & M32) % 65535 + 1


def a_page(fill: bytes, block: int, *, lower: int = 28, upper: int = 8000, special: int = 8192) -> bytes:
    body = (fill * (PAGE_BYTES // len(fill) + 1))[: PAGE_BYTES - 24]
    header = struct.pack("<IIHHHHHHI", 0, 4096, 0, 0, lower, upper, special, PAGE_BYTES | 4, 0)
    page = header + body
    return page[:8] + struct.pack("<H", literal_checksum(page, block)) + page[10:]


BODIES = st.binary(min_size=1, max_size=64)
BLOCKS = st.integers(0, 2**32 - 1)


@given(st.lists(BODIES, min_size=1, max_size=4), st.integers(0, 2**32 - 10))
def test_checksums_are_postgresqls(bodies: list[bytes], first: int) -> None:
    buffer = b"".join((body * 8192)[:PAGE_BYTES] for body in bodies)
    expected = [
        literal_checksum(buffer[i * PAGE_BYTES : (i + 1) * PAGE_BYTES], first + i) for i in range(len(bodies))
    ]
    assert checksums(buffer, first).tolist() == expected


@given(BODIES, BLOCKS)
def test_a_whole_page_is_good_and_elsewhere_it_is_not(body: bytes, block: int) -> None:
    page = a_page(body, block)
    assert bad_pages(page, block, True) == []
    assert bad_pages(page, (block + 1) & M32, True) != []
    assert bad_pages(page, block + 1, False) == []


@given(BODIES, st.integers(0, 200_000), st.integers(0, 200_000))
def test_where_a_page_fits_is_told(body: bytes, block: int, count: int) -> None:
    """Wherever it would pass for whole, and nowhere else."""
    page = a_page(body, block)
    fitting = pages.fitting_blocks(page, count)
    assert (block in fitting) == (block < count)
    stored = decode_header(page).checksum
    right = pages.checksums_at(page, range(count))
    assert fitting == [number for number, checksum in enumerate(right) if checksum == stored]


def test_a_page_without_a_checksum_fits_nowhere() -> None:
    assert pages.fitting_blocks(bytes(PAGE_BYTES), 1 << 20) == []


@given(BODIES, st.integers(0, PAGE_BYTES * 8 - 1))
def test_any_flipped_bit_is_found(body: bytes, bit: int) -> None:
    page = bytearray(a_page(body, 7))
    page[bit // 8] ^= 1 << bit % 8
    assert [block for block, _ in bad_pages(bytes(page), 7, True)] == [7]


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 100))
def test_exactly_the_bad_pages_among_many_are_listed(good: list[bool], first: int) -> None:
    made = []
    for number, keep in enumerate(good):
        page = bytearray(a_page(b"abc", first + number))
        if not keep:
            page[5000] ^= 0xFF
        made.append(bytes(page))
    expected = [first + number for number, keep in enumerate(good) if not keep]
    assert [block for block, _ in bad_pages(b"".join(made), first, True)] == expected


def test_batches_do_not_change_the_result() -> None:
    count = pages._BATCH + 3
    buffer = b"".join(a_page(b"xyz", 0) for _ in range(1)) * count
    assert checksums(buffer, 5)[-1] == literal_checksum(buffer[:PAGE_BYTES], 5 + count - 1)


def test_an_all_zero_page_is_legal_and_a_nearly_zero_one_is_not() -> None:
    zero = bytes(PAGE_BYTES)
    assert bad_pages(zero * 3, 0, True) == []
    nearly = bytearray(zero)
    nearly[8191] = 1
    assert bad_pages(bytes(nearly), 4, True) == [(4, "page header: zero, the rest is not")]
    assert bad_pages(bytes(nearly), 4, False) == [(4, "page header: zero, the rest is not")]


@pytest.mark.parametrize(
    ("lower", "upper", "special"), [(20, 8000, 8192), (8100, 8000, 8192), (28, 8192, 8000), (28, 8000, 8190)]
)
def test_impossible_bounds_are_found_without_checksums(lower: int, upper: int, special: int) -> None:
    page = a_page(b"q", 0, lower=lower, upper=upper, special=special)
    ((block, reason),) = bad_pages(page, 0, False)
    assert block == 0
    assert "impossible bounds" in reason


def test_a_header_is_decoded() -> None:
    header = decode_header(a_page(b"z", 3))
    assert (header.lsn.value, header.lower, header.upper, header.special) == (4096, 28, 8000, 8192)
    assert (header.page_bytes, header.version, header.new, header.flaw()) == (8192, 4, False, None)


def test_half_pages_are_refused() -> None:
    with pytest.raises(ValueError):
        checksums(bytes(PAGE_BYTES + 1))


@pytest.mark.parametrize(
    ("path", "fork", "first", "relation_path", "server_path"),
    [
        ("base/5/16384", "main", 0, "base/5/16384", "base/5/16384"),
        ("base/5/16384.2", "main", 262144, "base/5/16384", "base/5/16384.2"),
        ("base/5/16384_fsm", "fsm", 0, "base/5/16384_fsm", "base/5/16384_fsm"),
        ("global/1262_vm.1", "vm", 131072, "global/1262_vm", "global/1262_vm.1"),
        ("base/5/INCREMENTAL.16384.1", "main", 131072, "base/5/16384", "base/5/16384.1"),
        (
            "pg_tblspc/16400/PG_18_202506291/5/1_init", "init", 0,
            "pg_tblspc/16400/PG_18_202506291/5/1_init", "pg_tblspc/16400/PG_18_202506291/5/1_init",
        ),
    ],
)  # fmt: skip
def test_relation_files_are_told(
    path: str, fork: str, first: int, relation_path: str, server_path: str
) -> None:
    found = relation_file(path)
    assert found is not None
    assert (found.fork, found.first_block) == (fork, first)
    assert (found.relation_path, found.server_path) == (relation_path, server_path)


@pytest.mark.parametrize(
    "path",
    ["base/5/t3_16384", "base/5/PG_VERSION", "global/pg_control", "pg_xact/0000", "base/5/pg_filenode.map"],
)
def test_other_files_hold_no_pages(path: str) -> None:
    assert relation_file(path) is None


def test_the_beginning_of_an_incremental_file() -> None:
    data = struct.pack("<5I", 0xD3AE1F0D, 2, 9, 4, 7)
    head = pages.incremental_head(data)
    assert head is not None
    assert (head.blocks, head.length, head.bytes) == (2, 9, 20)
    assert pages.incremental_head(data[:11]) is None
    assert pages.incremental_head(b"\0" + data[1:]) is None


@pytest.mark.parametrize(
    ("flags", "held"), [((), False), ((0,), False), ((0, 0), False), ((0, 3), True), ((1,), True)]
)
def test_a_page_has_items_if_a_line_pointer_is_in_use(flags: tuple[int, ...], held: bool) -> None:
    items = b"".join((flag << 15 | 8000).to_bytes(4, "little") for flag in flags)
    header = struct.pack("<IIHHHHHHI", 7, 5, 0, 0, 24 + len(items), 8000, 8192, 8192 + 4, 0)
    assert pages.has_items((header + items).ljust(8192, b"\0")) is held
    nonsense = struct.pack("<IIHHHHHHI", 7, 5, 0, 0, 60000, 8000, 8192, 8192 + 4, 0)
    assert not pages.has_items((nonsense + items).ljust(8192, b"\xff"))
    assert not pages.has_items(bytes(8192))
