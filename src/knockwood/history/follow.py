"""The index made as WAL arrives, beside the receiver and never in its way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from knockwood.history.index import ArchiveIndex
from knockwood.repository.repository import Repository


def index_new(repository: Repository, told: Callable[[str], None] = lambda text: None) -> int | None:
    """Index what the archive has and the index has not, in this thread; how many segments are covered.

    For callers to whom nothing may happen: whatever fails is `told`, and None is the answer. What is not
    indexed now is indexed when it is asked for.
    """
    try:
        return len(ArchiveIndex.open(repository, workers=1).heads)
    except Exception as error:
        told(f"the history's index was not brought up to date: {error}")
        return None


@contextmanager
def indexing(
    repository: Repository,
    *,
    every: float = 30.0,
    told: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """Index new segments every so many seconds while the block runs, in a thread that nobody waits for.

    It is off unless a caller asks for it: on demand costs a tenth of a second for each 16 MB, and the
    receiver's promise (WAL durable in the repository) depends on nothing that happens here.
    """
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(every):
            index_new(repository, told)

    thread = threading.Thread(target=work, name="history-index", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
