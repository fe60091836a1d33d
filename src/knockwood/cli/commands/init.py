"""`knockwood init`: settings, repository, and the SQL that prepares the server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from knockwood.cli.answer import Answer, escape
from knockwood.cli.common import DEFAULT, Common
from knockwood.operations import setup
from knockwood.operations.cluster import Cluster
from knockwood.settings import parse
from knockwood.settings.load import FILE_NAME

if TYPE_CHECKING:
    from rich.console import Console


def init(
    *,
    name: str,
    dsn: str,
    repository: str,
    data_directory: Path | None = None,
    role: Annotated[str, Parameter(help="The role Knockwood connects as.")] = "knockwood",
    apply: Annotated[bool, Parameter(negative="", help="Also run the SQL shown.")] = False,
    common: Common = DEFAULT,
) -> Answer:
    """Write the settings and make the repository; show the SQL that prepares the server.

    Parameters
    ----------
    name: What you call the cluster, such as `shop`.
    dsn: How to reach it, without a password, such as `host=/run/postgresql dbname=shop user=postgres`.
    repository: A folder, or `s3://bucket/prefix`.
    data_directory: The server's files, when Knockwood runs beside it.
    """
    path = common.config or Path(os.environ.get("KNOCKWOOD_CONFIG") or FILE_NAME)
    setup.require_no_settings(path)
    plan = setup.prepare(name, dsn, repository, data_directory, role)
    settings = parse(plan.settings_text, str(path))
    # The repository is made with the connection given: the role may not exist yet.
    chosen = settings.cluster[name].model_copy(update={"dsn": dsn})
    cluster = Cluster(name, chosen, Cluster.of(settings, name).state)
    made = setup.make_repository(cluster)
    if apply:
        setup.apply_statements(dsn, plan)
    # Last, so that an `init` that failed can be run again.
    setup.write_settings(path, plan.settings_text)

    def show(console: Console) -> None:
        console.print(escape(f"wrote {path}; the repository is {made.storage.url}"), soft_wrap=True)
        if plan.statements:
            console.print(
                "the server was prepared with:"
                if apply
                else "\nrun this once as a superuser (or init --apply):"
            )
        for statement in plan.statements:
            console.print(
                f"  [dim]{escape(statement.database)}=#[/] {escape(statement.text)};", soft_wrap=True
            )
        console.print(
            "\nnext: knockwood doctor; then keep `knockwood wal receive` running and take a `knockwood backup`",
            soft_wrap=True,
        )

    sql = [{"database": statement.database, "sql": statement.text} for statement in plan.statements]
    return Answer({"config": str(path), "repository": made.storage.url, "sql": sql, "applied": apply}, show)
