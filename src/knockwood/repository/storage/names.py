"""Which object names are allowed: relative, `/` between parts, the same on every storage."""

from __future__ import annotations

import re

from knockwood.errors import RepositoryError

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]*\Z")
_LONGEST = 900
"""Bytes; S3 and GCS allow 1024 with the prefix of the repository."""


def checked(name: str) -> str:
    """The name itself; raises RepositoryError for one that could lie outside the repository.

    No part may begin with a dot: `..` is a way out, and `.tmp-` is what an unfinished write is called.
    """
    parts = name.split("/")
    if len(name) > _LONGEST or not all(_PART.match(part) and len(part) <= 200 for part in parts):
        raise RepositoryError("not a name that an object may have", where=repr(name[:100]))
    return name


def checked_prefix(prefix: str) -> str:
    """A prefix for listing: empty, or the beginning of an allowed name."""
    if prefix:
        checked(prefix.removesuffix("/"))
    return prefix
