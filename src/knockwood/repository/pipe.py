"""A library's blocking call, run in a thread between an iterator that feeds it and one that takes its output.

The source is read in the caller's own thread, so its errors reach the caller untouched, and the
worker waits for nothing but this pipe.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

WAITING: Final = 4 << 20
"""Bytes that may wait on each side of the worker."""

_PIECE: Final = 1 << 20


class PipeBrokenError(Exception):
    """The worker ended with an error: `cause`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class AbandonedError(Exception):
    """Raised inside the worker when nobody wants its output any more."""


class Pipe:
    """A worker thread between two bounded queues; also the reader and the writer that it is given."""

    def __init__(self, work: Callable[[Pipe], None], name: str) -> None:
        self._changed = threading.Condition()
        self._inbox: deque[bytes] = deque()
        self._outbox: deque[bytes] = deque()
        self._waiting_in = 0
        self._waiting_out = 0
        self._ended = False
        self._abandoned = False
        self._done = False
        self._failure: BaseException | None = None
        self._current = memoryview(b"")
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        # A daemon, so that an iterator somebody forgot cannot keep the program from ending.
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    # The caller's side.

    def offer(self, chunk: bytes) -> bool:
        """Queue a piece of input; False where output must be taken first. Raises PipeBrokenError."""
        with self._changed:
            while self._waiting_in >= WAITING and not self._outbox and not self._done:
                self._changed.wait()
            self.raise_failure()
            if self._waiting_in >= WAITING and not self._done:
                return False
            self._inbox.append(chunk)
            self._waiting_in += len(chunk)
            self._changed.notify_all()
            return True

    def take(self) -> list[bytes]:
        """All output that is ready."""
        with self._changed:
            ready = list(self._outbox)
            self._outbox.clear()
            self._waiting_out = 0
            self._changed.notify_all()
            return ready

    def end_of_input(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for_output(self) -> bool:
        """Wait for output; False when the worker is done and all was taken."""
        with self._changed:
            while not self._outbox and not self._done:
                self._changed.wait()
            return bool(self._outbox)

    def raise_failure(self) -> None:
        """Raise PipeBrokenError if the worker ended with an error."""
        if self._failure is not None:
            raise PipeBrokenError(self._failure) from self._failure

    def finish(self) -> None:
        """Wait for the worker's end; raises PipeBrokenError if it ended with an error."""
        self._thread.join()
        self.raise_failure()

    def abandon(self) -> None:
        """End the worker, if it still works: its next read or write raises AbandonedError."""
        with self._changed:
            self._abandoned = True
            self._inbox.clear()
            self._outbox.clear()
            self._changed.notify_all()
        self._thread.join()

    # The worker's side.

    def _run(self, work: Callable[[Pipe], None]) -> None:
        failure: BaseException | None = None
        try:
            work(self)
            self._hand_over()
        except BaseException as error:
            failure = error
        with self._changed:
            self._failure = failure
            self._done = True
            self._changed.notify_all()

    def read(self, size: int = -1) -> bytes:
        if not self._current:
            with self._changed:
                while not self._inbox and not self._ended and not self._abandoned:
                    self._changed.wait()
                if self._abandoned:
                    raise AbandonedError
                if not self._inbox:
                    return b""
                self._current = memoryview(self._inbox.popleft())
                self._waiting_in -= len(self._current)
                self._changed.notify_all()
            if not self._current:
                return self.read(size)
        piece = self._current if size < 0 else self._current[:size]
        self._current = self._current[len(piece) :]
        return bytes(piece)

    def write(self, data: bytes) -> int:
        self._gathered.append(bytes(data))
        self._gathered_bytes += len(data)
        if self._gathered_bytes >= _PIECE:
            self._hand_over()
        return len(data)

    def flush(self) -> None:
        """Part of being a writer; what was gathered is handed over in large pieces and at the end."""

    def _hand_over(self) -> None:
        data = b"".join(self._gathered)
        self._gathered.clear()
        self._gathered_bytes = 0
        with self._changed:
            while self._waiting_out >= WAITING and not self._abandoned:
                self._changed.wait()
            if self._abandoned:
                raise AbandonedError
            if data:
                self._outbox.append(data)
                self._waiting_out += len(data)
            self._changed.notify_all()
