"""Clones for images: with the changed tables alone where the backup's map knows them all, whole otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from knockwood.clone.partial import spawn_for
from knockwood.clone.partial_files import RelationKey
from knockwood.clone.registry import Registry
from knockwood.clone.spawn import spawn
from knockwood.history.standing import ProgramsFor, Spawner, Standing
from knockwood.history.transaction import Transaction
from knockwood.postgres.binaries import find_programs
from knockwood.repository.backups.listing import relation_map
from knockwood.repository.backups.model import Progress
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan

_FIRST_USER_OID = 16384


def clones_for(
    repository: Repository,
    transactions: Sequence[Transaction],
    *,
    purpose: str = "images",
    programs_for: ProgramsFor = find_programs,
    registry: Registry | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Spawner:
    """Makes clones that hold at least the tables which the transactions changed."""

    def make(plan: RestorePlan) -> Standing:
        programs = programs_for(plan.backup.major)
        keys = changed_tables(repository, plan, transactions)
        if not keys:
            return spawn(
                repository, plan, programs=programs, purpose=purpose, registry=registry, progress=progress
            )
        return spawn_for(
            repository, plan, keys, programs=programs, purpose=purpose, registry=registry, progress=progress
        )

    return make


def changed_tables(
    repository: Repository, plan: RestorePlan, transactions: Sequence[Transaction]
) -> list[RelationKey]:
    """The tables that transactions changed, by the map of the plan's backup; none (then a clone has to be
    whole) where they changed the schema or a file that is not in the map.
    """
    relations = relation_map(repository, plan.backup).relations
    by_file = {(each.database_oid, each.filenode): each for each in relations}
    by_oid = {(each.database_oid, each.oid): each for each in relations}
    keys: dict[tuple[str, int], RelationKey] = {}
    if any(one.catalog_changes for one in transactions):
        return []
    for touched in {changes for one in transactions for changes in one.relations}:
        found = by_file.get((touched.database, touched.filenode))
        if found is None:
            return []
        # A TOAST relation comes with its table.
        if found.table is not None:
            found = by_oid.get((found.database_oid, found.table), found)
        if found.kind == "r" and found.oid >= _FIRST_USER_OID:
            keys[found.database, found.oid] = RelationKey(found.database, oid=found.oid)
    return list(keys.values())
