"""What people get wrong, on the command line: a status, a code, a hint, one JSON object, nothing left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_cli import CommandLine, command_line
from knockwood.host import processes

if TYPE_CHECKING:
    from knockwood.postgres.binaries import Programs


@pytest.fixture(scope="module")
def shared(
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
) -> Iterator[CommandLine]:
    """One protected server with a backup."""
    with command_line(shared_folder, templates(18, 1), installations[18]) as made:
        made.in_process = True
        made.execute("create table t as select 1 as a")
        made.init()
        made.edit("user=knockwood", "user=postgres")
        made("backup")
        made.execute("create role weak login")
        made.execute("create role locked login password 'right'")
        made.execute("create role copier login replication")
        rules = made.server.data_directory / "pg_hba.conf"
        rules.write_text("local all locked scram-sha-256\nlocal all refused reject\n" + rules.read_text())
        made.execute("select pg_reload_conf()")
        yield made


@pytest.fixture
def line(shared: CommandLine) -> Iterator[CommandLine]:
    """Settings may be changed; nothing may be left behind."""
    text = shared.config.read_text()
    yield shared
    shared.config.write_text(text)
    shared.assert_nothing_left()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("bakcup",),
        ("restore",),
        ("backup", "--incremental=maybe"),
        ("backup", "--wal-timeout", "soon"),
        ("backup", "--config"),
        ("restore", "--into", "x", "--to", "yesterday"),
        ("restore", "--into", "x", "--to", "12/xyz"),
        ("restore", "--into", "x", "--to", "before-1"),
        ("check", "[/bold]"),
        ("check", "--statement-timeout", "5"),
        ("check", "--max-load", "-1"),
        ("drill", "run"),
        ("drill", "run", "nope"),
        ("wal", "acknowledge", "0/1", "--note", "x"),
    ],
    ids=" ".join,
)
def test_usage(line: CommandLine, words: tuple[str, ...]) -> None:
    error = line.fails(3, "KW100", *words)
    assert error["hint"]
    told = line.run(*words)
    if words:
        assert (told.status, told.out) == (3, "")
        assert "error" in told.err
        assert "hint" in told.err


def test_settings_that_cannot_be_used(line: CommandLine, tmp_path: Path) -> None:
    assert "knockwood init" in line.fails(3, "KW101", "backups", "--config", tmp_path / "none")["hint"]
    assert line.fails(3, "KW101", "backups", "--cluster", "shpo")["hint"] == "did you mean shop?"
    line.config.write_text(line.config.read_text() + '\n[cluster.shop.wal]\nslott = "x"\n')
    assert "did you mean slot?" in line.fails(3, "KW101", "backups")["problems"][0]
    line.config.write_bytes(b"\xff\xfe")
    line.fails(3, "KW101", "backups")
    line.config.write_text("[cluster.shop")
    assert line.fails(3, "KW101", "backups")["problems"]
    line.config.write_text('[cluster.shop]\ndsn = "password=x"\nrepository = "/r"\n')
    assert "no passwords here" in line.fails(3, "KW101", "backups")["problems"][0]


def test_init_again_changes_nothing(line: CommandLine) -> None:
    before = line.config.read_text()
    assert "--config" in line.fails(3, "KW101", *_init(line))["hint"]
    assert line.config.read_text() == before


def test_an_init_that_failed_can_be_run_again(line: CommandLine, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    other = tmp_path / "k.toml"
    words = ("--config", other)
    error = line.fails(2, "KW300", *_init(line, repository=blocked / "repository"), *words)
    assert str(blocked) in error["where"]
    assert not other.exists()
    line.fails(2, "KW403", *_init(line, dsn=line.server.dsn(user="nobody_here")), *words)
    assert not other.exists()
    line(*_init(line, repository=tmp_path / "new"), *words)
    assert other.exists()


def _init(line: CommandLine, dsn: str = "", repository: Path | None = None) -> tuple[object, ...]:
    place = repository or line.repository
    return ("init", "--name", "shop", "--dsn", dsn or line.server.dsn(), "--repository", place)


def test_no_server_at_the_address(line: CommandLine) -> None:
    line.edit(f"host={line.server.socket_directory}", "host=/nonexistent")
    for words in (("backup",), ("backup", "--incremental"), ("check",)):
        error = line.fails(2, "KW402", *words)
        assert "/nonexistent" in error["what"]
        assert error["hint"]
        assert error["retry_safe"]
    assert line("prove", status=2)["verdict"] == "not_checked"
    [status] = line("status", status=2)["clusters"]
    assert status["verdict"] == "not_checked"
    assert "does not answer" in status["not_checked"]
    doctor = line("doctor", status=1)
    assert doctor["reach"] == "none"
    assert doctor["checks"][-1]["verdict"] == "held"  # the repository was looked at all the same
    line("verify")
    line("backups")


@pytest.mark.parametrize(
    ("user", "password", "hint"),
    [
        ("locked", "wrong", "password"),
        ("locked", "", "password"),
        ("nobody_here", "", "CREATE ROLE nobody_here"),
        ("refused", "", "pg_hba.conf"),
    ],
)
def test_a_role_that_is_not_let_in(line: CommandLine, user: str, password: str, hint: str) -> None:
    line.edit("user=postgres", f"user={user}")
    error = line.fails(2, "KW403", "backup", env={"PGPASSWORD": password, "PGPASSFILE": "/dev/null"})
    assert hint in error["hint"]
    assert "wrong" not in json.dumps(error)


def test_a_missing_privilege_comes_with_what_mends_it(line: CommandLine) -> None:
    line.edit("user=postgres", "user=weak")
    hint = line.fails(2, "KW404", "backup")["hint"]
    assert "REPLICATION" in hint
    assert "weak" in hint
    assert line("doctor", status=1)["reach"] == "managed"


def test_another_clusters_repository(line: CommandLine, tmp_path: Path) -> None:
    header = line.repository / "repository.json"
    text = header.read_text()
    value = json.loads(text)
    value["system_identifier"] = type(value["system_identifier"])(int(value["system_identifier"]) + 1)
    try:
        header.write_text(json.dumps(value))
        for words in (("backup",), ("prove",), ("check",), ("wal", "receive")):
            assert line.fails(4, "KW405", *words)["hint"]
        assert line("doctor", status=1)["checks"][-1]["verdict"] == "broken"
        assert line.fails(4, "KW405", *_init(line), "--config", tmp_path / "k.toml")["hint"]
        assert not (tmp_path / "k.toml").exists()
    finally:
        header.write_text(text)


def test_a_repository_that_is_none(line: CommandLine, tmp_path: Path) -> None:
    line.edit(str(line.repository), str(tmp_path / "nothing"))
    for words in (("backup",), ("backups",), ("verify",), ("expire",), ("wal", "gaps"), ("prove",)):
        error = line.fails(2, "KW506", *words)
        assert "init" in error["hint"]
    assert not (tmp_path / "nothing").exists()
    [status] = line("status", status=1)["clusters"]
    assert status["problems"]


def test_no_programs_of_that_version(line: CommandLine, tmp_path: Path) -> None:
    line.edit('repository = "', f'programs = "{tmp_path}"\nrepository = "')
    error = line.fails(2, "KW401", "restore", "--to", "0/FFFFFF", "--into", line.folder / "new")
    assert error["hint"]
    assert not (line.folder / "new").exists()
    found = {item["name"]: item["verdict"] for item in line("doctor", status=1)["checks"]}
    assert found["programs"] == "broken"


def test_a_target_that_the_archive_does_not_reach(line: CommandLine) -> None:
    new = line.folder / "new"
    for target in ("FF/0", "2099-01-01T00:00:00Z", "2001-01-01T00:00:00Z", "before-987654321"):
        error = line.fails(4, "KW201", "restore", "--to", target, "--into", new)
        assert "last reachable commit" in error["what"] or "cannot be restored" in error["what"]
        assert error["hint"]
    line.fails(2, "KW501", "restore", "--to", "latest", "--backup", "nonsense", "--into", new)
    assert not new.exists()


def test_a_folder_that_is_not_free(line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep me")
    assert line.fails(4, "KW202", "restore", "--into", tmp_path)["hint"]
    assert line.fails(4, "KW202", "restore", "--into", tmp_path / "mine")["hint"]
    assert (tmp_path / "mine").read_text() == "keep me"
    data = line.server.data_directory
    before = sorted(os.listdir(data))
    assert "beside" in line.fails(4, "KW200", "restore", "--into", data / "new")["hint"]
    line.fails(4, "KW202", "restore", "--into", data)
    assert sorted(os.listdir(data)) == before


@pytest.mark.parametrize(
    "words",
    [
        ("wal", "fetch"),
        ("wal", "fetch", "000000010000000000000001"),
        ("wal", "fetch", "a", "b", "c"),
        ("wal", "fetch", "nonsense", "to"),
    ],
    ids=" ".join,
)
def test_a_mistyped_restore_command_never_looks_like_the_end_of_the_archive(
    line: CommandLine, words: tuple[str, ...]
) -> None:
    assert line.run(*words).status == 200
    assert line.fails(200, "KW100", *words)["hint"]


@pytest.mark.parametrize("name", ["00000009.history", "0000000100000000000000F0.00000028.backup"])
def test_a_name_that_postgresql_may_ask_for_is_answered_in_silence(
    line: CommandLine, tmp_path: Path, name: str
) -> None:
    ended = line.run("wal", "fetch", name, tmp_path / "wal")
    assert (ended.status, ended.out, ended.err) == (1, "", "")


def test_a_backup_without_data_checksums_is_not_called_held(
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
) -> None:
    with command_line(shared_folder, templates(18, 1), installations[18]) as made:
        server = made.server
        server.stop("fast")
        command = [server.programs.path("pg_checksums"), "--disable", "-N", "-D", server.data_directory]
        processes.run(command, account=server.account)
        server.start()
        made.init()
        made.edit("user=knockwood", "user=postgres")
        [taken] = made("backup", status=2)["backups"]
        assert taken["health"]["verdict"] == "not_checked"
        assert [item["id"] for item in made("backups")["backups"]] == [taken["id"]]


def test_wal_by_hand(line: CommandLine, tmp_path: Path) -> None:
    line("wal", "fetch", "0000000100000000000000F0", tmp_path / "wal", status=1)
    assert not (tmp_path / "wal").exists()
    stored = sorted(path.name for path in (line.repository / "wal/00000001").rglob("*.zst"))
    name = stored[0].removesuffix(".zst")
    line("wal", "fetch", name, tmp_path / name)
    assert line("wal", "push", tmp_path / name)["outcome"].startswith("stored before")
    content = bytearray((tmp_path / name).read_bytes())
    content[5000] ^= 1
    (tmp_path / name).write_bytes(content)
    line.fails(1, "KW503", "wal", "push", tmp_path / name)
    line.fails(1, "KW100", "wal", "push", "/etc/passwd")
    line.fails(1, "KW300", "wal", "push", tmp_path / "0000000100000000000000F0")
    line.fails(200, "KW101", "wal", "fetch", name, tmp_path / "x", "--cluster", "none")


def test_a_truncated_object_is_said_everywhere(line: CommandLine, tmp_path: Path) -> None:
    [pack] = line.repository.glob("backups/*/pack-00000.tar.zst")
    stored = max((line.repository / "wal/00000001").rglob("*.zst"))
    for path in (pack, stored):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        try:
            damaged = line("verify", "--full", status=1)["damaged"]
            assert any(str(path.relative_to(line.repository)) in item["object"] for item in damaged)
            if path is pack:
                line.fails(1, "KW502", "restore", "--to", "latest", "--into", line.folder / "new")
            else:
                name = path.name.removesuffix(".zst")
                line.fails(200, "KW502", "wal", "fetch", name, tmp_path / "x")
            assert not (line.folder / "new").exists()
            assert not (tmp_path / "x").exists()
        finally:
            path.write_bytes(whole)
    assert line("verify", "--full")["verdict"] == "held"


def test_a_missing_segment_is_a_gap_until_acknowledged(line: CommandLine, tmp_path: Path) -> None:
    line.execute("select pg_switch_wal(); insert into t values (2); select pg_switch_wal()")
    line("backup")
    stored = sorted((line.repository / "wal/00000001").rglob("*.zst"))
    hidden = stored[-3]
    whole = hidden.read_bytes()
    hidden.unlink()
    try:
        [gap] = line("wal", "gaps", status=1)["gaps"]
        start = gap["start"] if "start" in gap else gap["from"]
        name = hidden.name.removesuffix(".zst")
        assert "gap" in line.fails(200, "KW501", "wal", "fetch", name, tmp_path / "x")["hint"]
        [status] = line("status", status=1)["clusters"]
        assert status["open_gaps"] == 1
        assert line("wal", "acknowledge", start, "--note", "a test")["acknowledged"]
        line("wal", "gaps")
    finally:
        hidden.write_bytes(whole)


def test_a_broken_pipe_is_no_traceback(line: CommandLine) -> None:
    line.in_process = False
    try:
        child = line.start("backups", "--json")
        assert child.stdout is not None
        child.stdout.close()
        child.stdout = None
        ended = line.ended(child)
    finally:
        line.in_process = True
    assert ended.status in (0, 2)
    assert ended.err == ""
