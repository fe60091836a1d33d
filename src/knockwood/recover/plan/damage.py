"""What kind of damage a finding tells of: for every check, what mends it or what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from knockwood.model.finding import Finding
from knockwood.recover.plan.situation import RelationFact, Situation

_FILE = re.compile(r"(.*?/\d+)(?:_(fsm|vm|init))?(?:\.\d+)?\Z")
_SYSTEM = re.compile(r"(pg_catalog|information_schema)\.")


class Kind(StrEnum):
    """Kinds of damage, by what mends them."""

    INDEX = "index"
    PAGE = "page"
    FILE = "file"
    MAP = "map"
    SEQUENCE = "sequence"
    UNVALIDATED = "unvalidated"
    ROWS = "rows"
    STATUS = "status"
    ELSEWHERE = "elsewhere"


PHYSICAL: Final = frozenset({Kind.INDEX, Kind.PAGE, Kind.FILE, Kind.MAP, Kind.STATUS})
"""Damage of bytes, which replaying the WAL undoes."""

OF_TABLES: Final = frozenset({Kind.PAGE, Kind.FILE})
"""Damage of what indexes are built from."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A finding with its kind. `table` is the table that is damaged, or whose index is; `doubtful_table`: the
    table's own pages may be the ones that are wrong. `advice` is what to do where nothing here repairs it."""

    kind: Kind
    finding: Finding
    table: tuple[str | None, str | None]
    doubtful_table: bool = False
    advice: str = ""

    @property
    def system(self) -> bool:
        """Whether it lies in a system catalog."""
        place = self.finding.location
        names = (place.relation or "", place.index or "", str(self.finding.evidence.get("toast_of") or ""))
        shared = place.file is not None and place.file.startswith("global/")
        return shared or any(_SYSTEM.match(name) for name in names)


def classify(finding: Finding, situation: Situation) -> Damage:
    """The kind of damage; of a check that is not known, `ELSEWHERE` with the finding's own remedy."""
    rule = _CHECKS.get(finding.check)
    if rule is None:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        return _damage(
            Kind.ELSEWHERE,
            finding,
            f"no repair is known for what the check {finding.check!r} finds{remedy}",
        )
    return rule(finding, situation)


def known_checks() -> frozenset[str]:
    """The checks whose findings have a rule."""
    return frozenset(_CHECKS)


def _damage(kind: Kind, finding: Finding, advice: str = "", doubtful: bool = False) -> Damage:
    place = finding.location
    table = finding.evidence.get("toast_of") or place.relation
    return Damage(kind, finding, (place.database, str(table) if table else None), doubtful, advice)


def _file(finding: Finding, situation: Situation) -> Damage:
    """Damage of a file's page, or of a whole file: an index, a map, or what cannot be made anew."""
    place = finding.location
    match = _FILE.match(place.file or "")
    fork = finding.evidence.get("fork") or (match[2] if match else None) or "main"
    if fork in ("fsm", "vm"):
        return _damage(Kind.MAP, finding)
    if place.index is not None:
        return _damage(Kind.INDEX, finding)
    fact = situation.relations.get(match[1]) if match else None
    if fact is not None and fact.persistence == "u":
        return _damage(Kind.ELSEWHERE, finding, _unlogged(fact))
    missing = finding.check == "segment_files" and finding.evidence.get("last_block_known") is None
    return _damage(Kind.FILE if missing else Kind.PAGE, finding)


def _unlogged(fact: RelationFact) -> str:
    return f"{fact.name} is unlogged: no backup and no WAL holds its rows; make it anew with TRUNCATE, or load it again"


def _index(finding: Finding, situation: Situation) -> Damage:
    """amcheck and comparisons of index and table: the index, unless the table's page could not be read."""
    if finding.location.index is None:
        return _file(finding, situation)
    ctid = (finding.location.key or "").startswith("ctid ")
    # Rows that the index does not know may be old ones that a lost write brought back.
    doubtful = ctid or finding.check == "index_against_heap"
    return _damage(Kind.INDEX, finding, doubtful=doubtful)


def _invalid_index(finding: Finding, situation: Situation) -> Damage:
    if finding.evidence.get("relkind") == "I":
        return _damage(
            Kind.ELSEWHERE,
            finding,
            "the index of a partitioned table becomes valid by itself once each partition has its own:"
            " build and attach the missing one",
        )
    return _damage(Kind.INDEX, finding)


def _constraint(finding: Finding, situation: Situation) -> Damage:
    if finding.evidence.get("kind") == "not_valid":
        return _damage(Kind.UNVALIDATED, finding)
    return _damage(
        Kind.ELSEWHERE,
        finding,
        f"somebody switched it off and may need it so; decide, then {finding.remedy}",
    )


def _kind(kind: Kind) -> Callable[[Finding, Situation], Damage]:
    return lambda finding, situation: _damage(kind, finding)


def _advice(words: str) -> Callable[[Finding, Situation], Damage]:
    def rule(finding: Finding, situation: Situation) -> Damage:
        return _damage(Kind.ELSEWHERE, finding, words.format(remedy=finding.remedy))

    return rule


_CHECKS: Final[Mapping[str, Callable[[Finding, Situation], Damage]]] = MappingProxyType(
    {
        "amcheck_deep": _index,
        "amcheck_heap": _kind(Kind.PAGE),
        "amcheck_index": _index,
        "backup_age": _advice("no data are damaged; take a backup: knockwood backup"),
        "collations": _advice(
            "unique keys may already hold duplicates that REINDEX would stop at: run the check unique_keys,"
            " then {remedy}"
        ),
        "configuration": _advice("a setting is changed by who knows what for; {remedy}"),
        "constraints": _constraint,
        "foreign_keys": _kind(Kind.ROWS),
        "heap_index_counts": _kind(Kind.PAGE),
        "index_against_heap": _index,
        "invalid_indexes": _invalid_index,
        "invariants": _kind(Kind.ROWS),
        "lost_writes": _file,
        "page_checksums": _file,
        "proof_age": _advice("no data are damaged; prove that a restore works: knockwood prove"),
        "row_constraints": _kind(Kind.ROWS),
        "segment_files": _file,
        "sequences": _kind(Kind.SEQUENCE),
        "toast": _kind(Kind.PAGE),
        "transaction_status": _kind(Kind.STATUS),
        "unique_keys": _kind(Kind.ROWS),
        "visibility_map": _kind(Kind.MAP),
        "wal_archive": _advice("the archive cannot be mended from here; {remedy}"),
        "wraparound": _advice("no data are damaged yet; {remedy}"),
    }
)
