"""An unfinished restore: claimed, recognized, finished, discarded; never mistaken for a complete one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from knockwood.errors import DirectoryNotEmptyError, HostError, LockHeldError, RefusedError, UsageError
from knockwood.operations import half_done, recover_whole
from knockwood.operations.half_done import WORK, HalfDone
from knockwood.operations.restore_table import _copy_name
from knockwood.recover.table_definition import TableName


def begin(into: Path, again: bool = False) -> Path:
    return half_done.begin(into, "latest", account=None, sockets=into.parent / "kw-s", again=again)


def forget_owner(into: Path) -> None:
    """As if the process that began it had died."""
    marker = into / WORK / "restore.json"
    marker.write_text(marker.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194305'))


def a_data_directory(work: Path) -> Path:
    data = work / "cluster" / "data"
    (data / "global").mkdir(parents=True)
    (data / "base").mkdir()
    (data / "PG_VERSION").write_text("18\n")
    return data


def test_a_finished_restore_has_all_its_parts_and_no_work_folder(tmp_path: Path) -> None:
    into = tmp_path / "new"
    data = a_data_directory(begin(into))
    assert os.listdir(into) == [WORK]
    half_done.finish(into, data)
    assert sorted(os.listdir(into)) == ["PG_VERSION", "base", "global"]


def test_a_restore_in_place_is_taken_back_with_all_its_parts(tmp_path: Path) -> None:
    """Also the folder of its server's socket, which lies elsewhere."""
    into, tablespaces = tmp_path / "new", tmp_path / "spaces"
    begin(into)
    for folder in (tablespaces, tmp_path / "kw-s"):
        folder.mkdir()
        (folder / "file").touch()
    recover_whole._discard(into, tablespaces)
    assert os.listdir(tmp_path) == []
    recover_whole._discard(into, tablespaces)


def test_each_step_of_finishing_can_be_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.rename
    for steps in range(3):
        into = tmp_path / f"new-{steps}"
        data = a_data_directory(begin(into))
        left = steps + 1  # writing the marker renames too

        def rename(self: Path, target: Path) -> Path:
            nonlocal left
            if left == 0:
                raise OSError(5, "killed here")
            left -= 1
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(HostError):
            half_done.finish(into, data)
        monkeypatch.undo()
        assert not (into / "PG_VERSION").exists()
        forget_owner(into)
        with pytest.raises(DirectoryNotEmptyError, match="is not complete"):
            begin(into)
        begin(into, again=True)
        assert os.listdir(into) == [WORK]


def test_a_living_restore_is_left_alone(tmp_path: Path) -> None:
    begin(tmp_path / "new")
    with pytest.raises(LockHeldError, match="at work here"):
        begin(tmp_path / "new", again=True)


def test_one_that_died_before_it_wrote_anything(tmp_path: Path) -> None:
    (tmp_path / "new" / WORK).mkdir(parents=True)
    with pytest.raises(DirectoryNotEmptyError, match="unknown"):
        begin(tmp_path / "new")
    begin(tmp_path / "new", again=True)
    found = HalfDone.read(tmp_path / "new")
    assert found is not None
    assert found.target == "latest"


def test_a_complete_cluster_is_never_discarded(tmp_path: Path) -> None:
    into = tmp_path / "new"
    begin(into)
    (into / "PG_VERSION").write_text("18\n")
    forget_owner(into)
    with pytest.raises(RefusedError, match="is complete"):
        half_done.discard(into)
    with pytest.raises(DirectoryNotEmptyError):
        begin(into, again=True)
    assert (into / "PG_VERSION").exists()


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").touch()
    with pytest.raises(DirectoryNotEmptyError):
        begin(mine, again=True)
    with pytest.raises(DirectoryNotEmptyError, match="not a folder"):
        begin(mine / "file")
    (tmp_path / "spaces").mkdir()
    (tmp_path / "spaces" / "file").touch()
    begin(tmp_path / "new")
    with pytest.raises(DirectoryNotEmptyError, match="tablespaces"):
        half_done.claim_tablespaces(tmp_path / "new", tmp_path / "spaces")
    half_done.abandon(tmp_path / "new", existed=False)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "spaces" / "file").exists()
    assert (mine / "file").exists()


def test_the_tablespaces_of_an_unfinished_restore_go_with_it(tmp_path: Path) -> None:
    begin(tmp_path / "new")
    half_done.claim_tablespaces(tmp_path / "new", tmp_path / "spaces")
    (tmp_path / "spaces").mkdir()
    (tmp_path / "spaces" / "file").touch()
    forget_owner(tmp_path / "new")
    begin(tmp_path / "new", again=True)
    assert not (tmp_path / "spaces").exists()


def test_a_folder_inside_a_cluster_is_refused(tmp_path: Path) -> None:
    data = a_data_directory(tmp_path)
    with pytest.raises(RefusedError, match="inside the data directory"):
        begin(data / "base" / "new")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shop.public.orders", ("shop", "public", "orders")),
        ('shop."My.Schema"."a""b"', ("shop", "My.Schema", 'a"b')),
        ("Shop.Public.Ör ders", ("Shop", "Public", "Ör ders")),
    ],
)
def test_table_names_are_read(text: str, expected: tuple[str, str, str]) -> None:
    assert TableName.parse(text) == TableName(*expected)


@pytest.mark.parametrize(
    "text", ["", "orders", "public.orders", "a.b.c.d", "a..c", 'a."b.c', ".a.b", "a.b.c."]
)
def test_what_is_no_table_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        TableName.parse(text)


def test_the_copys_name_fits(tmp_path: Path) -> None:
    assert len(_copy_name("ö" * 63).encode()) <= 63
    assert _copy_name("orders").startswith("orders_20")
