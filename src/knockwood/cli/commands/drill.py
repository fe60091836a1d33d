"""`knockwood drill`: outages on purpose, in a sandbox."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from knockwood.cli.answer import Answer, coloured, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.drill.scenarios import SCENARIOS, find_scenario
from knockwood.drill.scenarios.base import Scale
from knockwood.drill.scorecard import Scorecard
from knockwood.drill.story import Kind, Line, Story
from knockwood.errors import UsageError
from knockwood.model import worst

_MARKS = {
    Kind.SETUP: ("·", "dim"),
    Kind.FAULT: ("✗", "bold red"),
    Kind.FOUND: ("!", "yellow"),
    Kind.DONE: ("→", "cyan"),
    Kind.PROVED: ("✓", "green"),
    Kind.FAILED: ("✗", "bold red"),
}


def list_drills(*, common: Common = DEFAULT) -> Answer:
    """List the scenarios."""

    def show(console: Console) -> None:
        for scenario in SCENARIOS.values():
            console.print(f"[bold]{scenario.name}[/]  {escape(scenario.title)}")
            console.print(f"  {escape(scenario.about)}")

    values = [{"name": s.name, "title": s.title, "about": s.about} for s in SCENARIOS.values()]
    return Answer({"scenarios": values}, show)


def run_drills(
    *names: str,
    seed: Annotated[int, Parameter(help="Chooses the pages hit and the clients' behaviour.")] = 1,
    orders: Annotated[int, Parameter(help="Orders in the shop before the drill.")] = 60_000,
    clients: Annotated[int, Parameter(help="Clients writing throughout.")] = 16,
    common: Common = DEFAULT,
) -> Answer:
    """Play the scenarios named, one after the other, and print their scorecards."""
    if not names:
        raise UsageError("no scenario named", hint=f"knockwood drill run {' '.join(SCENARIOS)}")
    chosen = [find_scenario(name) for name in names]
    cards: list[Scorecard] = []
    stage = Console(highlight=False, stderr=common.json)
    for scenario in chosen:
        stage.print(
            Panel(escape(scenario.about), title=f"[bold]{escape(scenario.title)}[/]", title_align="left")
        )
        story = Story(lambda line: _tell(stage, line))
        cards.append(scenario.play(story, Scale(orders=orders, clients=clients), seed, None))
        if not common.json:
            _show_card(stage, cards[-1])
    verdict = worst(card.verdict for card in cards)
    return Answer({"scorecards": [card.as_json() for card in cards]}, lambda _: None, verdict)


def _tell(console: Console, line: Line) -> None:
    mark, style = _MARKS[line.kind]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", width=8, style="dim")
    grid.add_column(width=1)
    grid.add_column()
    grid.add_row(f"{line.at:.1f} s", f"[{style}]{mark}[/]", escape(line.text))
    console.print(grid)


def _show_card(console: Console, card: Scorecard) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    times = card.seconds
    table.add_row("time to detect", seconds(times.detect))
    table.add_row("time to diagnose", seconds(times.diagnose))
    table.add_row("time to mended", seconds(times.restore))
    table.add_row("time to proved", seconds(times.verify))
    table.add_row("promised commits", f"{card.acknowledged_commits:,}")
    table.add_row("lost", f"{card.good_transactions_lost:,}")
    table.add_row(
        "failed requests", f"{card.failed_requests:,} (longest stall {seconds(card.longest_stall)})"
    )
    if card.writers_blocked is not None:
        table.add_row("writers blocked", f"{seconds(card.writers_blocked)} by the repair")
    for item in card.gates:
        mark = "[green]passed[/]" if item.passed else "[bold red]FAILED[/]"
        table.add_row(f"gate: {item.name}", f"{mark} [dim]{escape(item.detail)}[/]")
    console.print(
        Panel(table, title=f"scorecard {card.scenario}: {coloured(card.verdict)}", title_align="left")
    )
