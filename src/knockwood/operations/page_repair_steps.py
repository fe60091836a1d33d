"""The steps of a page repair as values: what is said of each, and all that its handler needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from knockwood.model import Lsn
from knockwood.model.recovery import Precondition, Step
from knockwood.recover.indexes import Index
from knockwood.recover.pages_facts import Target
from knockwood.recover.plan.page_wal import Poison
from knockwood.recover.plan.pages import Judgement, Procedure
from knockwood.repository.backups.model import Backup

REPAIR: Final = "repair-pages"
MAPS: Final = "rebuild-maps"
ROWS: Final = "replace-rows"
REINDEX: Final = "reindex"

_LOCKED_SECONDS: Final = {Procedure.WRITE: 0.0, Procedure.SAVE_BUFFER: 0.3, Procedure.REPLACE: 0.3}
"""How long writers wait; measured, see docs/page-repair.md."""


def _base(target: Target) -> dict[str, Any]:
    return {"database": target.database, "relation": target.name, "oid": target.oid, "path": target.path}


def _listed(blocks: Iterable[int]) -> str:
    shown = sorted(blocks)
    return ", ".join(map(str, shown[:8])) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _blocks(blocks: Collection[int]) -> str:
    return f"block{'' if len(blocks) == 1 else 's'} {_listed(blocks)}"


_HOW: Final = {
    Procedure.WRITE: "write back the good image of",
    Procedure.SAVE_BUFFER: "write to disk, from the server's own buffers,",
    Procedure.REPLACE: "replace with the good image",
}


def page_step(
    target: Target,
    procedure: Procedure,
    judgements: Mapping[int, Judgement],
    backups: Sequence[Backup],
    beyond: Mapping[int, Lsn],
) -> Step:
    """Pages of one table that the same procedure mends, from the first of the backups that proves them.

    `beyond` are starts of records known to have changed blocks.
    """
    backup, *older = backups
    first = next(iter(judgements.values()))
    kinds = sorted({str(judgement.damage) for judgement in judgements.values()})
    count = f"block{'s' if len(judgements) > 1 else ''} {_listed(judgements)}"
    known = {str(block): str(lsn) for block, lsn in sorted(beyond.items()) if block in judgements}
    readers = "readers and writers go on" if procedure is Procedure.WRITE else "readers and writers wait"
    return Step(
        REPAIR,
        f"{_HOW[procedure]} {count} of {target.name} ({', '.join(kinds)})",
        _base(target)
        | {
            "blocks": sorted(judgements),
            "procedure": str(procedure),
            "since": str(backup.start_lsn),
            "backup": backup.id,
            "older": [each.id for each in older],
            "beyond": known,
        },
        tuple(_page_conditions(target, procedure, judgements, backup, known)),
        locks=f"{first.lock} on {target.owner}: {readers}",
        blocked_seconds=_LOCKED_SECONDS[procedure],
        undo="the damaged pages are kept as evidence; a good page is not taken back",
    )


def _page_conditions(
    target: Target,
    procedure: Procedure,
    judgements: Mapping[int, Judgement],
    backup: Backup,
    known: Mapping[str, str],
) -> Iterator[Precondition]:
    """What has to be so when a page is mended."""
    reasons: dict[str, list[int]] = defaultdict(list)
    for block, judgement in judgements.items():
        reasons[judgement.reason].append(block)
    for reason, blocks in reasons.items():
        yield Precondition("same class", f"block {_listed(blocks)} is still what was found: {reason}")
    yield Precondition("same file", f"{target.name} still lies in {target.path}")
    if procedure is not Procedure.SAVE_BUFFER:
        yield Precondition(
            "newest image",
            f"backup {backup.id} (replayed in a clone where the WAL names the page since) holds it as of its"
            " last WAL record, and the server's WAL names it nowhere since, asked under the lock",
        )
    if known:
        yield Precondition(
            "holds the lost change",
            "the good page is beyond the record that the page here lacks: "
            + ", ".join(f"block {block} beyond {lsn}" for block, lsn in list(known.items())[:8])
            + (" and so on" if len(known) > 8 else ""),
        )


def rows_step(target: Target, poisons: Mapping[int, Poison], backup: Backup) -> Step:
    """Lost changes of the blocks of one table, as rows: all in one transaction."""
    emptied = [block for block, poison in poisons.items() if poison.emptied]
    lost = sum(len(poison.lost) for poison in poisons.values() if not poison.emptied)
    rest = [block for block in poisons if block not in emptied]
    what = [f"all rows of {_blocks(emptied)}"] if emptied else []
    what += [f"the rows of {lost} lost changes to {_blocks(rest)}"] if rest else []
    damages = [
        {
            "block": block,
            "first_after": str(poison.first_after),
            "stale_lsn": str(poison.stale_lsn),
            "lost": [str(lsn) for lsn in poison.lost],
            "xids": list(poison.xids),
            "emptied": poison.emptied,
        }
        for block, poison in sorted(poisons.items())
    ]
    return Step(
        ROWS,
        f"bring over {' and '.join(what)} of {target.name}",
        _base(target)
        | {
            "blocks": sorted(poisons),
            "damages": damages,
            "since": str(backup.start_lsn),
            "backup": backup.id,
        },
        (
            Precondition("primary key", f"{target.name} has one: rows are matched by it"),
            Precondition(
                "unchanged rows", "a row that somebody changed since the damage is never overwritten"
            ),
        ),
        locks=f"SHARE ROW EXCLUSIVE on {target.owner}: writers wait while its indexes are made anew",
        blocked_seconds=None,
        undo="one transaction: knockwood revert takes it back; the rows as they were are kept as evidence",
    )


def map_step(target: Target, fork: str, blocks: list[int]) -> Step:
    """A free space or visibility map."""
    name = "visibility map" if fork == "vm" else "free space map"
    lock = "ACCESS EXCLUSIVE" if fork == "vm" else "SHARE UPDATE EXCLUSIVE"
    return Step(
        MAPS,
        f"make the {name} of {target.name} anew, and VACUUM it",
        _base(target) | {"fork": fork, "blocks": blocks},
        locks=f"{lock} on {target.owner} for a moment; VACUUM lets readers and writers work",
        blocked_seconds=0.1 if fork == "vm" else 0.0,
        undo="nothing to take back: a map holds no rows",
    )


def reindex_step(index: Index) -> Step:
    """One index, known to be damaged."""
    how = "" if index.exclusion else " CONCURRENTLY"
    return Step(
        REINDEX,
        f"REINDEX INDEX{how} {index.name}",
        {
            "database": index.database,
            "index": index.name,
            "table": index.table,
            "oid": index.table_oid,
            "filenode": index.filenode,
            "concurrently": not index.exclusion,
        },
        (Precondition("nobody builds", f"no other index build runs on {index.table}"),),
        locks=f"SHARE on {index.table}: writers wait until it ends (exclusion constraints allow no other way)"
        if index.exclusion
        else f"SHARE UPDATE EXCLUSIVE on {index.table}: readers and writers go on",
        blocked_seconds=None if index.exclusion else 0.0,
        undo="nothing to take back: the old index was damaged",
    )


def indexes_step(target: Target) -> Step:
    """Whatever index of a table lacks rows."""
    return Step(
        REINDEX,
        f"compare the indexes of {target.name} with its rows, REINDEX CONCURRENTLY those that lack some",
        {"database": target.database, "index": None, "table": target.name, "oid": target.oid},
        locks=f"SHARE UPDATE EXCLUSIVE on {target.owner}: readers and writers go on",
        undo="nothing to take back: an index that lacks rows is damaged",
    )
