"""`knockwood doctor`: reach, prerequisites, and what mends them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knockwood.cli.answer import Answer, coloured, escape
from knockwood.cli.common import DEFAULT, Common
from knockwood.operations import doctor as operation

if TYPE_CHECKING:
    from rich.console import Console


def doctor(*, common: Common = DEFAULT) -> Answer:
    """Say what Knockwood can reach here, what is missing for more, and print what mends it."""
    found = operation.examine(common.open_cluster())

    def show(console: Console) -> None:
        console.print(f"reach: [bold]{found.reach}[/]")
        for item in found.prerequisites:
            console.print(f"{coloured(item.verdict)} {item.name}: {escape(item.detail)}", soft_wrap=True)
            if item.remedy:
                console.print(f"  {escape(item.remedy)}", style="cyan", soft_wrap=True)

    checks = [item.as_json() for item in found.prerequisites]
    return Answer({"reach": str(found.reach), "checks": checks}, show, found.verdict)
