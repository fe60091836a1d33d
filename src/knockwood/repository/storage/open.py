"""From an address to a storage: a path, or an object store's URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from knockwood.errors import SettingsError
from knockwood.repository.storage.base import Storage
from knockwood.repository.storage.local import LocalStorage

_OBJECT_STORES: Final = ("s3", "gs", "az")


def open_storage(url: str, **options: Any) -> Storage:
    """The storage at a path, `file:///path`, `s3://bucket/prefix`, `gs://...` or `az://...`.

    `options` go to the object store's client (`timeout`, `retries`, ...: see ObjectStorage). Nothing is
    read or written yet. Raises SettingsError for an address that cannot be meant.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url.strip():
            raise SettingsError("the repository's address is empty", hint="give a path or s3://BUCKET/PREFIX")
        return LocalStorage(Path(url).expanduser())
    if scheme == "file":
        if not rest.startswith("/"):
            raise SettingsError(
                "a file address needs a whole path", where=url, hint=f"did you mean file:///{rest} ?"
            )
        return LocalStorage(Path(unquote(rest)))
    if scheme not in _OBJECT_STORES:
        raise SettingsError(
            f"no storage is known by {scheme}://",
            where=_without_secrets(url),
            hint="give a path, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX",
        )
    # Imported here: a repository on a disk needs no client of an object store.
    from knockwood.repository.storage.objects import ObjectStorage

    return ObjectStorage(_without_secrets(url), **options)


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    if parts.username is not None or parts.query:
        raise SettingsError(
            "the repository's address may hold no credentials or options",
            where=f"{parts.scheme}://{parts.hostname}{parts.path}",
            hint="give them in the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)",
        )
    return url
