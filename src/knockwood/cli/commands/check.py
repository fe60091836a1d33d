"""`knockwood check`: integrity, configuration, archive."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from knockwood.cli.answer import Answer, coloured
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import check_progress
from knockwood.errors import UsageError
from knockwood.integrity.check import Budget
from knockwood.integrity.registry import all_checks
from knockwood.integrity.run import Report
from knockwood.operations.check import check as run_check
from knockwood.settings.schema import parse_duration


def check(
    *names: str,
    heavy: Annotated[
        bool, Parameter(negative="", help="Also the checks that read everything, on a clone.")
    ] = False,
    here: Annotated[bool, Parameter(negative="", help="Run heavy checks on the server itself.")] = False,
    max_load: Annotated[float | None, Parameter(help="Wait while the load per core is above this.")] = None,
    statement_timeout: Annotated[str, Parameter(help="Longest single query.")] = "5m",
    lock_timeout: Annotated[str, Parameter(help="Longest wait for a lock.")] = "500ms",
    list: Annotated[bool, Parameter(negative="", help="Only list the checks.")] = False,
    common: Common = DEFAULT,
) -> Answer:
    """Look for damage: the light checks on the server, with --heavy all of them, or the ones named."""
    if list:
        return _listing()
    if max_load is not None and not max_load > 0:
        raise UsageError(f"not a load per core: {max_load:g}", hint="give a number above 0, such as 0.7")
    budget = Budget(max_load, _duration(statement_timeout), _duration(lock_timeout))
    with check_progress(quiet=common.json) as progress:
        report = run_check(
            common.open_cluster(), names, heavy=heavy, here=here, budget=budget, progress=progress
        )
    return Answer(report_json(report), lambda console: show_report(console, report), report.verdict)


def _duration(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        what, _, hint = str(error).partition(": ")
        raise UsageError(what, where=text, hint=hint) from error


def _listing() -> Answer:
    checks = all_checks()

    def show(console: Console) -> None:
        table = Table("check", "weight", "looks for", box=None)
        for item in checks:
            table.add_row(item.name, str(item.weight), escape(item.title))
        console.print(table)

    values = [{"name": item.name, "weight": str(item.weight), "title": item.title} for item in checks]
    return Answer({"checks": values}, show)


def report_json(report: Report) -> dict[str, Any]:
    """The JSON keys of a run of checks."""
    return {
        "findings": [finding.as_json() for finding in report.findings],
        "not_checked": [gap.as_json() for gap in report.not_checked],
        "checks": [
            {"name": result.name, "verdict": str(result.verdict), "seconds": round(result.seconds, 3)}
            for result in report.results
        ],
    }


def show_report(console: Console, report: Report) -> None:
    """Print each check's verdict, then what was found and what to do, then what was not checked."""
    for result in report.results:
        console.print(f"{coloured(result.verdict):>28}  {result.name} [dim]{result.seconds:.2f} s[/]")
    for finding in report.findings:
        console.print(
            f"\n[bold red]{finding.severity}[/] [bold]{escape(finding.summary)}[/] [dim]{finding.check}[/]"
        )
        console.print(f"  where    {escape(str(finding.location))}", soft_wrap=True)
        if finding.meaning:
            console.print(f"  meaning  {escape(finding.meaning)}", soft_wrap=True)
        if finding.remedy:
            console.print(f"  do       {escape(finding.remedy)}", soft_wrap=True)
    if report.not_checked:
        console.print("\n[yellow]not checked[/]")
        for gap in report.not_checked:
            console.print(f"  {gap.check}: {escape(gap.reason)}", soft_wrap=True)
    console.print(f"\n{len(report.findings)} findings: {coloured(report.verdict)}")
