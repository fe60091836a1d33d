"""Progress of long work, on standard error and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn
from rich.status import Status

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
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
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
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with Status("checking", console=console) as status:

        def update(step: CheckProgress) -> None:
            if step.result is None:
                status.update(f"[{step.position}/{step.total}] {step.check.title}")

        yield update


@contextmanager
def spinner(title: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done now."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task(title)

        def update(text: str) -> None:
            bar.update(task, description=f"{title}: {text}")

        yield update
