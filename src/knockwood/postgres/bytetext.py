"""Text of databases of encoding SQL_ASCII, which is none: any bytes, kept as they are.

UTF-8 where they are that; what is not becomes a lone surrogate for each byte (PEP 383), and that byte again on the way
back. By itself psycopg makes `bytes` of such text, and the server refuses to send as UTF-8 what is not.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Dumper, Loader

_ERRORS = "surrogateescape"
_TYPES = ("text", "varchar", "bpchar", "name", '"char"')
_UNKNOWN = 0
"""Where psycopg looks for types that it does not know."""


class _TextLoader(Loader):
    def load(self, data: Buffer) -> str:
        return bytes(data).decode("utf-8", _ERRORS)


class _TextDumper(Dumper):
    def dump(self, obj: str) -> bytes:
        return obj.encode("utf-8", _ERRORS)


def keep_bytes(connection: psycopg.Connection[Any]) -> None:
    """Take text of this connection's database as it is, if it has no encoding."""
    if connection.info.parameter_status("server_encoding") != "SQL_ASCII":
        return
    # Not through a cursor, which would begin a transaction.
    connection.pgconn.exec_(b"set client_encoding = 'SQL_ASCII'")
    for each in (*_TYPES, _UNKNOWN):
        connection.adapters.register_loader(each, _TextLoader)
    connection.adapters.register_dumper(str, _TextDumper)
