"""Files read whole while they change, and the manifest that names them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import HostError
from knockwood.model import Lsn, Timeline, WalRange
from knockwood.repository.backups.take_manifest import manifest, manifest_entry
from knockwood.repository.backups.take_worker import FileReader
from knockwood.repository.backups.tar import Member

BIG = (1 << 20) + 5000


def test_a_file_is_read_whole_with_its_digest(tmp_path: Path) -> None:
    content = bytes(range(256)) * (BIG // 256)
    (tmp_path / "file").write_bytes(content)
    member, *pieces, line = (
        bytes(entry) if isinstance(entry, memoryview) else entry
        for entry in FileReader(tmp_path, digests=True).read("file")
    )
    assert isinstance(member, Member)
    assert member.size == len(content)
    assert b"".join(pieces) == content  # type: ignore[arg-type]
    entry = json.loads(str(line))
    assert (entry["Path"], entry["Size"]) == ("file", len(content))
    assert entry["Checksum"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("change", ["cut", "grown", "emptied"])
def test_a_file_that_changes_keeps_the_size_it_had_first(tmp_path: Path, change: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * BIG)
    entries = FileReader(tmp_path, digests=True).read("file")
    member = next(entries)
    held = [bytes(next(entries))]  # type: ignore[arg-type]
    with path.open("r+b") as file:
        file.truncate({"cut": (1 << 20) + 100, "grown": 2 * BIG, "emptied": 0}[change])
    *pieces, line = (bytes(e) if isinstance(e, memoryview) else e for e in entries)
    content = b"".join([*held, *pieces])  # type: ignore[list-item]
    assert isinstance(member, Member)
    assert member.size == len(content) == BIG
    kept = {"cut": (1 << 20) + 100, "grown": BIG, "emptied": 1 << 20}[change]
    assert content == b"x" * kept + bytes(BIG - kept)
    assert json.loads(str(line))["Checksum"] == hashlib.sha256(content).hexdigest()


def test_a_file_that_is_gone_is_left_out_and_a_link_is_not_followed(tmp_path: Path) -> None:
    reader = FileReader(tmp_path, digests=False)
    assert list(reader.read("gone")) == []
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(HostError):
        list(reader.read("link"))


@given(st.text(st.characters(codec="utf-8"), min_size=1), st.integers(0, 1 << 40))
def test_every_path_survives_the_manifest(path: str, size: int) -> None:
    entry = json.loads(manifest_entry(path, size, 0, None))
    assert entry == {"Path": path, "Size": size, "Last-Modified": "1970-01-01 00:00:00 GMT"}


def test_a_path_that_is_no_utf8_is_encoded(tmp_path: Path) -> None:
    path = b"base/\xff".decode("utf-8", "surrogateescape")
    assert json.loads(manifest_entry(path, 1, 0, ("SHA256", "aa"))) == {
        "Encoded-Path": "626173652fff", "Size": 1, "Last-Modified": "1970-01-01 00:00:00 GMT",
        "Checksum-Algorithm": "SHA256", "Checksum": "aa",
    }  # fmt: skip


@pytest.mark.parametrize(("major", "version"), [(15, 1), (16, 1), (17, 2), (18, 2)])
def test_a_manifest_carries_its_own_checksum(major: int, version: int) -> None:
    wal = WalRange(Timeline(3), Lsn.parse("0/2000028"), Lsn.parse("0/2000120"))
    entries = [manifest_entry(name, 1, 0, None) for name in "ab"]
    text = b"".join(manifest(entries, wal, major=major, system_identifier=77))
    value = json.loads(text)
    assert value["PostgreSQL-Backup-Manifest-Version"] == version
    assert value.get("System-Identifier") == (77 if version == 2 else None)
    assert [entry["Path"] for entry in value["Files"]] == ["a", "b"]
    assert value["WAL-Ranges"][0]["Timeline"] == 3
    before = text[: text.index(b'"Manifest-Checksum"')]
    assert value["Manifest-Checksum"] == hashlib.sha256(before).hexdigest()
