"""A proof while a standby takes the primary's place: never a difference that is none, never a pass unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from fix_clones import Protected, protected
from fix_server import ServerFactory
from fix_standby import caught_up, either, promote
from knockwood.model import Lsn, Timeline, Verdict
from knockwood.operations.prove import COMPARED, RESTORED, Options, Step, prove
from knockwood.postgres.connection import connect, current_insert_lsn, server_facts
from knockwood.postgres.server import LocalServer
from knockwood.repository.archive import WalArchive

StandbyOf = Callable[[LocalServer], LocalServer]


@pytest.fixture
def primary(new_server: ServerFactory) -> LocalServer:
    return new_server(18, segment_megabytes=1)


def add(server: LocalServer, sql: str) -> Lsn:
    """Run a statement; the position after its commit."""
    with connect(server.dsn()) as connection:
        connection.execute(sql.encode())
        return current_insert_lsn(connection)


@contextmanager
def pair(
    primary: LocalServer, standby_of: StandbyOf, folder: Path
) -> Iterator[tuple[Protected, LocalServer]]:
    """A protected primary whose receiver follows it to its standby."""
    standby = standby_of(primary)
    with protected(primary, folder, partial_every=0.5, dsn=either(primary, standby)) as made:
        made.execute("insert into t select generate_series(1, 1000)")
        made.backup()
        yield made, standby


def proved_while(
    made: Protected, standby: LocalServer, phase: str, happens: Callable[[], None]
) -> dict[str, tuple[Verdict, str]]:
    """Prove, let something happen when a phase is first told, and return the claims."""
    waiting = [phase]

    def tell(step: Step) -> None:
        if step.phase in waiting:
            waiting.clear()
            happens()

    options = Options(
        checks=("unique_keys",), archive_timeout=timedelta(seconds=15), clones=made.folder / "state"
    )
    proof = prove(
        made.repository, either(made.server, standby), cluster="shop", options=options, progress=tell
    )
    assert waiting == [], "the phase never came"
    assert made.registry.records() == []
    return {claim.name: (claim.verdict, claim.detail) for claim in proof.claims}


def test_the_timeline_of_a_server_is_known_right_after_its_promotion(
    primary: LocalServer, standby_of: StandbyOf
) -> None:
    standby = standby_of(primary)
    big = "create table big as select a, repeat('x', 500) from generate_series(1, 40000) a"
    caught_up(standby, add(primary, big))
    primary.kill()
    promote(standby)
    with connect(standby.dsn()) as connection:
        assert server_facts(connection).timeline == Timeline(2)
        assert not server_facts(connection).in_recovery


@pytest.mark.parametrize("phase", ["wait for the archive", "plan", "restore", "compare", "check the clone"])
def test_a_promotion_after_the_primary_was_read(
    phase: str, primary: LocalServer, standby_of: StandbyOf, shared_folder: Path
) -> None:
    """The standby has lost nothing: what was read of the old primary is on the new one's history."""
    folder = shared_folder / f"promoted-{phase.replace(' ', '-')}"
    with pair(primary, standby_of, folder) as (made, standby):

        def switch() -> None:
            caught_up(standby, add(primary, "select pg_logical_emit_message(true, 'test', '')"))
            made.flush()
            primary.kill()
            promote(standby)
            add(standby, "insert into t values (5000)")
            add(standby, "select pg_switch_wal()")

        claims = proved_while(made, standby, phase, switch)
        assert {name: claim for name, claim in claims.items() if claim[0] is not Verdict.HELD} == {}


def test_a_standby_that_lost_commits_is_not_taken_for_a_difference(
    primary: LocalServer, standby_of: StandbyOf, shared_folder: Path
) -> None:
    """What the old primary held is proved on its own timeline, which the archive has."""
    with pair(primary, standby_of, shared_folder / "behind") as (made, standby):
        caught_up(standby, add(primary, "insert into t values (1500)"))
        standby.kill()
        made.execute("insert into t select generate_series(2001, 3000)")

        def switch() -> None:
            made.flush()
            primary.kill()
            standby.settings["primary_conninfo"] = ""
            standby.start(until="standby")
            promote(standby)
            add(standby, "insert into t values (5000)")
            while Timeline(2) not in WalArchive(made.repository).inventory().histories:
                made.flush()

        claims = proved_while(made, standby, "wait for the archive", switch)
        assert {name: claim for name, claim in claims.items() if claim[0] is not Verdict.HELD} == {}
        # A proof of the new primary does not miss the rows that its cluster has lost.
        claims = proved_while(made, standby, "read the primary", lambda: None)
        assert claims[RESTORED][0] is Verdict.HELD
        assert claims[COMPARED][0] is Verdict.HELD


def test_a_primary_that_changes_while_it_is_read_is_not_checked(
    primary: LocalServer, standby_of: StandbyOf, shared_folder: Path
) -> None:
    with pair(primary, standby_of, shared_folder / "reading") as (made, standby):

        def switch() -> None:
            caught_up(standby, add(primary, "select pg_logical_emit_message(true, 'test', '')"))
            primary.kill()
            promote(standby)

        claims = proved_while(made, standby, "read the primary", switch)
        assert claims[RESTORED][0] is Verdict.NOT_CHECKED
        assert claims[COMPARED][0] is Verdict.NOT_CHECKED
        assert claims[COMPARED][1]
        assert Verdict.BROKEN not in {verdict for verdict, _ in claims.values()}
