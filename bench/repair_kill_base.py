"""What all kills of repairs share: damage, a repair that is killed, and the ways it comes to its end."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg

from kill_checks import PATIENCE, leftovers, problem, strays
from kill_operations import Operation
from kill_site import Site, must_backup
from knockwood.clone.registry import Registry
from knockwood.drill.witness import loss
from knockwood.drill.workload import tokens_present
from knockwood.postgres.connection import connect
from knockwood.recover.execute import unfinished
from knockwood.repository.walk import workplace
from sandbox import Said

READER = "reader"
"""The name of connections that read the damaged tables meanwhile."""

_DONE = {"done", "already_done"}
_UNDONE = {"rolled_back", "already_done"}
# Whoever stays connected beside a repair.
_OTHERS = ("shop", READER, "knockwood receiver", "knockwood identify", "knockwood flush")
_KILLED_AGAIN = 0.2
"""How often a resuming run is killed too, before anything ends it."""


class Repair(Operation):
    """One repair of something that is broken anew for each kill.

    After a kill it is ended by turns: with `recover --resume`, with the same command where `goes_on` (else
    resumed too), with `recover --roll-back`. Then it has to be healed; what is not is repaired by the command.
    """

    restored_after = False
    goes_on = False

    def __init__(self, name: str, *, backup_every: int = 8) -> None:
        super().__init__(name, again_every=1)
        self.backup_every = backup_every
        self.chance = random.Random(name)
        self.runs = 0
        self.turns = 0
        self.killing_again = False
        self.promised = 0
        self.ran = False
        self.own: frozenset[str] = frozenset()

    # --- of each repair ---------------------------------------------------------------------------

    def setup(self, site: Site) -> None:
        """Once, before the first backup."""

    def damage(self, site: Site) -> None:
        """Break what is to be repaired, and note the truth."""
        raise NotImplementedError

    def command(self, site: Site) -> list[str]:
        """The user's command."""
        raise NotImplementedError

    def state(self, site: Site) -> list[str]:
        """What is neither damaged as it was nor repaired."""
        raise NotImplementedError

    def healed(self, site: Site) -> bool:
        """Whether it is as it was before the damage."""
        raise NotImplementedError

    def as_damaged(self, site: Site) -> bool:
        """Whether it is as the damage left it; asked after a roll-back."""
        return not self.healed(site)

    def verified(self, site: Site) -> list[str]:
        """What is wrong with a repair that came to its end."""
        return [] if self.healed(site) else ["it came to its end, and what is there is not the truth"]

    # --- for Killing ------------------------------------------------------------------------------

    def prepare(self, site: Site) -> None:
        site.receiver.ensure()
        if self.killing_again:
            return
        if not self.own:
            self.setup(site)
            self.own = _objects(site)
        if self.runs % self.backup_every == 0:
            must_backup(site)
        self.runs += 1
        self.damage(site)

    def words(self, site: Site) -> list[str]:
        return ["recover", "--resume"] if self.killing_again else self.command(site)

    def begins(self, steps: list[str]) -> int:
        """The plan is written down: from here on something is done."""
        return next(
            (n for n, step in enumerate(steps) if step.startswith("recover/journal:Journal.create")), 0
        )

    def due(self, kills: int) -> bool:
        return not self.killing_again

    def after_kill(self, site: Site) -> list[str]:
        wrong = strays(site) + backends(site) + self.state(site)
        again = not self.killing_again and self.chance.random() < _KILLED_AGAIN
        self.killing_again = again and self.unfinished(site)
        return wrong

    def again(self, site: Site) -> list[str]:
        self.killing_again = self.ran = False
        wrong: list[str] = []
        if self.unfinished(site):
            self.turns += 1
            if self.turns % 3 == 0:
                wrong = self.rolled_back(site)
            elif self.turns % 3 == 1 or not self.goes_on:
                wrong = self.run(site, ["recover", "--resume"], "resumed")
            else:
                wrong = self.run(site, self.command(site), "gone on by itself")
        else:
            self.ends["nothing was begun, or all was done"] += 1
        if not wrong and not self.healed(site):
            wrong = self.run(site, self.command(site), "")
        return wrong + self.verified(site) + self.promises(site) + self.clean(site)

    def clean(self, site: Site) -> list[str]:
        cluster = site.cluster()
        if not self.ran:
            # All was done but for its own tidying: whoever makes a clone next begins with this.
            Registry(cluster.state).sweep()
        # So does whoever reads WAL next; a roll-back does not.
        with workplace():
            pass
        wrong = leftovers(site, cluster.repository(), cluster.state) + strays(site)
        more = _objects(site) - self.own
        return wrong + [f"left behind in the server: {name}" for name in sorted(more)]

    # --- ways to an end ---------------------------------------------------------------------------

    def run(self, site: Site, words: Sequence[str], how: str) -> list[str]:
        """Run one command; it must carry the repair to its end."""
        self.ran = True
        said = site.run(words, timeout=300)
        recovery = recovery_of(said)
        if recovery is None:
            if self.healed(site) and not self.unfinished(site):
                return []
            return [f"{' '.join(words)} ended with {said.status}: {problem(said)}"]
        wrong = _of_outcomes(recovery, _DONE) + _of_claims(recovery)
        if self.unfinished(site):
            wrong.append("it is still unfinished")
        if how:
            self.ends[how] += 1
        return [f"{' '.join(words)}: {text}" for text in wrong]

    def rolled_back(self, site: Site) -> list[str]:
        """Take it back. Where that is refused, because others may have built on it, it must be resumed."""
        self.ran = True
        said = site.run(["recover", "--roll-back"], timeout=300)
        recovery = recovery_of(said)
        if recovery is None:
            return [f"recover --roll-back ended with {said.status}: {problem(said)}"]
        if any(each["outcome"] == "refused" for each in recovery["results"]):
            return self.run(site, ["recover", "--resume"], "resumed after a roll-back that was refused")
        self.ends["rolled back"] += 1
        wrong = _of_outcomes(recovery, _UNDONE)
        if self.unfinished(site):
            wrong.append("it is still unfinished")
        if not self.as_damaged(site):
            wrong.append("what is there is not what was there before")
        return [f"recover --roll-back: {text}" for text in wrong] + self.state(site)

    def unfinished(self, site: Site) -> bool:
        cluster = site.cluster()
        return bool(unfinished(cluster.state, cluster.name))

    def promises(self, site: Site) -> list[str]:
        """Every commit that a client was told of is in the server."""
        promises = site.witness.promises()
        self.promised = len(promises)
        lost = loss(promises, tokens_present(site.dsn)).lost
        return [f"{lost} promised commits are missing"] if lost else []


