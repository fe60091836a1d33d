"""First contact with a cluster: its settings, its repository, and the SQL that prepares it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from psycopg import conninfo, sql

from knockwood.errors import SettingsError
from knockwood.host import files
from knockwood.operations.cluster import Cluster
from knockwood.operations.doctor import EXTENSIONS
from knockwood.postgres.connection import connect, server_facts, translated, with_words
from knockwood.postgres.online_backup import grant_to_begin
from knockwood.repository.repository import Repository
from knockwood.settings import parse

# What amcheck and pg_visibility keep to superusers unless granted.
_FUNCTIONS = {
    "amcheck": (
        "bt_index_check(regclass, boolean)",
        "bt_index_parent_check(regclass, boolean, boolean)",
        "verify_heapam(regclass, boolean, boolean, text, bigint, bigint)",
    ),
    "pg_visibility": ("pg_check_frozen(regclass)", "pg_check_visible(regclass)"),
}


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of the preparation and the database it runs in."""

    database: str
    text: str


@dataclass(frozen=True, slots=True)
class Preparation:
    """What `init` does: the settings it writes and the SQL that the server still needs."""

    settings_text: str
    role: str
    statements: tuple[Statement, ...]


def settings_text(name: str, dsn: str, repository: str, data_directory: Path | None) -> str:
    """A knockwood.toml for one cluster; raises SettingsError if a value is not usable."""
    pairs: Mapping[str, str | None] = {
        "dsn": dsn,
        "repository": repository,
        "data_directory": str(data_directory) if data_directory else None,
    }
    lines = [f"[cluster.{name}]"]
    lines += [f"{key} = {_toml(value)}" for key, value in pairs.items() if value is not None]
    lines += [
        "",
        f"[cluster.{name}.objectives]",
        'detect = "60s"',
        'rpo = "5s"',
        'rto = "5m"',
        "",
        f"[cluster.{name}.backup]",
        'full = "weekly"',
        'keep = "30d"',
        "",
    ]
    text = "\n".join(lines)
    parse(text, "init")
    return text


def _toml(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def prepare(name: str, dsn: str, repository: str, data_directory: Path | None, role: str) -> Preparation:
    """Look at the server and make the plan; changes nothing. `role` is who Knockwood will connect as."""
    with connect(dsn) as connection, translated():
        facts = server_facts(connection)
        exists = connection.execute(
            "select rolsuper from pg_catalog.pg_roles where rolname = %s", [role]
        ).fetchone()
        databases = [
            str(row[0])
            for row in connection.execute(
                "select datname from pg_catalog.pg_database where datallowconn order by 1"
            )
        ]
        maintenance = connection.info.dbname
    statements: list[Statement] = []
    who = sql.Identifier(role)
    if exists is None:
        statements.append(_statement(maintenance, "CREATE ROLE {} LOGIN REPLICATION", who))
    if exists is None or not exists[0]:
        statements.append(_statement(maintenance, "GRANT pg_monitor, pg_read_all_data TO {}", who))
        if facts.major >= 15:
            statements.append(_statement(maintenance, "GRANT pg_checkpoint TO {}", who))
        # A full backup copies the files with several processes where it may; the server's stream needs none.
        statements.append(_statement(maintenance, grant_to_begin(facts.major), who))
    for database in databases:
        statements += _extension_statements(dsn, database, role, superuser=bool(exists and exists[0]))
    own = with_words(dsn, user=role) if exists is None or "user" in conninfo.conninfo_to_dict(dsn) else dsn
    return Preparation(settings_text(name, own, repository, data_directory), role, tuple(statements))


def _extension_statements(dsn: str, database: str, role: str, *, superuser: bool) -> list[Statement]:
    with connect(with_words(dsn, dbname=database)) as connection, translated():
        present = {str(row[0]) for row in connection.execute("select extname from pg_catalog.pg_extension")}
        offered = {
            str(row[0]) for row in connection.execute("select name from pg_catalog.pg_available_extensions")
        }
    statements: list[Statement] = []
    for extension in EXTENSIONS:
        if extension not in offered:
            continue
        if extension not in present:
            statements.append(_statement(database, "CREATE EXTENSION {}", sql.Identifier(extension)))
        if not superuser:
            statements += [
                _statement(database, f"GRANT EXECUTE ON FUNCTION {function} TO {{}}", sql.Identifier(role))
                for function in _FUNCTIONS[extension]
            ]
    return statements


def _statement(database: str, template: str, *names: sql.Identifier) -> Statement:
    return Statement(database, sql.SQL(template).format(*names).as_string(None))


def apply_statements(dsn: str, preparation: Preparation) -> None:
    """Run the SQL of the preparation; each statement is its own transaction and can be run again."""
    for statement in preparation.statements:
        with connect(with_words(dsn, dbname=statement.database)) as connection, translated():
            connection.execute(statement.text.encode())


def require_no_settings(path: Path) -> None:
    """Raise SettingsError if there is a settings file already."""
    if path.exists():
        raise SettingsError(
            "there is a settings file already",
            where=str(path),
            hint="name another with --config, or add the cluster to it by hand",
        )


def write_settings(path: Path, text: str) -> None:
    """Write a new settings file; raises SettingsError if there is one already."""
    require_no_settings(path)
    files.write_new(path.absolute(), [text.encode()], mode=0o644)


def make_repository(cluster: Cluster) -> Repository:
    """Make the cluster's repository, or open it when it is this cluster's already."""
    return cluster.create_repository()
