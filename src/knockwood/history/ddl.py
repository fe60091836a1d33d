"""What a transaction changed of the schema: definitions before and after, compared in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from knockwood.postgres.connection import Connection, translated

_DEFINITIONS = Path(__file__).with_suffix(".sql").read_bytes()

Definitions = Mapping[str, str]

COMPARED: Final = frozenset(
    (
        *("pg_class", "pg_attribute", "pg_attrdef", "pg_constraint", "pg_index", "pg_type", "pg_enum"),
        *("pg_proc", "pg_trigger", "pg_rewrite", "pg_policy", "pg_sequence", "pg_inherits", "pg_namespace"),
        *("pg_extension", "pg_depend", "pg_shdepend", "pg_partitioned_table"),
    )
)
"""Catalogs whose changes show in the definitions, or belong to one that does."""

STATISTICS: Final = frozenset(("pg_statistic", "pg_statistic_ext_data"))
"""Catalogs that ANALYZE writes: no schema."""

LARGE_OBJECTS: Final = frozenset(("pg_largeobject", "pg_largeobject_metadata"))


def definitions(connection: Connection) -> Definitions:
    """Every object of the users' schemas with its definition, temporary ones left out."""
    with translated():
        return {label: definition or "" for label, definition in connection.execute(_DEFINITIONS)}


def differences(before: Definitions, after: Definitions) -> Iterator[str]:
    """One line per object that is new, gone, or other than it was."""
    for label in sorted(before.keys() | after.keys()):
        old, new = before.get(label), after.get(label)
        if old is None and new is not None:
            yield f"created {label}{_told(new)}"
        elif new is None and old is not None:
            yield f"dropped {label}{_told(old)}"
        elif old is not None and new is not None and old != new:
            yield f"changed {label}: {_cut(old, new)}"


def _told(definition: str) -> str:
    text = " ".join(definition.lstrip(", ").split())
    return f" ({text})" if text else ""


def _cut(old: str, new: str) -> str:
    """Old and new, without the items of the lists that both share."""
    olds, news = old.split(", "), new.split(", ")
    left = [item for item in olds if item not in news]
    right = [item for item in news if item not in olds]
    return f"{_shown(left)} -> {_shown(right)}"


def _shown(items: Iterable[str]) -> str:
    return " ".join(", ".join(item for item in items if item).split()) or "nothing"


def unexplained(catalogs: Iterable[str]) -> Iterator[str]:
    """Lines for catalogs that were written and are not among the definitions."""
    for name in sorted(set(catalogs) - COMPARED - STATISTICS - LARGE_OBJECTS):
        yield f"changed rows of {name}"
