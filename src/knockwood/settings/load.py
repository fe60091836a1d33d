"""Load knockwood.toml: every mistake at once, each with file, line, key and what is wrong."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from knockwood.errors import SettingsError
from knockwood.settings.lines import key_lines, line_of
from knockwood.settings.schema import ClusterSettings, Settings

FILE_NAME = "knockwood.toml"


def find_file(given: Path | None = None) -> Path:
    """The settings file: the one given, $KNOCKWOOD_CONFIG, or the first of the usual places.

    Raises SettingsError, naming every place looked at.
    """
    if given is not None:
        places = [given]
    elif os.environ.get("KNOCKWOOD_CONFIG"):
        places = [Path(os.environ["KNOCKWOOD_CONFIG"])]
    else:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        places = [Path(FILE_NAME), home / "knockwood" / FILE_NAME, Path("/etc/knockwood") / FILE_NAME]
    for place in places:
        if place.is_file():
            return place
    raise SettingsError(
        "no settings file found",
        where=", ".join(map(str, places)),
        hint="make one with: knockwood init --name shop --dsn 'host=... dbname=...' --repository /path",
    )


def load(given: Path | None = None) -> Settings:
    """Read and check the settings; raises SettingsError whose `problems` lists every mistake."""
    path = find_file(given)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot be read: {error}", where=str(path)) from error
    return parse(text, str(path))


def parse(text: str, name: str = FILE_NAME) -> Settings:
    """The settings in `text`; `name` is the file's name in messages."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError("not valid TOML", where=name, problems=(f"{name}: {error}",)) from error
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        lines = key_lines(text)
        problems = tuple(sorted(_problems(error, lines, name), key=_by_line))
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        raise SettingsError(f"{count} in the settings", where=name, problems=problems) from error


def choose_cluster(settings: Settings, name: str | None) -> tuple[str, ClusterSettings]:
    """The cluster named, or the only one; raises SettingsError otherwise."""
    known = settings.cluster
    if name is None:
        if len(known) == 1:
            return next(iter(known.items()))
        raise SettingsError(
            "the settings hold several clusters",
            hint=f"add --cluster with one of: {', '.join(sorted(known))}",
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise SettingsError(
            f"no cluster named {name}",
            hint=f"did you mean {near[0]}?" if near else f"the settings hold: {', '.join(sorted(known))}",
        )
    return name, known[name]


def _problems(error: ValidationError, lines: dict[Any, int], name: str) -> Iterator[str]:
    for problem in error.errors():
        path = tuple(part for part in problem["loc"] if part != "[key]")
        line = line_of(lines, path)
        key = ".".join(str(part) for part in path)
        place = f"{name}:{line}" if line else name
        yield f"{place}: {key}: {_what(problem['type'], problem['msg'], path)}"


def _what(kind: str, message: str, path: tuple[Any, ...]) -> str:
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), _known_keys(path[:-1]), 1)
        return "unknown key" + (f", did you mean {near[0]}?" if near else "")
    if kind == "missing":
        return "missing"
    return message.removeprefix("Value error, ")[:1].lower() + message.removeprefix("Value error, ")[1:]


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    if not path:
        return list(Settings.model_fields)
    model: type[BaseModel] | None = ClusterSettings
    for part in path[2:]:  # after "cluster" and its name
        if model is None:
            return []
        field = model.model_fields.get(str(part))
        if field is not None:
            model = next((kind for kind in _kinds(field.annotation) if issubclass(kind, BaseModel)), None)
    return list(model.model_fields) if model else []


def _kinds(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from _kinds(argument)


def _by_line(problem: str) -> tuple[int, str]:
    parts = problem.split(":")
    return (int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0, problem)
