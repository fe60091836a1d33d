"""What is stored opens with stock programs, comes back whole, and tells when it was changed."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
import tracemalloc
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import pyrage
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import ObjectDamagedError, SettingsError, WrongKeyError
from knockwood.repository.codec import Counted, decode, encode, suffix

MIB = 1 << 20


class Keys:
    """A pair of age keys."""

    def __init__(self) -> None:
        identity = pyrage.x25519.Identity.generate()
        self.public, self.secret = str(identity.to_public()), str(identity)


OURS, OTHER = Keys(), Keys()
BIG = bytes(range(256)) * (4 * MIB // 256)


def stored(content: bytes, recipients: tuple[str, ...] = (), **options: int) -> bytes:
    return b"".join(encode([content], recipients, **options))


def opened(data: bytes, *, encrypted: bool, identities: tuple[str, ...] = (OURS.secret,)) -> bytes:
    return b"".join(decode([data], encrypted=encrypted, identities=identities))


def age_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "age"]


@given(st.lists(st.binary(max_size=3000), max_size=8), st.booleans(), st.integers(0, 2), st.integers(1, 5000))
def test_what_was_encoded_comes_back(pieces: list[bytes], encrypted: bool, workers: int, cut: int) -> None:
    recipients = (OTHER.public, OURS.public) if encrypted else ()
    data = b"".join(encode(pieces, recipients, workers=workers))
    read = [data[start : start + cut] for start in range(0, len(data), cut)]
    assert b"".join(decode(read, encrypted=encrypted, identities=[OURS.secret])) == b"".join(pieces)


@pytest.mark.parametrize("encrypted", [False, True])
def test_every_cut_and_every_flipped_byte_is_told(encrypted: bool) -> None:
    data = stored(b"some content " * 20, (OURS.public,) if encrypted else ())
    for length in range(len(data)):
        with pytest.raises((ObjectDamagedError, WrongKeyError)):
            opened(data[:length], encrypted=encrypted)
    for place in range(len(data)):
        flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        try:
            # A changed header byte may mean the same; changed content never comes out.
            assert opened(flipped, encrypted=encrypted) == b"some content " * 20
        except (ObjectDamagedError, WrongKeyError):
            pass
    for rest in (b"x", b"\0" * 100, data[:20]):
        with pytest.raises(ObjectDamagedError):
            opened(data + rest, encrypted=encrypted)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("length", [65536, 2 * 65536, 131104, MIB])
def test_a_cut_at_a_block_border_is_told(encrypted: bool, length: int) -> None:
    content = b"".join(bytes([n % 251, n // 251 % 251]) + n.to_bytes(6, "big") for n in range(MIB // 2))
    data = stored(content, (OURS.public,) if encrypted else ())
    header = 200
    assert len(data) > length + header
    for extra in (0, 16, header):
        with pytest.raises(ObjectDamagedError):
            opened(data[: length + extra], encrypted=encrypted)


def test_frames_in_a_row_are_one_content() -> None:
    assert opened(stored(b"one") + stored(b"two"), encrypted=False) == b"onetwo"


def test_nothing_is_not_valid_content() -> None:
    for encrypted in (False, True):
        with pytest.raises(ObjectDamagedError):
            opened(b"", encrypted=encrypted)


def test_any_of_several_keys_opens_it() -> None:
    data = stored(b"secret", (OTHER.public, OURS.public))
    assert opened(data, encrypted=True) == b"secret"
    file = f"# created: today\n# public key: {OURS.public}\n{OURS.secret}\n"
    assert opened(data, encrypted=True, identities=(Keys().secret, file)) == b"secret"


def test_a_wrong_key_and_no_key_are_told_from_damage() -> None:
    data = stored(b"secret", (OTHER.public,))
    with pytest.raises(WrongKeyError):
        opened(data, encrypted=True)
    with pytest.raises(WrongKeyError, match="no identity was given"):
        opened(data, encrypted=True, identities=())


def test_bad_keys_are_refused_before_anything_is_read() -> None:
    for recipient in ("age1nonsense", "", "ssh-ed25519 nonsense", "hello"):
        with pytest.raises(SettingsError):
            encode(iter(()), [recipient])
    with pytest.raises(SettingsError) as refused:
        encode(iter(()), [OURS.secret])
    assert OURS.secret not in f"{refused.value} {refused.value.hint}"
    for identity in ("AGE-SECRET-KEY-1NONSENSE", OURS.public, "-----BEGIN OPENSSH PRIVATE KEY-----\nx"):
        with pytest.raises(SettingsError) as refused:
            opened(b"", encrypted=True, identities=(identity,))
        assert "NONSENSE" not in f"{refused.value} {refused.value.hint}"


@pytest.mark.parametrize("recipients", [(), (OURS.public,)])
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_bounded(recipients: tuple[str, ...], workers: int) -> None:
    size = 64 * MIB
    tracemalloc.start()
    try:
        data = encode((BIG for _ in range(size // len(BIG))), recipients, workers=workers)
        content = decode(data, encrypted=bool(recipients), identities=[OURS.secret])
        assert sum(map(len, content)) == size
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()


NOISE = random.Random(7).randbytes(2 * MIB)


def endless() -> Iterator[bytes]:
    while True:
        yield NOISE


def test_an_abandoned_stream_leaves_no_thread() -> None:
    for taken in (0, 1, 3):
        stream = encode(endless(), [OURS.public])
        assert len(list(islice(stream, taken))) == taken
        del stream
        assert age_threads() == []
    data = b"".join(encode([NOISE] * 6, [OURS.public]))
    pieces = (data[start : start + 65536] for start in range(0, len(data), 65536))
    plain = decode(pieces, encrypted=True, identities=[OURS.secret])
    next(plain)
    assert len(age_threads()) == 1
    del plain
    assert age_threads() == []


def test_an_error_of_the_source_comes_through_and_leaves_no_thread() -> None:
    def source() -> Iterator[bytes]:
        yield BIG
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(encode(source(), [OURS.public]))
    with pytest.raises(ZeroDivisionError):
        list(
            decode(
                chain([stored(BIG, (OURS.public,))[:100]], source()), encrypted=True, identities=[OURS.secret]
            )
        )
    assert age_threads() == []


def test_an_error_of_the_worker_ends_an_endless_source() -> None:
    with pytest.raises(ObjectDamagedError):
        list(decode(endless(), encrypted=True, identities=[OURS.secret]))
    assert age_threads() == []


def test_the_suffix_tells_the_formats() -> None:
    assert suffix(()) == ".zst"
    assert suffix([OURS.public]) == ".zst.age"


def test_counted_counts_and_hashes() -> None:
    counted = Counted([b"ab", bytearray(b"c"), memoryview(b"")])
    assert b"".join(counted) == b"abc"
    assert counted.bytes == 3
    assert counted.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"the program {name} is not installed")
    return path


def test_stock_zstd_opens_what_is_stored(tmp_path: Path) -> None:
    file = tmp_path / "object.zst"
    file.write_bytes(stored(BIG, workers=2))
    assert subprocess.run([program("zstd"), "-dc", file], check=True, capture_output=True).stdout == BIG
    listed = subprocess.run([program("zstd"), "-lv", file], check=True, capture_output=True).stdout
    assert b"XXH64" in listed


def test_stock_age_opens_what_is_stored_and_ours_what_it_wrote(tmp_path: Path) -> None:
    age, zstd = program("age"), program("zstd")
    key = tmp_path / "key"
    key.write_text(OURS.secret + "\n")
    file = tmp_path / "object.zst.age"
    file.write_bytes(stored(BIG, (OTHER.public, OURS.public)))
    compressed = subprocess.run([age, "-d", "-i", key, file], check=True, capture_output=True).stdout
    assert subprocess.run([zstd, "-dc"], check=True, capture_output=True, input=compressed).stdout == BIG
    theirs = subprocess.run([zstd, "-c"], check=True, capture_output=True, input=BIG).stdout
    theirs = subprocess.run([age, "-r", OURS.public], check=True, capture_output=True, input=theirs).stdout
    assert opened(theirs, encrypted=True) == BIG


def test_ssh_keys_serve_as_age_keys(tmp_path: Path) -> None:
    keygen = program("ssh-keygen")
    subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    public, secret = (tmp_path / "key.pub").read_text(), (tmp_path / "key").read_text()
    assert opened(stored(b"x", (public,)), encrypted=True, identities=(secret,)) == b"x"
