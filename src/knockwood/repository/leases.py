"""Leases: one process does a piece of work at a time, across processes and machines.

A lease is a row of small objects `leases/NAME/<generation>.json`; the one with the highest number
is the truth. Taking, renewing, taking over and giving back all create the next number, and of
several who try only one can: creation fails where the object exists. After creating its number a
process looks again, because the number could have been free only since newer ones replaced it. The
newest two are kept, so that a listing made meanwhile shows at least one of them.

Whether a holder of another machine is dead is judged by the storage's clock alone: the time the
storage gave to its last renewal, against the time it gives to a new object. So no machine's clock
matters. A holder on this machine is judged by whether its process lives.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from knockwood.errors import (
    KnockwoodError,
    LockHeldError,
    ObjectExistsError,
    ObjectMissingError,
    RepositoryError,
    StorageUnavailableError,
)
from knockwood.host import clock
from knockwood.repository.storage import ObjectInfo, Storage
from knockwood.repository.storage.holder import Holder

_KEPT: Final = 2

_PATIENCE: Final = 10
"""Seconds that giving a lease back waits for a renewal under way."""

_GRANULARITY: Final = 2
"""Seconds; object stores keep times to the second."""


class _HasStorage(Protocol):
    @property
    def storage(self) -> Storage: ...


@dataclass(frozen=True, slots=True)
class _State:
    """The newest generation of a lease: its number (0: never taken), its holder (None: free), its time."""

    generation: int
    holder: Holder | None
    modified: datetime | None


@contextmanager
def lease(repository: _HasStorage, name: str, purpose: str, ttl: float = 60) -> Iterator[Lease]:
    """Hold the lease `name` while the block runs, or raise LockHeldError naming the holder.

    A thread renews it three times in `ttl` seconds. A holder whose process on this machine is dead
    is replaced at once, one elsewhere when it did not renew for its ttl. A process that was stopped
    for longer than that may have lost the lease: call `assert_held` before what cannot be undone.
    """
    held = Lease(repository.storage, name, Holder.own(purpose, ttl))
    held.acquire()
    try:
        yield held
    finally:
        held.release()


class Lease:
    """A lease of this process. Use it through `lease`."""

    def __init__(self, storage: Storage, name: str, holder: Holder) -> None:
        self.name = name
        self.holder = holder
        self.generation = 0
        self._storage = storage
        self._folder = f"leases/{name}/"
        self._lost: LockHeldError | None = None
        self._busy = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_released, name=f"lease {name}", daemon=True)

    def acquire(self) -> None:
        """Take the lease or raise LockHeldError."""
        state = self._newest()
        if state.holder is not None and not self._abandoned(state, state.holder):
            raise self._held_by(state.holder)
        self.holder.begin()
        try:
            self._advance(state.generation + 1, self.holder)
        except (LockHeldError, StorageUnavailableError):
            self.holder.end()
            raise
        except BaseException:
            self._withdraw(state.generation + 1)
            raise
        self._thread.start()

    def assert_held(self) -> None:
        """Renew now. Raises LockHeldError if another took the lease, StorageUnavailableError if unknown."""
        with self._busy:
            self._renew()

    def release(self) -> None:
        """Give the lease back; one that cannot be given back now ends by itself."""
        self._stopping.set()
        # A renewal may wait for a storage that does not answer: nobody has to wait with it.
        free = self._busy.acquire(timeout=_PATIENCE)
        try:
            if free and self._lost is None:
                self._advance(self.generation + 1, None)
        except KnockwoodError:
            # The work is done; our process no longer counts the token as held, and for others the
            # lease runs out.
            pass
        finally:
            if free:
                self._busy.release()
            self.holder.end()

    def _withdraw(self, generation: int) -> None:
        """Give back what an attempt to take the lease stored before it was broken off."""
        try:
            if self._written_by(self._object(generation)) == self.holder.token:
                self._advance(generation + 1, None)
        except KnockwoodError:
            # Not stored, or not to be given back now: then it runs out.
            pass
        finally:
            self.holder.end()

    def _renew_until_released(self) -> None:
        while not self._stopping.wait(self.holder.ttl / 3):
            try:
                with self._busy:
                    if not self._stopping.is_set():
                        self._renew()
            except LockHeldError:
                return
            except KnockwoodError:
                # Passing, perhaps: tried again in time. `assert_held` asks the storage itself.
                continue

    def _renew(self) -> None:
        if self._lost is not None:
            raise self._lost
        try:
            self._advance(self.generation + 1, self.holder)
        except LockHeldError as error:
            self._lost = LockHeldError(
                f"the lease {self.name} was lost: {error.what}",
                where=error.where,
                hint="was this process or machine stopped for a while? run it again",
            )
            raise self._lost from error

    def _advance(self, generation: int, holder: Holder | None) -> None:
        """Create a generation and make sure it is the newest; raises LockHeldError if it is not."""
        body = {"holder": holder.to_json() if holder else None, "nonce": secrets.token_hex(8)}
        name = self._object(generation)
        data = json.dumps(body, indent=1).encode()
        try:
            self._storage.put_new(name, [data])
        except ObjectExistsError:
            # An earlier attempt of ours may have stored it and not have been told so.
            if self._written_by(name) != self.holder.token or holder is None:
                raise self._overtaken() from None
        generations = self._generations()
        if generations[-1:] != [generation]:
            self._storage.delete(name)
            raise self._overtaken()
        self.generation = generation
        for old in generations[:-_KEPT]:
            self._storage.delete(self._object(old))

    def _object(self, generation: int) -> str:
        return f"{self._folder}{generation:012d}.json"

    def _written_by(self, name: str) -> str | None:
        holder = self._read(name)
        return holder.token if holder else None

    def _overtaken(self) -> LockHeldError:
        state = self._newest()
        return self._held_by(state.holder)

    def _held_by(self, holder: Holder | None) -> LockHeldError:
        who = f"held by {holder}" if holder else "another process has just had it"
        return LockHeldError(
            who, where=f"{self._storage.url}/{self._folder}", hint="wait for it to end, or stop it first"
        )

    # What the storage shows.

    def _listing(self) -> dict[int, ObjectInfo]:
        found = {}
        for info in self._storage.list(self._folder):
            stem = info.name.removeprefix(self._folder).removesuffix(".json")
            if stem.isdecimal():
                found[int(stem)] = info
        return found

    def _generations(self) -> list[int]:
        return sorted(self._listing())

    def _newest(self) -> _State:
        while listing := self._listing():
            newest = max(listing)
            try:
                return _State(newest, self._read(listing[newest].name), listing[newest].modified)
            except ObjectMissingError:
                # Two renewals since the listing: look again.
                continue
        return _State(0, None, None)

    def _read(self, name: str) -> Holder | None:
        try:
            value = json.loads(b"".join(self._storage.read(name)))
            return Holder.from_json(value["holder"]) if value["holder"] is not None else None
        except (ValueError, KeyError, TypeError) as error:
            raise RepositoryError(
                "a lease that cannot be read",
                where=f"{self._storage.url}/{name}",
                hint="if nothing else works on the repository, delete this object",
            ) from error

    def _abandoned(self, state: _State, holder: Holder) -> bool:
        if holder.known_dead():
            return True
        if state.modified is None:
            return False
        age = (self._storage_now() - state.modified).total_seconds()
        if -_GRANULARITY <= age <= holder.ttl:
            return False
        if age > 0 and not holder.here():
            return True
        # Its process lives, here, or its time lies ahead: a clock that jumped looks the same as a
        # holder that hangs. One that works renews within a third of its ttl.
        clock.sleep(holder.ttl / 2)
        return self._newest().generation == state.generation

    def _storage_now(self) -> datetime:
        probe = f"{self._folder}probe-{secrets.token_hex(8)}.json"
        self._storage.put_new(probe, [b"{}\n"])
        try:
            info = self._storage.info(probe)
        finally:
            self._storage.delete(probe)
        if info is None:
            raise RepositoryError("an object just written is not there", where=f"{self._storage.url}/{probe}")
        return info.modified
