"""The outcomes of recoveries, as the repository keeps them, and what they tell of restores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from knockwood.errors import KnockwoodError, ObjectExistsError
from knockwood.model.recovery import Plan, Recovery
from knockwood.model.wal import Lsn
from knockwood.recover.table_definition import TableName
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan

FOLDER: Final = "recoveries/"
_FORMAT: Final = 1
_SHOWN: Final = 5


def keep(repository: Repository, name: str, plan: Plan, recovery: Recovery) -> None:
    """Store an outcome, beside the proofs; a second time with the same name is fine."""
    content: Mapping[str, Any] = {
        "format": _FORMAT,
        "id": name,
        "plan": plan.as_json(),
        "recovery": recovery.as_json(),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
    try:
        # Findings hold keys and rows: they are encrypted where backups are.
        repository.put(f"{FOLDER}{name}.json", [text.encode("utf-8", "backslashreplace")])
    except ObjectExistsError:
        pass  # a run that was killed had stored it


def aware(repository: Repository, plan: RestorePlan, table: TableName | None = None) -> RestorePlan:
    """The plan, warning of pages (of one table) that it may bring back as they were before a recovery mended them.

    A page is mended in the server's file. Points before that, and restores from backups before that if the mended page
    is in no WAL, have what the disk, or a reader of the damaged page, made of it.
    """
    told = [warning for name, kept in _all(repository) for warning in _warnings(name, kept, plan, table)]
    return replace(plan, warnings=(*plan.warnings, *told))


def _all(repository: Repository) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    for info in repository.storage.list(FOLDER):
        name = info.name.removeprefix(FOLDER).partition(".")[0]
        try:
            yield name, json.loads(b"".join(repository.read(info.name)))
        except (ValueError, KnockwoodError):
            yield name, None


def _warnings(
    name: str, kept: Mapping[str, Any] | None, plan: RestorePlan, table: TableName | None
) -> Iterator[str]:
    try:
        assert kept is not None
        for result in kept["recovery"]["results"]:
            yield from _of_step(name, result["values"], plan, table)
    except (AssertionError, KeyError, TypeError, ValueError):
        yield f"recovery {name} cannot be read: whether it mended pages after this is not known"


def _of_step(
    name: str, values: Mapping[str, Any], plan: RestorePlan, table: TableName | None
) -> Iterator[str]:
    if "good_from" not in values:
        return
    good_from = Lsn.parse(values["good_from"])
    relation = replace(TableName.parse(f"_.{values['relation']}"), database=values["database"])
    # Whose rows a TOAST table has is not kept: it may be this one.
    if table not in (None, relation) and relation.schema != "pg_toast":
        return
    reached = plan.target_lsn if plan.target_lsn is not None else plan.backup.stop_lsn
    if reached < good_from:
        blocks, when = values["blocks"], f"only later, at {good_from}"
    else:
        blocks = values["not_in_wal"] if plan.chain[0].start_lsn < good_from else []
        when = "after the full backup, and the WAL does not hold them"
    if blocks:
        told = ", ".join(map(str, blocks[:_SHOWN])) + (", ..." if len(blocks) > _SHOWN else "")
        yield (
            f"recovery {name} mended pages of {relation} {when}: here they may be"
            f" as they were before (blocks {told}); look with `knockwood check`"
        )
