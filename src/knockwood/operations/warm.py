"""A warm clone to read from, where there is one: what a repair takes before it makes a cold one."""

from __future__ import annotations

from typing import Final

from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone, Report
from knockwood.errors import KnockwoodError
from knockwood.operations.cluster import Cluster
from knockwood.operations.shadow import warm_clone
from knockwood.postgres.connection import connect, translated
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan

_WAIT: Final = 5.0

_LOCKED: Final = """
select exists (select from pg_catalog.pg_locks
               where locktype = 'relation' and mode = 'AccessExclusiveLock' and granted)
"""


def clone_to_read(
    cluster: Cluster,
    repository: Repository,
    plan: RestorePlan,
    *,
    registry: Registry | None = None,
    progress: Report | None = None,
) -> Clone | None:
    """A warm clone at the plan's target on which every table can be read at once, or None.

    A transaction in progress there (such as the DROP that is to be undone) may hold a table locked against
    everybody, and nobody can end it: reading would wait for ever, so that is no clone to read from.
    """
    clone = warm_clone(cluster, repository, plan, wait=_WAIT, registry=registry, progress=progress)
    if clone is None:
        return None
    try:
        with connect(clone.dsn(clone.entrance)) as connection, translated():
            row = connection.execute(_LOCKED).fetchone()
    except KnockwoodError:
        row = None
    except BaseException:
        clone.destroy()
        raise
    if row is None or row[0]:
        clone.destroy()
        return None
    return clone
