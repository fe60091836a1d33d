"""The map of names to files, gathered from every database while the files stream."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from io import TextIOWrapper
from typing import IO

from knockwood.postgres import catalog


class RelationCollector:
    """Reads the map of names to files, in a thread, while the files stream."""

    def __init__(self, dsn: str, known: Sequence[catalog.Database]) -> None:
        self._dsn = dsn
        self._known = known
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 -- closed by __exit__
        self._thread = threading.Thread(target=self._collect, name="relations", daemon=True)
        self._stop = False

    def __enter__(self) -> RelationCollector:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        if self._thread.ident is not None:
            self._thread.join()
        self._file.close()

    def start(self) -> None:
        self._thread.start()

    def chunks(self) -> Iterator[bytes]:
        """What was found, one JSON line each; waits for the end."""
        if self._thread.ident is not None:
            self._thread.join()
        self._file.flush()
        yield from chunks_of(self._file)

    def _collect(self) -> None:
        known = {database.name: database for database in self._known}
        done: set[str] = set()
        try:
            for database, row in catalog.relations_everywhere(self._dsn, self._known):
                if self._stop:
                    return
                self._file.write(json.dumps(_relation_line(database, row)) + "\n")
                done.add(database.name)
        except Exception as error:  # the map is a convenience: a backup without it is still a backup
            for name in known.keys() - done:
                self._file.write(json.dumps({"database": name, "not_recorded": str(error)}) + "\n")


def _relation_line(
    database: catalog.Database, row: catalog.RelationRow | catalog.NotRecorded
) -> dict[str, object]:
    if isinstance(row, catalog.NotRecorded):
        return {"database": row.database, "not_recorded": row.reason}
    return {"database": database.name, "database_oid": database.oid} | asdict(row)


def chunks_of(file: IO[bytes] | TextIOWrapper) -> Iterator[bytes]:
    """All of a temporary file, from its start, in pieces."""
    file.seek(0)
    while data := file.read(1 << 20):
        yield data.encode() if isinstance(data, str) else data
