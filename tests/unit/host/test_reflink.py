"""Copies of folders are the same to the byte, in owner, mode, holes and links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import HostError
from knockwood.host import reflink


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "base" / "5").mkdir(parents=True)
    (source / "base" / "5" / "1259").write_bytes(os.urandom(100_000))
    (source / "empty").write_bytes(b"")
    (source / "closed").write_bytes(b"secret")
    (source / "closed").chmod(0o400)
    with (source / "sparse").open("wb") as file:
        file.seek(4 << 20)
        file.write(b"in the middle")
        file.truncate(8 << 20)
    (source / "pg_tblspc").mkdir(mode=0o700)
    (source / "pg_tblspc" / "1").symlink_to(tmp_path / "place" / "1")
    (source / "pg_tblspc" / "2").symlink_to("/elsewhere")
    (source / "near").symlink_to("closed")
    os.mkfifo(source / "pipe")
    seen: list[int] = []
    into = tmp_path / "copy"
    cost = reflink.copy_tree(
        source, into, links={tmp_path / "place": tmp_path / "other"}, progress=seen.append
    )
    assert cost.files == 4
    assert cost.bytes == 100_000 + 6 + (8 << 20)
    assert seen[-1] == cost.bytes
    assert (cost.shared == cost.bytes) is reflink.can_share(tmp_path)
    for name in ("base/5/1259", "empty", "closed", "sparse"):
        assert (into / name).read_bytes() == (source / name).read_bytes()
        assert (into / name).stat().st_mode == (source / name).stat().st_mode
    assert (into / "sparse").stat().st_blocks * 512 < 1 << 20
    assert (into / "pg_tblspc").stat().st_mode == (source / "pg_tblspc").stat().st_mode
    assert os.readlink(into / "pg_tblspc" / "1") == str(tmp_path / "other" / "1")
    assert os.readlink(into / "pg_tblspc" / "2") == "/elsewhere"
    assert os.readlink(into / "near") == "closed"
    assert not (into / "pipe").exists()
    assert reflink.tree_bytes(into) == reflink.tree_bytes(source)
    reflink.flush(into)


def test_what_cannot_be_copied_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    with pytest.raises(HostError):
        reflink.copy_tree(tmp_path / "missing", tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    with pytest.raises(HostError, match="exists"):
        reflink.copy_tree(tmp_path / "source", tmp_path / "there")
    assert (tmp_path / "there" / "mine").read_text() == "x"


def test_another_name_for_a_file_or_a_copy(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"wal")
    reflink.link_or_copy(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").unlink()
    assert (tmp_path / "b").read_bytes() == b"wal"


@given(st.lists(st.tuples(st.integers(0, 1 << 18), st.binary(min_size=1, max_size=5000)), max_size=6))
def test_holes_and_data_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("holes")
    source = folder / "source"
    source.mkdir()
    with (source / "file").open("wb") as file:
        for offset, data in writes:
            file.seek(offset)
            file.write(data)
    reflink.copy_tree(source, folder / "copy")
    assert (folder / "copy" / "file").read_bytes() == (source / "file").read_bytes()
