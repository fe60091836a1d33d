"""That a page which was changed after it had lost a write has been mended: said in the WAL itself.

The image of the old page stays in the WAL, and nothing in it shows that the lost rows were brought over. So whoever
did that says so by a logical message, which every reader of the same WAL meets: on the server, on a standby, on a
clone, in the archive.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from knockwood.model import Lsn

PREFIX: Final = "knockwood"
"""The messages' prefix. Other messages may have it too."""

_MENDED: Final = re.compile(r"mended (\S+) (\d+) ([0-9A-F]+/[0-9A-F]+)\Z")


class Mended(NamedTuple):
    """The block of the relation at `path` (its first main file, relative to the data directory), of which the record
    at `image` holds a full-page image that lacks changes, has what these made."""

    path: str
    block: int
    image: Lsn

    @property
    def text(self) -> str:
        return f"mended {self.path} {self.block} {self.image}"

    @property
    def statement(self) -> str:
        """What says it, in SQL."""
        return f"select pg_logical_emit_message(true, '{PREFIX}', '{self.text}')"


def mended(payloads: Iterable[bytes]) -> frozenset[Mended]:
    """What the messages of the prefix say was mended."""
    found = (_MENDED.match(payload.decode(errors="replace")) for payload in payloads)
    return frozenset(Mended(each[1], int(each[2]), Lsn.parse(each[3])) for each in found if each)