def recovery_of(said: Said) -> dict[str, Any] | None:
    """What a command says of the recovery it carried out; None if it did not get that far."""
    try:
        value = json.loads(said.out).get("recovery")
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, dict) else None


def _of_outcomes(recovery: Mapping[str, Any], wanted: set[str]) -> list[str]:
    return [
        f"{each['kind']} is {each['outcome']}: {each['detail']}"
        for each in recovery["results"]
        if each["outcome"] not in wanted
    ]


def _of_claims(recovery: Mapping[str, Any]) -> list[str]:
    return [
        f"{each['name']} is broken: {each['detail']}"
        for each in recovery["claims"]
        if each["verdict"] == "broken"
    ]


def ask(dsn: str, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
    """The rows of one statement, in a connection that is gone afterwards."""
    with connect(dsn, application_name=READER) as connection:
        cursor = connection.execute(sql.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


def backends(site: Site) -> list[str]:
    """Backends of the dead command, with the locks they hold, after they had time to notice."""
    deadline = time.monotonic() + PATIENCE
    sql = (
        "select pid, application_name, left(query, 80) from pg_stat_activity"
        " where backend_type in ('client backend', 'walsender') and pid <> pg_backend_pid()"
        " and application_name <> all(%s)"
        " and pid not in (select active_pid from pg_replication_slots"
        "                  where slot_name = 'knockwood' and active_pid is not null)"
    )
    while True:
        try:
            found = ask(site.dsn, sql, list(_OTHERS))
        except Exception as error:
            found = [(0, "no answer", str(error))]
        if not found:
            return []
        if time.monotonic() > deadline:
            return [f"left behind: backend {pid} {name!r} {query!r}" for pid, name, query in found]
        time.sleep(0.1)


def _objects(site: Site) -> frozenset[str]:
    """Whatever a repair could leave in the server: slots, extensions, relations, half-made indexes."""
    found = ask(
        site.dsn,
        "select 'slot ' || slot_name from pg_replication_slots where slot_name <> 'knockwood'"
        " union all select 'extension ' || extname from pg_extension"
        " union all select 'schema ' || nspname from pg_namespace"
        " where nspname not like 'pg\\_%' and nspname not like 'knockwood\\_%'"
        " union all select 'relation ' || oid::regclass from pg_class where relnamespace = 'public'::regnamespace"
        " union all select 'invalid index ' || indexrelid::regclass from pg_index where not indisvalid"
        " union all select 'prepared transaction ' || gid from pg_prepared_xacts",
    )
    return frozenset(row[0] for row in found)


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def swallowed(dsn: str, sql: str) -> None:
    """Ask, whatever it says: damage is what readers meet."""
    try:
        with psycopg.connect(dsn, autocommit=True, application_name=READER, connect_timeout=2) as connection:
            connection.execute(sql.encode())
    except psycopg.Error:
        return
