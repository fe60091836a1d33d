"""age encryption as a stream: what it writes opens with the stock `age` program, without Knockwood."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import pyrage

from knockwood.errors import ObjectDamagedError, SettingsError, WrongKeyError

_WAITING: Final = 4 << 20
"""Bytes that may wait on each side of the worker thread."""

_PIECE: Final = 1 << 20


def recipients_from(texts: Sequence[str]) -> list[Any]:
    """The recipients named by `age1...` and `ssh-...` public keys; raises SettingsError for anything else."""
    return [_recipient(text.strip()) for text in texts]


def _recipient(text: str) -> Any:
    kind = pyrage.ssh.Recipient if text.startswith("ssh-") else pyrage.x25519.Recipient
    if text.startswith("AGE-SECRET-KEY-"):
        # Never echo it: this one is the secret half.
        raise SettingsError(
            "a secret key was given where the public one belongs",
            hint="encrypt to the line that begins with age1: `age-keygen -y FILE` prints it",
        )
    try:
        return kind.from_str(text)
    except pyrage.RecipientError as error:
        raise SettingsError(
            f"not an age recipient: {error}",
            where=text,
            hint="a recipient begins with age1 or ssh-; `age-keygen` makes a pair of keys",
        ) from error


def identities_from(texts: Sequence[str]) -> list[Any]:
    """The secret keys in `texts`: lines of `AGE-SECRET-KEY-1...` (comments allowed) or an SSH private key.

    Raises SettingsError for anything else; no message ever holds a secret.
    """
    found: list[Any] = []
    for text in texts:
        try:
            if "-----BEGIN" in text:
                found.append(pyrage.ssh.Identity.from_buffer(text.encode()))
                continue
            lines = (line.strip() for line in text.splitlines())
            found += [
                pyrage.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")
            ]
        except pyrage.IdentityError as error:
            raise SettingsError(
                f"not an age identity: {error}",
                hint="an identity is the line AGE-SECRET-KEY-1... that `age-keygen` printed",
            ) from error
    return found


def encrypt(chunks: Iterable[bytes], recipients: Sequence[str]) -> Iterator[bytes]:
    """Encrypt a stream to every recipient; raises SettingsError for a recipient that is none."""
    keys = recipients_from(recipients)
    return _through(chunks, lambda reader, writer: pyrage.encrypt_io(reader, writer, keys))


def decrypt(chunks: Iterable[bytes], identities: Sequence[str]) -> Iterator[bytes]:
    """Decrypt a stream. Raises WrongKeyError, or ObjectDamagedError where it was changed or cut short.

    Pieces are authentic when they come out, but only the normal end says that nothing is missing.
    """
    keys = identities_from(identities)
    if not keys:
        raise WrongKeyError(
            "the object is encrypted and no identity was given",
            hint="give the age identity whose public key the repository was encrypted to",
        )
    return _decrypt(chunks, keys)


def _decrypt(chunks: Iterable[bytes], keys: list[Any]) -> Iterator[bytes]:
    try:
        yield from _through(chunks, lambda reader, writer: pyrage.decrypt_io(reader, writer, keys))
    except pyrage.DecryptError as error:
        if "No matching keys" in str(error):
            raise WrongKeyError(
                "no identity given can decrypt the object",
                hint="was it written with other recipients? `age -d -i KEYFILE` tells the same",
            ) from error
        raise ObjectDamagedError(f"not a whole age file: {str(error).lower()}") from error
    except _WorkerError as error:
        raise ObjectDamagedError("encrypted content was changed or cut short") from error


class _WorkerError(Exception):
    """The library gave up reading or writing; the cause is chained."""


class _AbandonedError(Exception):
    """Raised inside the worker when nobody wants its output any more."""


def _through(chunks: Iterable[bytes], work: Callable[[Any, Any], None]) -> Iterator[bytes]:
    """Run `work(reader, writer)` in a thread between `chunks` and the iterator returned.

    The source is read in the caller's own thread, so its errors reach the caller untouched and the
    worker waits for nothing but this pipe: closing the iterator ends it at once.
    """
    pipe = _Pipe(work)
    try:
        for chunk in chunks:
            while not pipe.offer(chunk):
                yield from pipe.take()
            yield from pipe.take()
        pipe.end_of_input()
        while pipe.wait_for_output():
            yield from pipe.take()
        pipe.raise_failure()
    finally:
        pipe.abandon()


class _Pipe:
    """A worker thread between two bounded queues; also the reader and the writer that it is given."""

    def __init__(self, work: Callable[[Any, Any], None]) -> None:
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
        self._thread = threading.Thread(target=self._run, args=(work,), name="age", daemon=True)
        self._thread.start()

    # The caller's side.

    def offer(self, chunk: bytes) -> bool:
        """Queue a piece of input; False where output must be taken first. Raises the worker's failure."""
        with self._changed:
            while self._waiting_in >= _WAITING and not self._outbox and not self._done:
                self._changed.wait()
            self.raise_failure()
            if self._waiting_in >= _WAITING and not self._done:
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
        if self._failure is None:
            return
        if isinstance(self._failure, pyrage.DecryptError | pyrage.EncryptError):
            raise self._failure
        raise _WorkerError(str(self._failure)) from self._failure

    def abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            self._inbox.clear()
            self._outbox.clear()
            self._changed.notify_all()
        self._thread.join()

    # The worker's side.

    def _run(self, work: Callable[[Any, Any], None]) -> None:
        failure: BaseException | None = None
        try:
            work(self, self)
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
                    raise _AbandonedError
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
            while self._waiting_out >= _WAITING and not self._abandoned:
                self._changed.wait()
            if self._abandoned:
                raise _AbandonedError
            if data:
                self._outbox.append(data)
                self._waiting_out += len(data)
            self._changed.notify_all()
