"""An object store (S3, Google Cloud, Azure) as storage.

Small objects are created by one conditional request, so of several writers one wins. Multipart
uploads know no such condition (in the client's door to all three stores): a claim, itself created
by a conditional request, keeps a second writer of the same name out, and just before the upload is
completed both the claim and the absence of the object are looked at again. What remains is a writer
that stands still between that look and the completion for longer than a claim lasts, while
another writes the same name; names of big objects carry the id of their backup, so no other does.

An upload that is killed leaves hidden parts in the bucket: let a lifecycle rule
(AbortIncompleteMultipartUpload) remove them.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, Final, TypeVar

from knockwood.errors import (
    KnockwoodError,
    LockHeldError,
    ObjectExistsError,
    ObjectMissingError,
    RepositoryError,
    SettingsError,
    StorageUnavailableError,
)
from knockwood.host import clock
from knockwood.host.files import Chunk
from knockwood.repository.pipe import Pipe, PipeBrokenError
from knockwood.repository.storage.base import ObjectInfo
from knockwood.repository.storage.failures import translate
from knockwood.repository.storage.holder import Holder
from knockwood.repository.storage.names import checked, checked_prefix

try:
    import obstore
    from obstore import exceptions, store
except ImportError as error:  # pragma: no cover - depends on the installation
    raise SettingsError(
        "the client for object stores is not installed", hint="pip install 'knockwood[s3]'"
    ) from error

Result = TypeVar("Result")

SINGLE_BYTES: Final = 24 << 20
"""Up to here an object is held in memory and stored by one request; a 16 MiB WAL segment fits."""

PART_BYTES: Final = 16 << 20
"""S3 allows 10,000 parts: objects up to 156 GiB."""

_UPLOADS: Final = 3
"""Parts of one object on their way at the same time."""

_READ_BYTES: Final = 1 << 20
_CLAIM_SECONDS: Final = 3600.0


class ObjectStorage:
    """The objects below an address such as `s3://bucket/prefix`.

    `timeout` is the seconds to wait for an answer, `retries` how often a passing failure is tried
    again (with growing pauses from 0.1 to 15 s) before StorageUnavailableError. Addresses of
    compatible stores and all credentials come from the environment (`AWS_ENDPOINT_URL`,
    `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ALLOW_HTTP`, `GOOGLE_...`, `AZURE_...`)
    or from `config`, which is obstore's.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60,
        retries: int = 6,
        single_bytes: int = SINGLE_BYTES,
        part_bytes: int = PART_BYTES,
        config: dict[str, Any] | None = None,
        client: dict[str, Any] | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._retries = retries
        self._single_bytes = single_bytes
        self._part_bytes = part_bytes
        self._bucket_seen = False
        wait = timedelta(seconds=timeout)
        client_options: dict[str, Any] = {
            "connect_timeout": min(wait, timedelta(seconds=10)),
            # For each wait for bytes; a whole answer may take as long as its reader does.
            "read_timeout": wait,
            "timeout": timedelta(hours=24),
            # The client does not look at this variable when it is given options.
            "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on"),
            **(client or {}),
        }
        # The client repeats what is harmless to repeat; creation we repeat ourselves, because the
        # repetition of a creation that did succeed is told that the object exists.
        patient = {"max_retries": retries, "retry_timeout": timedelta(seconds=timeout * (retries + 1))}
        try:
            self._store = self._open(client_options, patient, config)
            self._once = self._open(client_options, {"max_retries": 0}, config)
        except (exceptions.BaseError, ValueError) as error:
            raise SettingsError(
                f"the object store's settings cannot be used: {str(error).partition(chr(10))[0]}", where=url
            ) from error

    def _open(self, client: dict[str, Any], retry: dict[str, Any], config: dict[str, Any] | None) -> Any:
        arguments: dict[str, Any] = {"client_options": client, "retry_config": retry, "config": config}
        return store.from_url(self._url, **arguments)

    def __repr__(self) -> str:
        return f"ObjectStorage({self._url!r})"

    @property
    def url(self) -> str:
        return self._url

    # Writing.

    def put_new(self, name: str, chunks: Iterable[Chunk]) -> int:
        checked(name)
        # A second writer should not read and encode everything only to be told.
        if self.info(name) is not None:
            raise self._exists(name)
        source = iter(chunks)
        begin: list[bytes] = []
        size = 0
        for chunk in source:
            begin.append(bytes(chunk))
            size += len(begin[-1])
            if size > self._single_bytes:
                return self._put_big(name, begin, source)
        data = b"".join(begin)
        begin.clear()
        self._create(name, data)
        return size

    def _create(self, name: str, data: bytes) -> None:
        uncertain = False

        def attempt() -> None:
            nonlocal uncertain
            try:
                obstore.put(self._once, name, data, mode="create", use_multipart=False)
            except exceptions.AlreadyExistsError:
                if not (uncertain and self._holds(name, data)):
                    raise self._exists(name) from None
            except Exception:
                uncertain = True
                raise

        self._patiently(attempt, name)

    def _holds(self, name: str, data: bytes) -> bool:
        info = self.info(name)
        return info is not None and info.bytes == len(data) and b"".join(self.read(name)) == data

    def _put_big(self, name: str, begin: list[bytes], rest: Iterator[Chunk]) -> int:
        # The client runs in a thread of its own: what the source does, which may be a request to an
        # object store, cannot be done in the midst of a request.
        def upload(pipe: Pipe) -> None:
            obstore.put(
                self._store,
                name,
                iter(lambda: pipe.read(_READ_BYTES), b""),
                use_multipart=True,
                chunk_size=self._part_bytes,
                max_concurrency=_UPLOADS,
            )

        size, completing = 0, False
        with self._claim(name) as still_ours:
            pipe = Pipe(upload, "upload")
            try:
                for chunk in chain(_emptying(begin), rest):
                    size += len(chunk)
                    pipe.offer(bytes(chunk))
                still_ours()
                completing = True
                pipe.end_of_input()
                pipe.finish()
            except PipeBrokenError as broken:
                # A completion that succeeded may be repeated and then told that there is no such
                # upload. The object was not there a moment ago and the claim is ours: what is there
                # now, we stored.
                stored = self.info(name) if completing else None
                if stored is None or stored.bytes != size:
                    raise self._upload_failed(broken, name) from broken.cause
            finally:
                pipe.abandon()
            stored = self.info(name)
        if stored is None or stored.bytes != size:
            raise RepositoryError("the object store did not keep what was written", where=self._where(name))
        return size

    def _upload_failed(self, broken: PipeBrokenError, name: str) -> BaseException:
        return (
            translate(broken.cause, self._where(name))
            if isinstance(broken.cause, Exception)
            else broken.cause
        )

    @contextmanager
    def _claim(self, name: str) -> Iterator[Callable[[], None]]:
        claim = f"claims/{name}.json"
        holder = Holder.own("store an object", _CLAIM_SECONDS)
        data = json.dumps(holder.to_json(), indent=1).encode()
        holder.begin()
        try:
            try:
                self._create(claim, data)
            except ObjectExistsError:
                self._drop_dead_claim(claim)
                self._create(claim, data)

            def still_ours() -> None:
                if not self._holds(claim, data):
                    raise LockHeldError("another process stores the same object", where=self._where(name))
                if self.info(name) is not None:
                    raise self._exists(name)

            yield still_ours
        finally:
            holder.end()
            try:
                if self._holds(claim, data):
                    self.delete(claim)
            except KnockwoodError:
                # For others it ends with our process, or in an hour.
                pass

    def _drop_dead_claim(self, claim: str) -> None:
        info = self.info(claim)
        if info is None:
            return
        try:
            holder = Holder.from_json(json.loads(b"".join(self.read(claim))))
        except ObjectMissingError:
            return
        except (ValueError, KeyError, TypeError):
            holder = None
        if holder is None or not holder.known_dead():
            age = (self._now() - info.modified).total_seconds()
            if age <= _CLAIM_SECONDS:
                raise LockHeldError(
                    "another process stores the same object" + (f" ({holder})" if holder else ""),
                    where=self._where(claim),
                    hint="wait for it to end; if it is dead, it is ignored after an hour",
                )
        self.delete(claim)

    def _now(self) -> Any:
        probe = f"claims/probe-{secrets.token_hex(8)}"
        self._create(probe, b"")
        try:
            info = self.info(probe)
        finally:
            self.delete(probe)
        if info is None:
            raise RepositoryError("an object just written is not there", where=self._where(probe))
        return info.modified

    # Reading.

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        checked(name)
        if end is not None and end <= start:
            self._must_exist(name)
            return
        position, tag, failures = start, None, 0
        while True:
            try:
                answer = self._get(name, position, end, tag)
                if answer is None:
                    return
                tag = answer.meta["e_tag"]
                for piece in answer.stream(min_chunk_size=_READ_BYTES):
                    data = bytes(piece)
                    position += len(data)
                    failures = 0
                    yield data
                if position < answer.range[1]:
                    raise StorageUnavailableError("the answer was cut short", where=self._where(name))
                return
            except (exceptions.BaseError, OSError, StorageUnavailableError) as error:
                # A connection that broke is taken up again where it ended.
                failures += 1
                ours = error if isinstance(error, RepositoryError) else translate(error, self._where(name))
                if failures > self._retries or not isinstance(ours, StorageUnavailableError):
                    raise ours from error
                clock.sleep(_pause(failures))

    def _get(self, name: str, start: int, end: int | None, tag: str | None) -> Any:
        options: obstore.GetOptions = {}
        if tag is not None:
            options["if_match"] = tag
        if end is not None:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        try:
            return obstore.get(self._store, name, options=options)
        except exceptions.BaseError as error:
            # Beyond the end there is nothing, as in a file.
            if "416" in str(error) and self._must_exist(name).bytes <= start:
                return None
            raise

    def _must_exist(self, name: str) -> ObjectInfo:
        info = self.info(name)
        if info is None:
            raise ObjectMissingError("no such object", where=self._where(name))
        return info

    def info(self, name: str) -> ObjectInfo | None:
        checked(name)
        try:
            meta = obstore.head(self._store, name)
        except FileNotFoundError:
            self._must_have_bucket()
            return None
        except exceptions.BaseError as error:
            raise translate(error, self._where(name)) from error
        return _info(meta)

    def _must_have_bucket(self) -> None:
        # The answer to HEAD is the same for an absent object and an absent bucket.
        if not self._bucket_seen:
            try:
                next(iter(obstore.list(self._store, chunk_size=1)), None)
            except (exceptions.BaseError, OSError) as error:
                raise translate(error, self._url) from error
            self._bucket_seen = True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        checked_prefix(prefix)
        folder = prefix.rpartition("/")[0]
        found: list[ObjectInfo] = []
        try:
            for page in obstore.list(self._store, folder or None):
                found += [_info(meta) for meta in page if meta["path"].startswith(prefix)]
        except FileNotFoundError as error:
            raise translate(error, self._url) from error
        except exceptions.BaseError as error:
            raise translate(error, self._where(prefix)) from error
        # Not every store answers in the order of names: some walk folder by folder.
        found.sort(key=lambda info: info.name)
        yield from found

    def delete(self, name: str) -> None:
        checked(name)
        try:
            obstore.delete(self._store, name)
        except FileNotFoundError:
            self._must_have_bucket()
        except exceptions.BaseError as error:
            raise translate(error, self._where(name)) from error

    # Both.

    def _patiently(self, attempt: Callable[[], Result], name: str) -> Result:
        for failures in range(1, self._retries + 2):
            try:
                return attempt()
            except exceptions.BaseError as error:
                ours = translate(error, self._where(name))
                if failures > self._retries or not isinstance(ours, StorageUnavailableError):
                    raise ours from error
            clock.sleep(_pause(failures))
        raise AssertionError("unreachable")

    def _where(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _exists(self, name: str) -> ObjectExistsError:
        return ObjectExistsError("already stored", where=self._where(name))


def _emptying(pieces: list[bytes]) -> Iterator[bytes]:
    # Lets go of each piece, so that the memory is free before the upload ends.
    while pieces:
        yield pieces.pop(0)


def _pause(failures: int) -> float:
    # Spread, so that many who failed together do not come back together.
    return min(15.0, 0.1 * 2.0**failures) * (0.5 + secrets.randbelow(1000) / 2000)


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"])
