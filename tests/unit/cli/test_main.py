"""The command line as people type it: exit status, suggestions, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.cli.main import common_last, main
from knockwood.errors import EXIT_HELD, EXIT_USAGE


def test_common_options_may_come_first() -> None:
    assert common_last(["--config", "f", "--json", "backup", "--incremental"]) == [
        "backup",
        "--incremental",
        "--config",
        "f",
        "--json",
    ]


@given(st.lists(st.sampled_from(["--config", "f", "--json", "backup", "--cluster=a", "x"])))
def test_no_word_is_lost(words: list[str]) -> None:
    assert sorted(common_last(words)) == sorted(words)


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [(["bakcup"], "backup"), (["drill", "rnu"], "run"), (["check", "--haevy"], "--heavy")],
)
def test_a_typo_suggests_the_right_word(
    words: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == EXIT_USAGE
    assert suggestion in capsys.readouterr().err


def test_an_unknown_check_suggests_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = tmp_path / "k.toml"
    settings.write_text('[cluster.a]\ndsn = "host=/nonexistent"\nrepository = "/nonexistent/r"\n')
    assert main(["check", "page_cheksums", "--config", str(settings)]) == EXIT_USAGE
    assert "page_checksums" in capsys.readouterr().err


def test_errors_are_json_when_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["backups", "--json", "--config", str(tmp_path / "none.toml")]) == EXIT_USAGE
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "knockwood/1"
    assert answer["error"]["code"] == "KW101"


def test_the_list_of_checks_needs_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--list", "--json"]) == EXIT_HELD
    names = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    assert "page_checksums" in names


def test_the_list_of_drills(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "list"]) == EXIT_HELD
    assert "corrupt-table" in capsys.readouterr().out
