"""Clones for images: with the changed tables alone, or some of their blocks, where the backup's map knows them all;
whole otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from knockwood.clone.partial import spawn_for
from knockwood.clone.partial_files import RelationKey
from knockwood.clone.registry import Registry
from knockwood.clone.spawn import spawn
from knockwood.history.standing import ProgramsFor, Spawner, Standing
from knockwood.history.touched import Decoded, FileId, Touched, file_of
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
    decoded: Decoded | None = None,
    together: bool = False,
) -> Spawner:
    """Makes clones that hold at least the tables which the transactions changed.

    With `decoded` of large tables only the blocks that its groups touched: each transaction is one, or all of
    them `together`.
    """
    groups = [list(transactions)] if together else [[one] for one in transactions]

    def make(plan: RestorePlan) -> Standing:
        programs = programs_for(plan.backup.major)
        found = [decoded.of(programs, group) for group in groups] if decoded is not None else None
        keys = changed_tables(repository, plan, transactions, found)
        if not keys:
            return spawn(
                repository, plan, programs=programs, purpose=purpose, registry=registry, progress=progress
            )
        return spawn_for(
            repository, plan, keys, programs=programs, purpose=purpose, registry=registry, progress=progress
        )

    return make


def changed_tables(
    repository: Repository,
    plan: RestorePlan,
    transactions: Sequence[Transaction],
    found: Sequence[Touched] | None = None,
) -> list[RelationKey]:
    """The tables that transactions changed, by the map of the plan's backup; none (then a clone has to be
    whole) where they changed the schema or a file that is not in the map. With what they touched, only the
    blocks in question.
    """
    relations = relation_map(repository, plan.backup).relations
    by_file = {(each.database_oid, each.filenode): each for each in relations}
    by_oid = {(each.database_oid, each.oid): each for each in relations}
    keys: dict[tuple[str, int], RelationKey] = {}
    if any(one.catalog_changes for one in transactions):
        return []
    blocks = _blocks(found or ())
    for touched in {changes for one in transactions for changes in one.relations}:
        relation = by_file.get((touched.database, touched.filenode))
        if relation is None:
            return []
        # A TOAST relation comes with its table.
        if relation.table is not None:
            relation = by_oid.get((relation.database_oid, relation.table), relation)
        if relation.kind == "r" and relation.oid >= _FIRST_USER_OID:
            some = None
            if found is not None and (place := file_of(relation.path)) is not None:
                some = blocks.get(place, frozenset())
            keys[relation.database, relation.oid] = RelationKey(
                relation.database, oid=relation.oid, blocks=some
            )
    return list(keys.values())


def _blocks(found: Sequence[Touched]) -> Mapping[FileId, frozenset[int] | None]:
    """Per file the blocks to be read; None for one that is read as a whole."""
    blocks: dict[FileId, set[int]] = defaultdict(set)
    whole: set[FileId] = set()
    for one in found:
        whole |= one.dropped | one.created
        for place, file in one.files.items():
            blocks[place] |= file.blocks
    return {place: None if place in whole else frozenset(blocks[place]) for place in {*blocks, *whole}}
