"""Every command, setting and check has its place in the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App
from pydantic import BaseModel

from knockwood.cli.main import build_app
from knockwood.integrity.registry import all_checks
from knockwood.settings import parse
from knockwood.settings.schema import ClusterSettings

DOCS = Path(__file__).resolve().parents[2] / "docs"


def command_names(app: App, prefix: tuple[str, ...] = ()) -> Iterator[str]:
    for name in app:
        if name.startswith("-"):
            continue
        child = app[name]
        below = [inner for inner in child if not inner.startswith("-")]
        if below:
            yield from command_names(child, (*prefix, name))
        else:
            yield " ".join((*prefix, name))


@pytest.mark.parametrize("command", sorted(command_names(build_app())))
def test_every_command_is_documented(command: str) -> None:
    assert f"## `knockwood {command}" in (DOCS / "commands.md").read_text()


@pytest.mark.parametrize("check", [check.name for check in all_checks()])
def test_every_check_has_a_page(check: str) -> None:
    assert (DOCS / "checks" / f"{check}.md").is_file()


def test_every_page_of_a_check_has_its_check() -> None:
    pages = {page.stem for page in (DOCS / "checks").glob("*.md")} - {"README"}
    assert pages == {check.name for check in all_checks()}


def settings_keys(model: type[BaseModel], section: str) -> Iterator[tuple[str, str]]:
    tables = {"objectives", "backup", "wal", "proof", "history", "shadow", "invariant", "application"}
    for name, field in model.model_fields.items():
        if model is ClusterSettings and name in tables:
            kind = field.annotation
            inner = getattr(kind, "__args__", (kind,))[0]
            yield from settings_keys(inner, name)
        else:
            yield section, name


@pytest.mark.parametrize(("section", "key"), sorted(settings_keys(ClusterSettings, "")))
def test_every_setting_is_documented(section: str, key: str) -> None:
    text = (DOCS / "settings.md").read_text()
    heading = f"NAME.{section}]" if section else "NAME]`"
    part = text[text.index(heading) :]
    part = part[: part.index("\n## ")] if "\n## " in part else part
    assert f"| `{key}` |" in part


def test_the_example_of_the_settings_page_loads() -> None:
    [example] = re.findall(r"```toml\n(.*?)```", (DOCS / "settings.md").read_text(), flags=re.DOTALL)
    settings = parse(example.replace('"age1..."', f'"age1{"q" * 58}"'))
    assert settings.cluster["shop"].invariant[0].name == "order total equals its lines"
