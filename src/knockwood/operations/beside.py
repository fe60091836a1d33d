"""Work that goes on in a thread beside other work, and does not outlive it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

GoOn = Callable[[], None]
"""Called by the work now and then; raises where nobody wants its result any more."""


class _AbandonedError(Exception):
    """Ends the work; nobody sees it."""


@contextmanager
def beside(work: Callable[[GoOn], T]) -> Iterator[Callable[[], T]]:
    """Run `work(go_on)` while the block runs, which is given a function that waits for its result.

    The result raises what the work raised. Leaving the block ends the work, at its next `go_on()`, and waits for it.
    """
    unwanted = threading.Event()

    def go_on() -> None:
        if unwanted.is_set():
            raise _AbandonedError

    # The work may start processes, which die with the thread that started them: it lives as long as they do.
    with ThreadPoolExecutor(1, thread_name_prefix="beside") as pool:
        try:
            yield pool.submit(work, go_on).result
        finally:
            unwanted.set()
