"""Bring the archive up to what the live server has promised, before a restore relies on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from knockwood.errors import KnockwoodError, PostgresError, RefusedError, TargetUnreachableError
from knockwood.host import clock
from knockwood.model import Lsn, WalRange, WalSegment
from knockwood.operations.cluster import Cluster
from knockwood.operations.protect import wal_arriving
from knockwood.postgres.connection import connect, translated
from knockwood.postgres.walmessages import commit_nothing
from knockwood.repository import receive_server
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository
from knockwood.repository.spool import Spool
from knockwood.repository.targets import Latest, Target, ToTime

_POLL = 0.05
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Freshness:
    """How the archive stands to the live server.

    `promised` is the server's flush position when it was asked: every commit it acknowledged before lies
    below. None where the server did not answer; then only the archive itself can say what there is.
    """

    promised: Lsn | None
    complete: bool
    detail: str


def bring_up_to_date(cluster: Cluster, repository: Repository, timeout: float = 30) -> Freshness:
    """Wait until the archive holds all that the server has flushed; receives it where nobody else does.

    Never raises for a server that is down: that is when people restore.
    """
    try:
        promised = receive_server.flushed(cluster.dsn).flush
        position = receive_server.identify(cluster.dsn)
    except PostgresError as error:
        return Freshness(None, False, f"the live server does not answer, the archive alone counts: {error}")
    timeline = position.history.timeline
    # The last byte promised: after a switch the position is the start of a segment with nothing in it.
    segment = WalSegment.containing(
        timeline, Lsn(max(promised.value - 1, 0)), repository.header.segment_bytes
    )
    tail = WalRange(timeline, min(segment.start, promised), promised)
    spool = Spool(cluster.spool(repository.header.system_identifier), segment.bytes)
    # A receiver on this machine would archive the newest WAL within a second: this saves most of it.
    spool.hurry()
    try:
        with wal_arriving(cluster, repository, also_beside_push=True):
            if _arrived(WalArchive(repository), tail, timeout):
                return Freshness(
                    promised, True, f"the archive holds all that the live server promised ({promised})"
                )
    except KnockwoodError as error:
        return Freshness(promised, False, f"the newest WAL could not be received: {error}")
    finally:
        spool.calm()
    return Freshness(promised, False, f"the archive did not reach {promised} within {timeout:.0f} s")


def _arrived(archive: WalArchive, tail: WalRange, timeout: float) -> bool:
    deadline = clock.monotonic() + timeout
    while not archive.inventory().covers(tail):
        if clock.monotonic() > deadline:
            return False
        clock.sleep(_POLL)
    return True


def require_complete(freshness: Freshness) -> None:
    """Raise RefusedError when the live server has promised more than the archive holds."""
    if freshness.promised is not None and not freshness.complete:
        raise RefusedError(
            f"{freshness.detail}: a restore to latest would lack committed transactions",
            hint="keep `knockwood wal receive` running, or restore what there is with --accept-loss",
        )


def reaching(
    cluster: Cluster,
    repository: Repository,
    target: Target,
    work: Callable[[tuple[str, ...]], _T],
    *,
    accept_loss: bool = False,
) -> _T:
    """Do what goes back to `target`, with as much of the live server's WAL as that needs; `work` is given notes.

    Most targets lie in the past. Only where one is not reached, as seconds after a mistake, the newest WAL is
    brought and `work` done again; for latest, and where a loss is accepted, it is brought before. For a moment after
    the last commit of an idle server a later one is made there first, to prove that there is none in between. Raises
    RefusedError where latest would lack commits, and what `work` raises.
    """
    latest = target == Latest()
    if not latest and not accept_loss:
        try:
            return work(())
        except TargetUnreachableError as error:
            if isinstance(target, ToTime):
                _commit_later(cluster, target.time)
            freshness = bring_up_to_date(cluster, repository)
            if not freshness.complete:
                error.hint = "; ".join(filter(None, (freshness.detail, error.hint)))
                raise
            return work((freshness.detail,))
    freshness = bring_up_to_date(cluster, repository)
    if latest and not accept_loss:
        require_complete(freshness)
    return work((freshness.detail,))


def _commit_later(cluster: Cluster, moment: datetime) -> None:
    """Commit something that changes nothing, where the server lets us and its clock is past the moment."""
    with contextlib.suppress(PostgresError), connect(cluster.dsn) as connection:
        with translated():
            past = connection.execute("select pg_catalog.clock_timestamp() > %s", [moment]).fetchone()
        if past is not None and past[0]:
            commit_nothing(connection, "later")
