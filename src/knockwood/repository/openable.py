"""Whether what is encrypted can be opened with the identities at hand: a look at one small object each.

Objects proved once are not read again, so that without this a wrong or lost key would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from knockwood.errors import KnockwoodError, WrongKeyError
from knockwood.repository import codec
from knockwood.repository.repository import Repository
from knockwood.repository.storage import ObjectInfo


def cannot_open(repository: Repository, listing: Mapping[str, ObjectInfo]) -> Iterator[tuple[str, str]]:
    """The parts of the repository that the identities do not open, and why.

    Of each backup and of each timeline's WAL the smallest encrypted object is tried, and of the WAL the
    newest too: recipients may have changed in between. Damage is for others to find.
    """
    for part, names in _samples(listing).items():
        for name in names:
            try:
                next(repository.read(name), None)
            except WrongKeyError as error:
                yield part, error.what
                break
            except KnockwoodError:
                continue


def _samples(listing: Mapping[str, ObjectInfo]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for name in sorted(listing):
        folder, _, rest = name.partition("/")
        if folder in ("backups", "wal") and name.endswith(codec.ENCRYPTED_SUFFIX):
            parts.setdefault(f"{folder}/{rest.partition('/')[0]}/ encrypted content", []).append(name)
    return {
        part: list(dict.fromkeys([min(names, key=lambda name: listing[name].bytes), names[-1]]))
        for part, names in parts.items()
    }
