"""What a command hands to the renderer: one JSON object, a verdict, and a way to show it to people."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knockwood.errors import (
    EXIT_BROKEN,
    EXIT_HELD,
    EXIT_NOT_CHECKED,
    EXIT_REFUSED,
    KnockwoodError,
    SettingsError,
)
from knockwood.model import Verdict

# rich is imported where something is shown: with --json nothing is.
if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "knockwood/1"

_EXITS = {Verdict.HELD: EXIT_HELD, Verdict.BROKEN: EXIT_BROKEN, Verdict.NOT_CHECKED: EXIT_NOT_CHECKED}
_COLOURS = {Verdict.HELD: "green", Verdict.BROKEN: "red", Verdict.NOT_CHECKED: "yellow"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A command's result. Without a verdict the command succeeded by returning. `refused`: what was asked
    for was not done, because it would lose or endanger data; the values say why."""

    values: Mapping[str, Any]
    show: Callable[[Console], None]
    verdict: Verdict | None = None
    refused: bool = False

    @property
    def exit_status(self) -> int:
        if self.refused:
            return EXIT_REFUSED
        return EXIT_HELD if self.verdict is None else _EXITS[self.verdict]

    def as_json(self) -> dict[str, Any]:
        head: dict[str, Any] = {"schema": SCHEMA}
        if self.verdict is not None:
            head["verdict"] = str(self.verdict)
        return head | dict(self.values)


def print_answer(answer: Answer, *, as_json: bool) -> int:
    """Write the answer to standard output; returns the exit status."""
    if as_json:
        json.dump(answer.as_json(), sys.stdout, indent=2, default=str)
        sys.stdout.write("\n")
    else:
        from rich.console import Console

        answer.show(Console(highlight=False, soft_wrap=not sys.stdout.isatty()))
    sys.stdout.flush()
    return answer.exit_status


def print_error(error: KnockwoodError, *, as_json: bool) -> int:
    """Say what happened, where, and what to do; returns the exit status."""
    problems = error.problems if isinstance(error, SettingsError) else ()
    if as_json:
        values = {
            "code": error.code,
            "what": error.what,
            "where": error.where,
            "hint": error.hint,
            "retry_safe": error.retry_safe,
            "problems": list(problems),
        }
        # Damage that an error tells of was seen; any other error means that nothing was.
        verdict = Verdict.BROKEN if error.exit_status == EXIT_BROKEN else Verdict.NOT_CHECKED
        json.dump({"schema": SCHEMA, "verdict": str(verdict), "error": values}, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return error.exit_status
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print(f"[bold red]error[/] [dim]{error.code}[/] {escape(str(error))}", soft_wrap=True)
    for problem in problems:
        console.print(f"  {escape(problem)}", soft_wrap=True)
    if error.hint:
        console.print(f"[bold]hint[/]  {escape(error.hint)}", soft_wrap=True)
    if error.retry_safe:
        console.print("[dim]a retry is safe[/]")
    return error.exit_status


def escape(text: str) -> str:
    """The text with nothing in it that rich would take for markup."""
    from rich.markup import escape

    return escape(text)


def coloured(verdict: Verdict, text: str | None = None) -> str:
    """The verdict in its colour, as rich markup."""
    words = text if text is not None else str(verdict).replace("_", " ")
    return f"[{_COLOURS[verdict]}]{escape(words)}[/]"


def megabytes(count: float) -> str:
    """Bytes for people: `12.3 MB`, `4.56 GB`."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def seconds(count: float | None) -> str:
    """Seconds for people: `0.42 s`, `3 min 12 s`."""
    if count is None:
        return "unknown"
    if count < 60:
        return f"{count:.2f} s" if count < 10 else f"{count:.0f} s"
    return f"{int(count // 60)} min {int(count % 60)} s"
