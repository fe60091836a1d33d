"""An encrypted repository on the command line: the right identity, the wrong one, and none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyrage
import pytest

from fix_cli import CommandLine, command_line

if TYPE_CHECKING:
    from knockwood.postgres.binaries import Programs


@pytest.fixture
def line(
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
) -> Iterator[CommandLine]:
    with command_line(shared_folder, templates(18, 1), installations[18]) as made:
        made.in_process = True
        made.execute("create table t as select 1 as a")
        made.init()
        made.edit("user=knockwood", "user=postgres")
        yield made


def test_identities(line: CommandLine, tmp_path: Path) -> None:
    right, wrong = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    identity = tmp_path / "identity.txt"
    setting = f'identity_file = "{identity}"\n'
    line.edit('keep = "30d"', f'encrypt_to = "{right.to_public()}"\n{setting}keep = "30d"')
    identity.write_text(f"# a comment\n{right}\n")
    line("backup")
    rows = [*line.repository.glob("backups/*/pack-*"), *line.repository.glob("wal/0*/*/*")]
    assert {path.suffix for path in rows} == {".age"}
    assert line("verify")["verdict"] == "held"

    # Another host without an identity goes on writing, also over what it finds stored.
    line.edit(setting, "")
    # All of it was proved before, and yet nothing says now that it can be read.
    blind = line("verify", status=2)
    assert blind["verdict"] == "not_checked"
    assert {"backups", "wal"} <= {one["part"].partition("/")[0] for one in blind["not_checked"]}
    line.execute("insert into t values (2)")
    line("backup", "--wal-timeout", "60")
    new = line.folder / "new"
    error = line.fails(2, "KW504", "restore", "--to", "0/FFFFFF", "--accept-loss", "--into", new)
    assert "identity" in error["hint"]

    identity.write_text(f"{wrong}\n")
    line.edit('keep = "30d"', f'{setting}keep = "30d"')
    error = line.fails(2, "KW504", "restore", "--to", "0/FFFFFF", "--accept-loss", "--into", new)
    assert str(wrong) not in str(error)
    assert line("verify", status=2)["verdict"] == "not_checked"
    assert line("verify", "--full", status=2)["verdict"] == "not_checked"
    assert not new.exists()

    identity.unlink()
    assert str(identity) in line.fails(3, "KW101", "verify")["where"]
    identity.write_text(f"{right}\n")
    assert line("verify", "--full")["verdict"] == "held"
    line("restore", "--into", new)
    line.assert_nothing_left()
