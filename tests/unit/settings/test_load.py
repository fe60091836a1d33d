"""Settings: every mistake at once, each with its line."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.errors import SettingsError
from knockwood.settings import choose_cluster, find_file, parse
from knockwood.settings.lines import key_lines, line_of
from knockwood.settings.schema import parse_duration

GOOD = """
[cluster.shop]
dsn = "host=/run/postgresql dbname=shop user=knockwood"
repository = "s3://backups/knockwood"

[cluster.shop.objectives]
rpo = "5s"

[cluster.shop.backup]
full = "weekly"
incremental = "hourly"

[[cluster.shop.invariant]]
name = "order total equals its lines"
sql = "select o.id from orders o"
every = "1m"
"""


def test_the_documented_example_loads() -> None:
    name, shop = choose_cluster(parse(GOOD), None)
    assert name == "shop"
    assert shop.objectives.rpo == timedelta(seconds=5)
    assert shop.backup.incremental == timedelta(hours=1)
    assert shop.invariant[0].every == timedelta(minutes=1)
    assert shop.history.follow


def test_the_index_of_history_follows_unless_it_is_not_to() -> None:
    text = GOOD + "\n[cluster.shop.history]\nfollow = false\n"
    assert not choose_cluster(parse(text), None)[1].history.follow


def test_every_mistake_is_told_at_once_with_its_line() -> None:
    text = (
        GOOD.replace('rpo = "5s"', 'rpo = "5 parsecs"')
        .replace("incremental =", "incremenal =")
        .replace('every = "1m"', 'evry = "1m"')
        .replace("dbname=shop", "password=secret")
    )
    with pytest.raises(SettingsError) as caught:
        parse(text, "k.toml")
    problems = caught.value.problems
    assert [problem.split(": ")[0] for problem in problems] == [
        "k.toml:3",
        "k.toml:7",
        "k.toml:11",
        "k.toml:16",
    ]
    assert "secret" not in str(problems)
    assert "did you mean incremental?" in problems[2]
    assert "did you mean every?" in problems[3]


def test_broken_toml_names_the_place() -> None:
    with pytest.raises(SettingsError) as caught:
        parse("[cluster.shop\n", "k.toml")
    assert "line 1" in caught.value.problems[0]


@pytest.mark.parametrize(
    ("given_name", "suggestion"), [("shp", "did you mean shop?"), ("zzz", "the settings hold: shop")]
)
def test_an_unknown_cluster_suggests_one(given_name: str, suggestion: str) -> None:
    with pytest.raises(SettingsError) as caught:
        choose_cluster(parse(GOOD), given_name)
    assert caught.value.hint == suggestion


def test_several_clusters_need_a_name() -> None:
    both = parse(GOOD + '\n[cluster.other]\ndsn = "dbname=x"\nrepository = "/r"\n')
    with pytest.raises(SettingsError, match="several clusters"):
        choose_cluster(both, None)


def test_a_missing_file_names_the_places(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no settings file") as caught:
        find_file(tmp_path / "none.toml")
    assert "none.toml" in str(caught.value.where)


def test_two_invariants_of_one_name_are_refused() -> None:
    entry = '\n[[cluster.shop.invariant]]\nname = "order total equals its lines"\nsql = "select 1"\n'
    with pytest.raises(SettingsError) as caught:
        parse(GOOD + entry)
    assert "two invariant entries" in caught.value.problems[0]


@given(st.integers(1, 10**6), st.sampled_from(["s", "m", "h", "d", "w"]))
def test_durations_are_what_they_say(number: int, unit: str) -> None:
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[unit]
    if number * seconds < 86400 * 999_999_999:
        assert parse_duration(f"{number}{unit}") == timedelta(seconds=number * seconds)


@given(st.text(max_size=6))
def test_nonsense_is_never_a_duration_by_accident(text: str) -> None:
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*(ms|s|m|h|d|w)\s*", text):
        return
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


def test_keys_inside_multi_line_strings_are_not_keys() -> None:
    lines = key_lines('[a]\nsql = """\nb = 1\n"""\nc = 2\n')
    assert ("a", "b") not in lines
    assert line_of(lines, ("a", "c")) == 5
    assert line_of(lines, ("a", "zzz")) == 1
