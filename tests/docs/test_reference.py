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


def options_in(text: str, app: App) -> Iterator[tuple[str, str]]:
    """Each option of a command that the text shows in use, with the command."""
    for line in re.findall(r"\bknockwood ((?:--config \S+ )?[a-z][^\n`#|;]*)", text.replace("\\\n", " ")):
        words = line.removeprefix("--config ").split()
        command, here = "", app
        while words and words[0] in list(here):
            command, here = f"{command} {words[0]}".strip(), here[words.pop(0)]
        if command and not [inner for inner in here if not inner.startswith("-")]:
            yield from (
                (command, word.partition("=")[0].rstrip(".,:)")) for word in words if word[:2] == "--"
            )


PAGES = [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_that_a_page_shows_exists(page: Path) -> None:
    app = build_app()
    used = set(options_in(page.read_text(), app))
    unknown = set()
    for command, option in used:
        here = app
        for name in command.split():
            here = here[name]
        known = {name for argument in here.assemble_argument_collection() for name in argument.names}
        if option not in known | {"--help"}:
            unknown.add((command, option))
    assert unknown == set()


def test_the_options_of_a_line_are_told() -> None:
    told = set(
        options_in(
            "run `knockwood wal receive --wait=3` or\n$ knockwood log --from \\\n  x --largest\n", build_app()
        )
    )
    assert told == {("wal receive", "--wait"), ("log", "--from"), ("log", "--largest")}
