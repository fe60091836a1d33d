"""A repository: a storage, the cluster it belongs to, and the keys its content is encrypted with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from knockwood.errors import (
    KnockwoodError,
    ObjectDamagedError,
    ObjectExistsError,
    ObjectMissingError,
    RepositoryFormatError,
    WrongSystemError,
)
from knockwood.host import clock
from knockwood.host.files import Chunk
from knockwood.repository import age, codec
from knockwood.repository.storage import Storage

if TYPE_CHECKING:
    from knockwood.repository.proved import Proved

FORMAT: Final = 1
"""The newest repository format this version reads and the one it writes."""

HEADER: Final = "repository.json"

_SUFFIXES: Final = (codec.PLAIN_SUFFIX, codec.ENCRYPTED_SUFFIX)


@dataclass(frozen=True, slots=True)
class RepositoryHeader:
    """Which cluster a repository belongs to; `segment_bytes` is its wal_segment_size."""

    format: int
    cluster: str
    system_identifier: int
    segment_bytes: int
    created: datetime

    def to_json(self) -> dict[str, Any]:
        return {
            "knockwood_repository": self.format,
            "cluster": self.cluster,
            # As text: many readers of JSON round 64-bit numbers.
            "system_identifier": str(self.system_identifier),
            "segment_bytes": self.segment_bytes,
            "created": self.created.isoformat(),
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> RepositoryHeader:
        """Raises RepositoryFormatError for a newer format and for what is no header."""
        form = value.get("knockwood_repository") if isinstance(value, dict) else None
        if type(form) is not int or form < 1:
            raise RepositoryFormatError("not a Knockwood repository", where=where)
        if form > FORMAT:
            raise RepositoryFormatError(
                f"the repository has format {form}, this Knockwood reads up to {FORMAT}",
                where=where,
                hint="upgrade Knockwood: pip install --upgrade knockwood",
            )
        try:
            return cls(
                form,
                str(value["cluster"]),
                int(value["system_identifier"]),
                int(value["segment_bytes"]),
                datetime.fromisoformat(value["created"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RepositoryFormatError(
                "the repository's header cannot be read",
                where=where,
                hint="docs/repository.md shows what it holds, so that it can be written anew",
            ) from error


@dataclass(frozen=True, slots=True)
class Stored:
    """What was stored: the full name, bytes as stored, bytes before encoding, sha256 of the stored bytes."""

    name: str
    bytes: int
    raw_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Repository:
    """An open repository. What is put is encrypted when there are `recipients`.

    `read_before` is what was found right in WAL read through this object, by object name.
    """

    storage: Storage
    header: RepositoryHeader
    recipients: tuple[str, ...] = ()
    identities: tuple[str, ...] = field(default=(), repr=False)
    read_before: dict[str, Proved] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def create(
        cls,
        storage: Storage,
        *,
        cluster: str,
        system_identifier: int,
        segment_bytes: int,
        recipients: Sequence[str] = (),
        identities: Sequence[str] = (),
    ) -> Repository:
        """Make a repository for a cluster, or open the one that is there if it is that cluster's.

        Raises WrongSystemError if it belongs to another cluster; SettingsError for a bad key.
        """
        age.recipients_from(recipients)
        header = RepositoryHeader(FORMAT, cluster, system_identifier, segment_bytes, clock.now())
        data = _json(header.to_json())
        try:
            storage.put_new(HEADER, [data])
        except ObjectExistsError:
            found = cls.open(
                storage, expected_system=system_identifier, recipients=recipients, identities=identities
            )
            if found.header.segment_bytes != segment_bytes:
                raise WrongSystemError(
                    f"the repository holds WAL segments of {found.header.segment_bytes} bytes, "
                    f"the cluster writes {segment_bytes}",
                    where=storage.url,
                    hint="was pg_resetwal run? begin a new repository",
                ) from None
            return found
        _must_not_overwrite(storage, data)
        return cls(storage, header, tuple(recipients), tuple(identities))

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        expected_system: int | None = None,
        recipients: Sequence[str] = (),
        identities: Sequence[str] = (),
    ) -> Repository:
        """Open what is there. Raises RepositoryFormatError, WrongSystemError; SettingsError for a bad key."""
        age.recipients_from(recipients)
        age.identities_from(identities)
        where = f"{storage.url}/{HEADER}"
        try:
            header = RepositoryHeader.from_json(_read_json(storage, HEADER), where)
        except ObjectMissingError as error:
            raise RepositoryFormatError(
                "there is no repository here",
                where=storage.url,
                hint="is the address right? `knockwood init` begins a new one",
            ) from error
        except ObjectDamagedError as error:
            raise RepositoryFormatError(
                "the repository's header cannot be read",
                where=where,
                hint="docs/repository.md shows what it holds, so that it can be written anew",
            ) from error
        if expected_system is not None and header.system_identifier != expected_system:
            raise WrongSystemError(
                f"the repository belongs to cluster {header.cluster} (system identifier "
                f"{header.system_identifier}), not to {expected_system}",
                where=storage.url,
                hint="each cluster needs a repository of its own; initdb and pg_upgrade make a new cluster",
            )
        return cls(storage, header, tuple(recipients), tuple(identities))

    def put(self, name: str, chunks: Iterable[Chunk], *, level: int = 1, workers: int = 0) -> Stored:
        """Encode and store content under `name` and the suffix, all or nothing, durable on return.

        Raises ObjectExistsError if the name is stored with either suffix; what exists is durable.
        """
        full = name + codec.suffix(self.recipients)
        for other in _SUFFIXES:
            if name + other != full and self.storage.info(name + other) is not None:
                raise ObjectExistsError("already stored", where=f"{self.storage.url}/{name + other}")
        raw = codec.Counted(chunks, digest=False)
        stored = codec.Counted(codec.encode(raw, self.recipients, level=level, workers=workers))
        self.storage.put_new(full, stored)
        return Stored(full, stored.bytes, raw.bytes, stored.sha256)

    def read(self, name: str) -> Iterator[bytes]:
        """The content of a stored object (its full name), in pieces of at most 128 KiB.

        Raises ObjectMissingError, ObjectDamagedError, WrongKeyError; see codec.decode for when.
        """
        encrypted = name.endswith(codec.ENCRYPTED_SUFFIX)
        if not encrypted and not name.endswith(codec.PLAIN_SUFFIX):
            raise ObjectDamagedError("not the name of encoded content", where=f"{self.storage.url}/{name}")
        try:
            yield from codec.decode(self.storage.read(name), encrypted=encrypted, identities=self.identities)
        except KnockwoodError as error:
            if error.where is None:
                error.where = f"{self.storage.url}/{name}"
            raise

    def find(self, name: str) -> str | None:
        """The full name that `name` is stored under, with whichever suffix, or None."""
        for ending in _SUFFIXES:
            if self.storage.info(name + ending) is not None:
                return name + ending
        return None

    def put_json(self, name: str, value: Any) -> None:
        """Store a value as plain JSON, never encrypted: for what recovery needs to choose, no row data."""
        self.storage.put_new(name, [_json(value)])

    def get_json(self, name: str) -> Any:
        """A value stored by `put_json`. Raises ObjectMissingError, ObjectDamagedError."""
        return _read_json(self.storage, name)


def _must_not_overwrite(storage: Storage, header: bytes) -> None:
    # Some object stores ignore the condition "only if absent": locks and WAL would not be safe there.
    try:
        storage.put_new(HEADER, [header])
    except ObjectExistsError:
        return
    raise RepositoryFormatError(
        "the storage overwrites objects although it was told not to",
        where=storage.url,
        hint="use one that knows conditional writes (If-None-Match)",
    )


def _json(value: Any) -> bytes:
    # What is no UTF-8 in a name becomes one of JSON's own escapes.
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def _read_json(storage: Storage, name: str) -> Any:
    try:
        return json.loads(b"".join(storage.read(name)))
    except ValueError as error:
        raise ObjectDamagedError("not valid JSON", where=f"{storage.url}/{name}") from error
