"""What Knockwood can reach on a cluster, what is missing for more, and the exact SQL that mends it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from psycopg import sql

from knockwood.errors import KnockwoodError, ObjectMissingError, RepositoryFormatError
from knockwood.model import Verdict, worst
from knockwood.operations.cluster import Cluster
from knockwood.postgres.connection import (
    Connection,
    ServerFacts,
    connect,
    server_facts,
    translated,
    with_words,
)
from knockwood.postgres.online_backup import grant_to_begin, may_start

EXTENSIONS = {
    "amcheck": "the heap and index checks need it",
    "pg_visibility": "the visibility map check needs it",
}


class Reach(StrEnum):
    """How much of a cluster Knockwood can touch."""

    LOCAL = "local"
    REMOTE = "remote"
    MANAGED = "managed"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Prerequisite:
    """One thing looked at: held, broken (it does not work without), or not checked. `remedy` mends it."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": str(self.verdict),
            "detail": self.detail,
            "remedy": self.remedy,
        }


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The doctor's answer."""

    reach: Reach
    prerequisites: tuple[Prerequisite, ...]

    @property
    def verdict(self) -> Verdict:
        return worst(item.verdict for item in self.prerequisites)


def examine(cluster: Cluster) -> Diagnosis:
    """Look at everything; a failure to look is an answer, never an exception."""
    items: list[Prerequisite] = []
    reach = Reach.NONE
    try:
        with connect(cluster.dsn) as connection:
            facts = server_facts(connection)
            items.append(
                Prerequisite(
                    "server", Verdict.HELD, f"PostgreSQL {facts.major}, cluster {facts.system_identifier}"
                )
            )
            items += _server(connection, cluster, facts)
            replication = _replication(cluster)
            items.append(replication)
            items += _programs(cluster, facts)
            local = _files(cluster, facts)
            items.append(local)
            items += _copying(connection, facts, local)
            items += _extensions(connection, cluster)
            reach = _reach(local.verdict, replication.verdict)
            items.append(_repository(cluster, facts))
    except KnockwoodError as error:
        items.append(Prerequisite("server", Verdict.BROKEN, str(error), error.hint or ""))
        items.append(_repository(cluster, None))
    return Diagnosis(reach, tuple(items))


def _reach(files: Verdict, replication: Verdict) -> Reach:
    if replication is not Verdict.HELD:
        return Reach.MANAGED
    return Reach.LOCAL if files is Verdict.HELD else Reach.REMOTE


def _server(connection: Connection, cluster: Cluster, facts: ServerFacts) -> Iterator[Prerequisite]:
    def setting(name: str) -> str:
        with translated():
            row = connection.execute("select pg_catalog.current_setting(%s, true)", [name]).fetchone()
        return str(row[0]) if row and row[0] is not None else ""

    wanted = {
        "fsync": ("on", "a crash would corrupt the cluster"),
        "full_page_writes": ("on", "a torn page after a crash could not be mended"),
    }
    for name, (good, meaning) in wanted.items():
        value = setting(name)
        yield Prerequisite(
            name,
            Verdict.HELD if value == good else Verdict.BROKEN,
            f"{name} is {value}" + ("" if value == good else f": {meaning}"),
            "" if value == good else f"ALTER SYSTEM SET {name} = {good};",
        )
    enough = facts.wal_level in ("replica", "logical")
    yield Prerequisite(
        "wal_level",
        Verdict.HELD if enough else Verdict.BROKEN,
        f"wal_level is {facts.wal_level}" + ("" if enough else ": the WAL cannot rebuild the cluster"),
        "" if enough else "ALTER SYSTEM SET wal_level = replica; -- then restart",
    )
    yield Prerequisite(
        "data_checksums",
        Verdict.HELD if facts.checksums else Verdict.BROKEN,
        "page checksums are on"
        if facts.checksums
        else "page checksums are off: a disk's bit flip goes unnoticed",
        "" if facts.checksums else "stop the server and run pg_checksums --enable",
    )
    incremental = cluster.settings.backup.incremental is not None
    if facts.major >= 17:
        on = setting("summarize_wal") == "on"
        verdict = Verdict.HELD if on or not incremental else Verdict.BROKEN
        yield Prerequisite(
            "summarize_wal",
            verdict,
            f"summarize_wal is {'on' if on else 'off'}" + ("" if on else ": no incremental backups"),
            "" if on else "ALTER SYSTEM SET summarize_wal = on; SELECT pg_reload_conf();",
        )
    elif incremental:
        yield Prerequisite(
            "summarize_wal",
            Verdict.BROKEN,
            f"PostgreSQL {facts.major} has no incremental backups, the settings ask for them",
            "remove backup.incremental from the settings, or upgrade to 17",
        )


