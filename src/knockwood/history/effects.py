"""What a transaction did to relations, from counts per file and what its commit record says."""

from __future__ import annotations

from collections.abc import Sequence

from knockwood.history.summary import DELETED, IMAGE, INPLACE, INSERTED, TAKEN_BACK, UPDATED
from knockwood.history.transaction import RelationChanges
from knockwood.postgres.walendings import Ending, File

_FIRST_NORMAL = 16384

_STATISTICS = frozenset({2619, 2840, 3429, 3430, 3381})
"""pg_statistic and its like, with their TOAST tables: ANALYZE changes them, and no definition."""


def relations_of(
    counts: dict[File, list[int]], created: Sequence[File], detail: Ending
) -> tuple[RelationChanges, ...]:
    """What a transaction did to each file.

    A file that it made belongs to a new relation if a relation of that very number was announced to other
    sessions: only a new relation's first file has its relation's number. (It may be the relation that ALTER
    TABLE and VACUUM FULL write to, whose file the old one then gets.) The other new files take the place of
    as many dropped ones, in the same order; where the numbers do not agree (an index was dropped beside a
    TRUNCATE) nothing is said but that the old files are gone.
    """
    own = set(created)
    kept = [file for file in created if file not in detail.dropped]
    fresh = [file for file in kept if (file[1], file[2]) not in detail.relations]
    # The list of a commit record begins with what was to be dropped last.
    gone = [file for file in reversed(detail.dropped) if file not in own]
    successor = dict(zip(gone, fresh, strict=True)) if len(gone) == len(fresh) else {}
    rewritten = {file for file in (kept if gone else fresh) if _filled(counts.get(file))}
    files = {file for file, kinds in counts.items() if any(kinds[:3])} | set(gone) | rewritten
    return tuple(
        sorted(
            _relation(
                file,
                counts.get(file, [0] * 6),
                truncated=file in successor and successor[file] not in rewritten,
                rewritten=file in rewritten or successor.get(file) in rewritten,
                dropped=file in gone,
            )
            for file in files
            if file not in detail.dropped or file in gone
        )
    )


def _filled(kinds: list[int] | None) -> bool:
    return kinds is not None and bool(kinds[INSERTED] or kinds[IMAGE])


def _relation(
    file: File, kinds: list[int], *, truncated: bool, rewritten: bool, dropped: bool
) -> RelationChanges:
    return RelationChanges(
        tablespace=file[0],
        database=file[1],
        filenode=file[2],
        inserted=kinds[INSERTED] - kinds[TAKEN_BACK],
        updated=kinds[UPDATED],
        deleted=kinds[DELETED],
        truncated=truncated,
        rewritten=rewritten,
        dropped=dropped,
    )


def changes_catalogs(counts: dict[File, list[int]], detail: Ending) -> bool:
    """Whether a transaction changed a definition (DDL), as far as its WAL tells.

    Statistics and what VACUUM notes in place are no definitions. Catalogs that were rewritten (VACUUM FULL)
    cannot be told from tables by their numbers: then every announced change counts.
    """
    if not detail.catalogs and not detail.relations:
        return False
    system = {file[2]: kinds for file, kinds in counts.items() if file[2] < _FIRST_NORMAL}
    changed = {number for number, kinds in system.items() if any(kinds[:3])}
    if changed:
        return bool(changed - _STATISTICS)
    return not any(kinds[INPLACE] for kinds in system.values())
