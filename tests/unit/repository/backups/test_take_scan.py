"""Which files belong to a base backup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import HostError, RefusedError
from knockwood.repository.backups.take_scan import EMPTIED, left_out, links, scan


@pytest.mark.parametrize(
    ("folder", "name", "siblings", "out"),
    [
        ("base/5", "1234", ["1234"], False),
        ("base/5", "1234", ["1234", "1234_init"], True),
        ("base/5", "1234_fsm", ["1234_init"], True),
        ("base/5", "1234.1", ["1234_init"], True),
        ("base/5", "1234_vm.2", ["1234_init"], True),
        ("base/5", "1234_init", ["1234_init"], False),
        ("base/5", "12345", ["1234_init"], False),
        ("base/5", "t3_1234", [], True),
        ("base/5", "t3_1234_fsm.1", [], True),
        ("base/5", "t3_name", [], False),
        ("pg_tblspc/9/PG_18_202506291/5", "1234", ["1234_init"], True),
        ("pg_tblspc/9/PG_18_202506291/5", "t12_34", [], True),
        ("global", "1234", ["1234_init"], False),
        ("", "t1_2", [], False),
        ("base/5", "pg_internal.init", [], True),
        ("global", "pg_internal.init.4711", [], True),
        ("base/pgsql_tmp", "pgsql_tmp12.0", [], True),
        ("", "postmaster.pid", [], True),
        ("", "postmaster.pid.old", [], False),
        ("", "backup_label", [], True),
        ("", "backup_label.old", [], False),
        ("", "current_logfiles", [], False),
        ("global", "pg_control", [], True),
        ("other", "pg_control", [], False),
        ("", "PG_VERSION", [], False),
        ("pg_xact", "0000", [], False),
    ],
)
def test_the_rules_are_those_of_the_server(folder: str, name: str, siblings: list[str], out: bool) -> None:
    assert left_out(folder, name, siblings) is out


@given(st.sets(st.from_regex(r"\A[1-9][0-9]{0,4}(_fsm|_vm|_init)?(\.[1-9])?\Z"), max_size=12))
def test_a_relation_is_kept_unless_it_has_an_init_fork(names: set[str]) -> None:
    unlogged = {name[:-5] for name in names if name.endswith("_init")}
    for name in names:
        node = name.split("_")[0].split(".")[0]
        init = "_init" in name
        assert left_out("base/1", name, names) is (node in unlogged and not init)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in ("base/1", "global", "pg_wal/archive_status", "pg_tblspc", "pg_xact", *EMPTIED):
        (root / name).mkdir(parents=True)
        if name not in ("base/1", "global", "pg_tblspc"):
            (root / name / "file").write_bytes(b"12345")
    (root / "PG_VERSION").write_text("18\n")
    (root / "base/1/1").write_bytes(bytes(8192))
    (root / "global/pg_control").write_bytes(bytes(8192))
    return root


def found(root: Path, *tablespaces: int, major: int = 18) -> dict[str, tuple[str, int]]:
    members = scan(root, major=major, version_folder="PG_18_1", tablespaces=tablespaces)
    return {member.path: (member.kind, member.size) for member in members}


def test_folders_that_mean_nothing_elsewhere_are_kept_empty(root: Path) -> None:
    seen = found(root)
    assert {path for path, (kind, _) in seen.items() if kind == "file"} == {
        "PG_VERSION", "base/1/1", "pg_xact/file",
    }  # fmt: skip
    assert seen["base/1/1"] == ("file", 8192)
    folders = {path for path, (kind, _) in seen.items() if kind == "folder"}
    inside = {"pg_wal/archive_status", "pg_wal/summaries"}
    assert folders == {"base", "base/1", "global", "pg_wal", "pg_tblspc", "pg_xact", *EMPTIED, *inside}
    assert "pg_wal/summaries" not in found(root, major=16)


def test_pg_wal_on_another_disk_becomes_a_folder(root: Path, tmp_path: Path) -> None:
    (root / "pg_wal").rename(tmp_path / "wal")
    (root / "pg_wal").symlink_to(tmp_path / "wal")
    assert found(root)["pg_wal"] == ("folder", 0)
    assert "pg_wal/file" not in found(root)


def test_of_a_tablespace_only_this_clusters_folder_is_kept(root: Path, tmp_path: Path) -> None:
    for name in ("PG_18_1/5", "PG_15_1/5"):
        (tmp_path / "space" / name).mkdir(parents=True)
        (tmp_path / "space" / name / "9").write_bytes(bytes(8192))
    (root / "pg_tblspc/77").symlink_to(tmp_path / "space")
    assert links(root) == {77: str(tmp_path / "space")}
    inside = {path for path in found(root, 77) if path.startswith("pg_tblspc/")}
    assert inside == {
        "pg_tblspc/77", "pg_tblspc/77/PG_18_1", "pg_tblspc/77/PG_18_1/5", "pg_tblspc/77/PG_18_1/5/9",
    }  # fmt: skip
    (root / "pg_tblspc/78").symlink_to(tmp_path / "unmounted")
    with pytest.raises(HostError, match="folder is not there"):
        found(root, 77, 78)
    (root / "pg_tblspc/78").unlink()  # dropped meanwhile
    assert "pg_tblspc/78/PG_18_1" not in found(root, 77, 78)


def test_what_is_neither_file_nor_folder_is_passed_over_and_links_in_data_refused(root: Path) -> None:
    os.mkfifo(root / "pipe")
    (root / "server.conf").symlink_to("/etc/hostname")
    assert not {"pipe", "server.conf"} & found(root).keys()
    (root / "base/1/2").symlink_to("/etc/hostname")
    with pytest.raises(RefusedError, match="symbolic link"):
        found(root)


def test_a_data_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        found(tmp_path / "none")
