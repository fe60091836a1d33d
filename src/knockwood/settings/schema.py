"""What knockwood.toml may hold. Durations are text such as `60s`, `5m`, `30d`; sizes are not used."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from knockwood.model import Severity

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_NAMED = {"hourly": timedelta(hours=1), "daily": timedelta(days=1), "weekly": timedelta(weeks=1)}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\Z")


def parse_duration(value: object) -> timedelta:
    """`1.5h` to a timedelta; raises ValueError with the forms that are understood."""
    match = _DURATION.match(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a duration: write a number and a unit, such as 30s, 5m, 12h or 30d")
    return timedelta(seconds=float(match[1]) * _UNITS[match[2]])


def parse_interval(value: object) -> timedelta:
    """A duration, or `hourly`, `daily`, `weekly`."""
    if isinstance(value, str) and value.strip() in _NAMED:
        return _NAMED[value.strip()]
    try:
        return parse_duration(value)
    except ValueError:
        raise ValueError("not an interval: write hourly, daily, weekly, or a duration such as 6h") from None


def _no_password(dsn: str) -> str:
    if re.search(r"(?:^|\s)password\s*=", dsn) or re.match(r"\w+://[^/@]*:[^/@]+@", dsn):
        raise ValueError("no passwords here: use ~/.pgpass, a service file or PGPASSWORD")
    return dsn


def _age_recipient(key: str) -> str:
    if not re.fullmatch(r"age1[0-9a-z]{58}", key):
        raise ValueError("not an age recipient: it begins with age1 and has 62 characters")
    return key


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Duration = Annotated[timedelta, BeforeValidator(parse_duration)]
Interval = Annotated[timedelta, BeforeValidator(parse_interval)]
Dsn = Annotated[str, AfterValidator(_no_password)]
Recipients = Annotated[list[Annotated[str, AfterValidator(_age_recipient)]], BeforeValidator(_as_list)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Objectives(_Table):
    """What the cluster's owner expects; monitors and proofs measure against it."""

    detect: Duration = timedelta(seconds=60)
    rpo: Duration = timedelta(seconds=5)
    rto: Duration = timedelta(minutes=5)


class BackupSettings(_Table):
    """When backups are taken, how long they are kept, and who can read them."""

    full: Interval = timedelta(weeks=1)
    incremental: Interval | None = None
    keep: Duration = timedelta(days=30)
    keep_full: Annotated[int, Field(ge=1)] = 2
    encrypt_to: Recipients = []
    identity_file: Path | None = None
    compression_level: Annotated[int, Field(ge=1, le=19)] = 1
    workers: Annotated[int, Field(ge=1, le=128)] | None = None


class WalSettings(_Table):
    """How WAL reaches the repository."""

    slot: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,63}$")] = "knockwood"
    synchronous: bool = False
    spool: Path | None = None
    partial_every: Duration = timedelta(seconds=1)


class ProofSettings(_Table):
    """How long a proof counts, and where clones are made."""

    valid: Duration = timedelta(days=7)
    clones: Path | None = None


class HistorySettings(_Table):
    """The index that `log` and `blame` read. `follow`: `wal receive` makes it as WAL arrives."""

    follow: bool = True


class ShadowSettings(_Table):
    """A clone that follows the repository. `behind` is how far it stays behind, `every` when it goes on.

    `checks` None means every light check that a clone can answer; they run `check_every` at most.
    """

    enabled: bool = False
    folder: Path | None = None
    behind: Duration = timedelta(minutes=5)
    every: Duration = timedelta(minutes=1)
    check_every: Duration = timedelta(minutes=15)
    checks: list[str] | None = None


class InvariantSettings(_Table):
    """A query that returns the rows that break it."""

    name: Annotated[str, Field(min_length=1)]
    sql: Annotated[str, Field(min_length=1)]
    every: Duration = timedelta(minutes=1)
    database: str | None = None
    severity: Severity = Severity.HIGH


class ApplicationSettings(_Table):
    """What users see: probed, and measured as impact."""

    name: Annotated[str, Field(min_length=1)]
    url: Annotated[str, Field(pattern=r"^https?://")]


class ClusterSettings(_Table):
    """One PostgreSQL cluster."""

    dsn: Dsn
    repository: Annotated[str, Field(min_length=1)]
    data_directory: Path | None = None
    programs: Path | None = None
    objectives: Objectives = Objectives()
    backup: BackupSettings = BackupSettings()
    wal: WalSettings = WalSettings()
    proof: ProofSettings = ProofSettings()
    history: HistorySettings = HistorySettings()
    shadow: ShadowSettings = ShadowSettings()
    invariant: list[InvariantSettings] = []
    application: list[ApplicationSettings] = []

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for kind, entries in (("invariant", self.invariant), ("application", self.application)):
            names = [entry.name for entry in entries]
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"two {kind} entries are named {min(twice)!r}")
        return self


class Settings(_Table):
    """The whole file. `state` is where locks, spools and clones of this machine lie."""

    state: Path | None = None
    cluster: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")], ClusterSettings],
        Field(min_length=1),
    ]
