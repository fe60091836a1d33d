"""`knockwood wal`: WAL into the repository and back."""

from __future__ import annotations

import getpass
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from knockwood.cli.answer import Answer, escape, print_answer, print_error
from knockwood.cli.common import DEFAULT, Common
from knockwood.errors import KnockwoodError, UsageError
from knockwood.host import clock
from knockwood.model import Verdict
from knockwood.operations.protect import receive_forever
from knockwood.repository import gaps, push
from knockwood.repository.push import PUSH_FAILED, exit_status_of
from knockwood.repository.receive import EventKind, ReceiverEvent

if TYPE_CHECKING:
    from rich.console import Console


def receive_wal(
    *,
    wait: Annotated[float, Parameter(help="Seconds to wait for another receiver to end.")] = 30,
    common: Common = DEFAULT,
) -> int:
    """Receive WAL in the foreground until Ctrl-C; goes on where it stopped.

    A backup receives for itself where nobody else does: this one then takes over when that ends.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    receive_forever(common.open_cluster(), _report, stop, wait=wait)
    return _quiet({"outcome": "stopped"}, common)


def _report(event: ReceiverEvent) -> None:
    if event.kind is EventKind.PARTIAL:
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    style = "red" if event.error else "green"
    console.print(
        f"[dim]{clock.now():%H:%M:%S}[/] [{style}]{event.kind}[/] {escape(event.text)}", soft_wrap=True
    )
    if event.error is not None and event.error.hint:
        console.print(f"         {escape(event.error.hint)}", soft_wrap=True)


def push_wal(path: Path, *, common: Common = DEFAULT) -> int:
    """Store one finished WAL file: `archive_command = 'knockwood wal push %p'`."""
    try:
        outcome = push.push(common.open_cluster().repository(), path)
    except KnockwoodError as error:
        print_error(error, as_json=common.json)
        return PUSH_FAILED
    return _quiet({"outcome": str(outcome)}, common)


def fetch_wal(name: str, destination: Path, *, common: Common = DEFAULT) -> int:
    """Bring back one WAL file: `restore_command = 'knockwood wal fetch %f %p'`."""
    try:
        outcome = push.fetch(common.open_cluster().repository(), name, destination)
    except KnockwoodError as error:
        print_error(error, as_json=common.json)
        return exit_status_of(error)
    _quiet({"outcome": str(outcome)}, common)
    return outcome.exit_status


def _quiet(values: dict[str, object], common: Common) -> int:
    """PostgreSQL logs whatever its commands print: nothing, unless JSON is asked for."""
    return print_answer(Answer(values, lambda _: None), as_json=common.json)


def list_gaps(*, common: Common = DEFAULT) -> Answer:
    """List the WAL that the archive lacks between what it has."""
    found = gaps.list_gaps(common.open_cluster().repository())
    unacknowledged = [gap for gap in found if gap.acknowledged is None]

    def show(console: Console) -> None:
        for gap in found:
            seen = f" [dim]acknowledged by {escape(gap.acknowledged.by)}[/]" if gap.acknowledged else ""
            console.print(f"{gap.range}: {escape(gap.reason)}{seen}")
        console.print(gaps.REMEDY if unacknowledged else "no gap that nobody knows of")

    verdict = Verdict.BROKEN if unacknowledged else Verdict.HELD
    return Answer({"gaps": [gap.as_json() for gap in found]}, show, verdict)


def acknowledge(
    start: Annotated[str, Parameter(help="The LSN where the gap begins, as `wal gaps` prints it.")],
    *,
    note: str,
    by: str | None = None,
    common: Common = DEFAULT,
) -> Answer:
    """Accept a gap: what lies in it cannot be restored, and you know."""
    repository = common.open_cluster().repository()
    chosen = [gap for gap in gaps.list_gaps(repository) if str(gap.range.start) == start]
    if not chosen:
        raise UsageError(f"no gap begins at {start}", hint="`knockwood wal gaps` lists them")
    for gap in chosen:
        gaps.acknowledge(repository, gap.range, by or getpass.getuser(), note)
    values = {"acknowledged": [str(gap.range) for gap in chosen]}
    return Answer(values, lambda console: console.print(f"acknowledged: {', '.join(values['acknowledged'])}"))
