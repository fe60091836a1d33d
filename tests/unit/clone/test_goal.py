"""The settings of a clone, and the shell line that copies its WAL."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.clone.goal import (
    GUARD_STATUS,
    Goal,
    cluster_name,
    config_text,
    isolation_settings,
    parse_control_data,
    recovery_settings,
    required_at_least,
    restore_command,
)
from knockwood.model import Lsn, Timeline


def run(command: str, name: str, to: Path) -> int:
    """As PostgreSQL runs it: %f and %p replaced, %% a percent sign."""
    line = command.replace("%%", "\0").replace("%f", name).replace("%p", str(to)).replace("\0", "%")
    return subprocess.run(["sh", "-c", line], check=False).returncode


@pytest.mark.parametrize("folder", ["plain", "with space", "it's 100%f; touch x", "$(exit 3)`"])
def test_restore_command_copies_says_no_or_stops_a_promotion(tmp_path: Path, folder: str) -> None:
    spool = tmp_path / folder
    spool.mkdir()
    segment = "000000020000000000000003"
    (spool / segment).write_bytes(b"wal")
    command = restore_command(spool, Timeline(2))
    assert run(command, segment, tmp_path / "out") == 0
    assert (tmp_path / "out").read_bytes() == b"wal"
    assert run(command, "000000020000000000000004", tmp_path / "out") == 1
    assert run(command, "00000002.history", tmp_path / "out") == 1
    (spool / "00000003.history").write_text("later")
    assert run(command, "00000003.history", tmp_path / "out") == GUARD_STATUS
    (spool / "promote").touch()
    assert run(command, "00000003.history", tmp_path / "out") == 0
    assert run(command, "00000004.history", tmp_path / "out") == 1


def test_a_linked_segment_is_the_file_of_the_spool_and_a_copy_where_it_cannot_be(tmp_path: Path) -> None:
    segment = "000000010000000000000001"
    (tmp_path / segment).write_bytes(b"wal")
    command = restore_command(tmp_path, Timeline(1), linked=True)
    assert run(command, segment, tmp_path / "out") == 0
    assert (tmp_path / "out").samefile(tmp_path / segment)
    (tmp_path / "taken").write_bytes(b"something else")
    assert run(command, segment, tmp_path / "taken") == 0
    assert not (tmp_path / "taken").samefile(tmp_path / segment)
    assert (tmp_path / "taken").read_bytes() == b"wal"
    assert run(command, "000000010000000000000002", tmp_path / "none") == 1
    assert run(command, segment, tmp_path / "no" / "out") > 125


def test_a_copy_that_fails_is_no_end_of_the_archive(tmp_path: Path) -> None:
    (tmp_path / "000000010000000000000001").write_bytes(b"wal")
    status = run(restore_command(tmp_path, Timeline(1)), "000000010000000000000001", tmp_path / "no" / "out")
    # PostgreSQL takes any status above 125 for a failure and stops, and any other for a missing file.
    assert status > 125


def test_recovery_always_has_a_target_and_pauses() -> None:
    goal = Goal(Timeline(3), Lsn(0x5000028), False, Lsn(0x4000000))
    settings = recovery_settings(goal, Path("/spool"))
    assert settings["recovery_target_lsn"] == "0/05000028"
    assert settings["recovery_target_inclusive"] == "off"
    assert settings["recovery_target_timeline"] == "3"
    assert settings["recovery_target_action"] == "pause"
    assert "recovery_target" not in settings
    at_once = recovery_settings(Goal(Timeline(1), None, True, Lsn(1)), Path("/spool"))
    assert at_once["recovery_target"] == "immediate"
    assert "recovery_target_lsn" not in at_once


@pytest.mark.parametrize("major", range(14, 19))
def test_nothing_leads_out_of_a_clone(major: int) -> None:
    settings = isolation_settings(major, Path("/w"), "x", {"max_connections": 300})
    assert settings["archive_mode"] == "off"
    assert settings["listen_addresses"] == settings["primary_conninfo"] == settings["archive_command"] == ""
    assert settings["max_logical_replication_workers"] == "0"
    assert settings["max_connections"] == "300"
    assert ("archive_library" in settings) == (major >= 15)
    assert ("event_triggers" in settings) == (major >= 17)


def test_the_larger_of_what_the_primary_had_counts() -> None:
    control = parse_control_data(
        "Database cluster state:               in production\n"
        "max_connections setting:              100\nmax_prepared_xacts setting:           5\nno colon here\n"
    )
    assert control["Database cluster state"] == "in production"
    needed = required_at_least(control, {"max_connections": "200", "max_wal_senders": "10", "max_locks": "x"})
    assert needed == {"max_connections": 200, "max_prepared_transactions": 5, "max_wal_senders": 10}


@given(st.text())
def test_a_cluster_name_is_short_plain_text(purpose: str) -> None:
    name = cluster_name(purpose)
    assert len(name) <= 63
    assert name.isascii()
    assert name.isprintable()


@given(st.text(alphabet=st.characters(exclude_characters="\n\0", exclude_categories=["Cs"])))
def test_any_value_survives_the_configuration_file(value: str) -> None:
    text = config_text({"a": value})
    assert text.startswith("a = '")
    assert text.endswith("'\n")
    assert text[5:-2].replace("''", "'").replace("\\\\", "\\") == value


def test_a_line_break_cannot_smuggle_a_setting_in() -> None:
    with pytest.raises(ValueError, match="line break"):
        config_text({"a": "b'\narchive_mode = 'on"})
