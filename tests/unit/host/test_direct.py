"""Blocks written into files of others, and read from the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from knockwood.errors import HostError
from knockwood.host.direct import read_block, write_block


def test_a_block_changes_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "16384"
    file.write_bytes(b"a" * 8192 * 3)
    write_block(file, 8192, b"b" * 8192)
    assert file.read_bytes() == b"a" * 8192 + b"b" * 8192 + b"a" * 8192
    assert read_block(file, 8192, 8192) == b"b" * 8192
    assert read_block(file, 8192 * 3, 8192) == b""
    assert read_block(tmp_path / "gone", 0, 8192) == b""


def test_a_file_never_grows_and_links_are_not_followed(tmp_path: Path) -> None:
    file = tmp_path / "16384"
    file.write_bytes(b"a" * 8192)
    with pytest.raises(HostError, match="ends before"):
        write_block(file, 8192, b"b" * 8192)
    assert file.stat().st_size == 8192
    link = tmp_path / "link"
    link.symlink_to(file)
    with pytest.raises(HostError):
        write_block(link, 0, b"b" * 8192)
    assert file.read_bytes() == b"a" * 8192
