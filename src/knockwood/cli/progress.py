"""Progress of long work, on standard error and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

# rich is imported where there is a terminal: most commands run without one.
if TYPE_CHECKING:
    from rich.console import Console

    from knockwood.integrity.run import CheckProgress


class ByteProgress(Protocol):
    """What backup and restore report: bytes done, bytes expected (0 if unknown), and what is at hand."""

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def current(self) -> str: ...


@contextmanager
def byte_progress(title: str, *, quiet: bool = False) -> Iterator[Callable[[ByteProgress], None]]:
    """A bar of bytes."""
    console = _terminal(quiet)
    if console is None:
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("[dim]{task.fields[current]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, current="")

        def update(step: ByteProgress) -> None:
            bar.update(task, completed=step.done, total=step.total or None, current=step.current[-40:])

        yield update


@contextmanager
def check_progress(*, quiet: bool = False) -> Iterator[Callable[[CheckProgress], None]]:
    """One line per check that ended, and the one at work."""
    console = _terminal(quiet)
    if console is None:
        yield lambda _: None
        return
    from rich.status import Status

    with Status("checking", console=console) as status:

        def update(step: CheckProgress) -> None:
            if step.result is None:
                status.update(f"[{step.position}/{step.total}] {step.check.title}")

        yield update


@contextmanager
def spinner(title: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done now."""
    console = _terminal(quiet)
    if console is None:
        yield lambda _: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task(title)

        def update(text: str) -> None:
            bar.update(task, description=f"{title}: {text}")

        yield update


def _terminal(quiet: bool) -> Console | None:
    if quiet:
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal else None