def _replication(cluster: Cluster) -> Prerequisite:
    try:
        with connect(cluster.dsn, replication="true") as connection, translated():
            connection.execute("IDENTIFY_SYSTEM")
    except KnockwoodError as error:
        remedy = (
            error.hint or "does pg_hba.conf have a line for the database named replication and this role?"
        )
        return Prerequisite("replication", Verdict.BROKEN, f"no replication connection: {error}", remedy)
    return Prerequisite("replication", Verdict.HELD, "replication connections are taken")


def _programs(cluster: Cluster, facts: ServerFacts) -> Iterator[Prerequisite]:
    try:
        programs = cluster.programs(facts.major)
    except KnockwoodError as error:
        yield Prerequisite("programs", Verdict.BROKEN, str(error), error.hint or "")
        return
    lacking = [
        name
        for name in ("postgres", "pg_receivewal", "pg_waldump", "pg_controldata")
        if not programs.has(name)
    ]
    yield Prerequisite(
        "programs",
        Verdict.BROKEN if lacking else Verdict.HELD,
        f"{programs.folder}" + (f" lacks {', '.join(lacking)}" if lacking else ""),
        f"apt-get install postgresql-{facts.major}" if lacking else "",
    )


def _files(cluster: Cluster, facts: ServerFacts) -> Prerequisite:
    folder = cluster.settings.data_directory
    if folder is None:
        return Prerequisite(
            "files",
            Verdict.NOT_CHECKED,
            "no data_directory in the settings: pages are not read and not repaired",
            f'data_directory = "{facts.data_directory or "..."}" where Knockwood runs beside the server',
        )
    if not os.access(folder / "global" / "pg_control", os.R_OK):
        return Prerequisite(
            "files",
            Verdict.BROKEN,
            f"{folder} cannot be read by this user",
            "run Knockwood as the server's user, or as root",
        )
    if facts.data_directory is not None and facts.data_directory.resolve() != folder.resolve():
        return Prerequisite(
            "files",
            Verdict.BROKEN,
            f"the server's data directory is {facts.data_directory}, not {folder}",
            f'data_directory = "{facts.data_directory}"',
        )
    return Prerequisite("files", Verdict.HELD, f"{folder} is readable")


def _copying(connection: Connection, facts: ServerFacts, local: Prerequisite) -> Iterator[Prerequisite]:
    """Whether full backups can be copied from the files, by several processes; else they are streamed."""
    if local.verdict is not Verdict.HELD:
        return
    if facts.in_recovery:
        yield Prerequisite("backup by files", Verdict.HELD, "a standby's backups are streamed")
        return
    who = sql.Identifier(connection.info.user).as_string(None)
    may = may_start(connection)
    yield Prerequisite(
        "backup by files",
        Verdict.HELD if may else Verdict.NOT_CHECKED,
        "full backups are copied by several processes"
        if may
        else "full backups are streamed: the role may not begin one itself",
        "" if may else grant_to_begin(facts.major).format(who) + ";",
    )


def _extensions(connection: Connection, cluster: Cluster) -> Iterator[Prerequisite]:
    with translated():
        databases = [
            str(row[0])
            for row in connection.execute(
                "select datname from pg_catalog.pg_database where datallowconn order by 1"
            )
        ]
    missing: dict[str, list[str]] = {name: [] for name in EXTENSIONS}
    unseen: list[str] = []
    for database in databases:
        try:
            with connect(with_words(cluster.dsn, dbname=database)) as inside, translated():
                present = {
                    str(row[0]) for row in inside.execute("select extname from pg_catalog.pg_extension")
                }
        except KnockwoodError:
            unseen.append(database)
            continue
        for name, gaps in missing.items():
            if name not in present:
                gaps.append(database)
    for name, purpose in EXTENSIONS.items():
        lacking = missing[name]
        verdict = Verdict.BROKEN if lacking else Verdict.NOT_CHECKED if unseen else Verdict.HELD
        detail = purpose + (f"; missing in {', '.join(lacking)}" if lacking else "")
        remedy = "; ".join(f"\\c {database} \n CREATE EXTENSION {name}" for database in lacking)
        yield Prerequisite(f"extension {name}", verdict, detail, remedy.replace(" \n ", "; "))


def _repository(cluster: Cluster, facts: ServerFacts | None) -> Prerequisite:
    try:
        repository = cluster.repository(expected_system=facts.system_identifier if facts else None)
    except (ObjectMissingError, RepositoryFormatError) as error:
        return Prerequisite("repository", Verdict.BROKEN, str(error), error.hint or "knockwood init makes it")
    except KnockwoodError as error:
        return Prerequisite("repository", Verdict.BROKEN, str(error), error.hint or "")
    return Prerequisite("repository", Verdict.HELD, f"{repository.storage.url} answers")
