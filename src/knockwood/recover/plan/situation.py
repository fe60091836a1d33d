"""What a decision about repairs rests on: the facts, each None where nobody knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from knockwood.model.finding import Verdict
from knockwood.model.recovery import ExpectedLoss

Reach = Literal["local", "remote", "managed"]


@dataclass(frozen=True, slots=True)
class RelationFact:
    """A relation with storage, by the path of its first file: pg_class's letters, and its bytes."""

    database: str
    name: str
    kind: str
    persistence: str = "p"
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured on this cluster. `scan`: bytes per second that tables are read; `proved_seconds`: how
    long the newest proof took to restore all of it."""

    scan: float | None = None
    proved_seconds: float | None = None

    @staticmethod
    def seconds(count: int | None, rate: float | None) -> float | None:
        """How long `count` bytes last at `rate`; None where either is unknown."""
        return round(count / rate, 1) if count is not None and rate else None


@dataclass(frozen=True, slots=True)
class WholeRestore:
    """What restoring the whole cluster would come to.

    `target` is as the operator wrote it, `lsn` the position it resolved to. `rows_back`: the target lies
    before now, so that rows written wrongly since are gone too. `ordered`: the operator asked for it in place.
    `refused` says why it cannot be done. `unread`: whether its WAL is whole was not looked at.
    """

    target: str
    backup: str = ""
    backup_bytes: int | None = None
    wal_bytes: int | None = None
    free_bytes: int | None = None
    expected_loss: ExpectedLoss = field(default_factory=ExpectedLoss)
    rows_back: bool = False
    ordered: bool = False
    arguments: Mapping[str, object] = field(default_factory=dict)
    refused: str | None = None
    unread: bool = False


@dataclass(frozen=True, slots=True)
class Situation:
    """The cluster at the moment of deciding.

    `checked` holds the verdicts of checks that were run now. `relations` are known by the path of their first
    file, relative to the data directory. `xids` are the culprits the operator named.
    """

    cluster: str
    major: int | None = None
    reach: Reach | None = None
    server_up: bool | None = None
    in_recovery: bool | None = None
    superuser: bool | None = None
    checksums: bool | None = None
    standbys: tuple[str, ...] | None = None
    latest_proof: Verdict | None = None
    checked: Mapping[str, Verdict] = field(default_factory=dict)
    relations: Mapping[str, RelationFact] = field(default_factory=dict)
    rates: Rates = field(default_factory=Rates)
    xids: tuple[int, ...] = ()
    whole: WholeRestore | None = None

    def by_name(self, database: str | None, name: str | None) -> RelationFact | None:
        """The relation of this qualified name in this database, if it is known."""
        for relation in self.relations.values():
            if relation.name == name and relation.database == database:
                return relation
        return None
