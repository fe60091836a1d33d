"""There and back: random transactions on a schema of every built-in type, reverted, and the reverts reverted.

After each revert every table must be what it was at that point, byte for byte, as the server itself compares
record images. Exit status 1 if anything differs or a revert was refused.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knockwood.drill.sandbox import Sandbox, choose_programs, sandbox
from knockwood.errors import KnockwoodError
from knockwood.history.index import ArchiveIndex
from knockwood.integrity.tables import open_pinned
from knockwood.model.recovery import Outcome
from knockwood.operations.freshness import bring_up_to_date
from knockwood.operations.protect import take
from knockwood.operations.revert import Executed, Proposal, Wish, execute, propose
from knockwood.operations.revert_changes import Gathered, changes_of
from knockwood.postgres.connection import Connection
from round_moves import EXCHANGE, TRIGGERS, Case, Mover, sweep
from round_schema import Judge, World, make_world
from sandbox import OUT, end_cleanly, say
from tables import markdown

RESULT = OUT / "round-trip.json"
TABLE = OUT / "round-trip.md"
BLOCK = 20
_SETTINGS = {
    "wal_level": "replica",
    "max_prepared_transactions": "10",
    "fsync": "off",
    "max_locks_per_transaction": "512",
}


@dataclass
class Tally:
    """What came of one server version and seed. `wrong` tells every difference and refusal."""

    blocks: int = 0
    cases: int = 0
    empty: int = 0
    back: int = 0
    forth: int = 0
    together: int = 0
    rows: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    put_back: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    schema: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Tally:
        counted = {name: Counter(stored.get(name, {})) for name in ("kinds", "put_back")}
        return cls(**{**stored, **counted})


class DiffersError(Exception):
    """A state that is not what it must be, or a revert that was not done."""


@dataclass
class Ground:
    """A protected server with the schema on it, and its judge."""

    place: Sandbox
    connection: Connection
    world: World
    judge: Judge


@contextmanager
def ground(major: int, seed: int, parent: Path | None = None) -> Iterator[Ground]:
    """Make the schema, fill it, and take the base backup."""
    programs = choose_programs(major)
    protected = sandbox(orders=20, clients=1, seed=seed, parent=parent, programs=programs, settings=_SETTINGS)
    with (
        protected as place,
        open_pinned(place.dsn, None) as connection,
        open_pinned(place.dsn, None) as probe,
    ):
        world = make_world(connection, probe, programs.major, seed)
        mover = Mover(connection, world, random.Random(f"{seed} first rows"))
        for number in range(40):
            mover.transaction(f"first {number}")
        take(place.cluster, place.repository)
        yield Ground(place, connection, world, Judge(connection))


def block(ground: Ground, rng: random.Random, size: int, tally: Tally, first: bool = False) -> None:
    """Run transactions one after the other, go back over all of them, and forth again; tell what differs."""
    judge = ground.judge
    # Both in one revert are refused: triggers ask for a role under which no deferrable constraint is enforced.
    mover = Mover(ground.connection, ground.world, rng, rng.choice((EXCHANGE, TRIGGERS)))
    judge.forget()
    judge.keep(0)
    cases: list[Case] = []
    # The first block of each run visits every type; chance would leave some out.
    bodies = sweep(ground.world, max(size // 4, 1)) if first else []
    for number in range(size):
        body = bodies[number] if number < len(bodies) else None
        cases.append(mover.transaction(f"two-phase {number}", body))
        judge.keep(number + 1)
        tally.kinds.update(cases[-1].kinds)
    tally.cases += size
    tally.empty += sum(case.xid is None for case in cases)
    point = size
    try:
        reverts: list[tuple[int, int, int]] = []
        gathered = _gathered(ground, [case.xid for case in cases if case.xid is not None])
        for low, last in _groups(size, rng):
            point = low
            xids = [case.xid for case in cases[low:last] if case.xid is not None]
            done = _reverted(ground, xids, gathered, tally) if xids else None
            _require(judge, low)
            if done is not None:
                reverts.append((done, low, last))
            tally.back += last - low
            tally.together += last - low > 1
        again = _gathered(ground, [xid for xid, _, _ in reverts])
        for xid, first, last in reversed(reverts):
            point = last
            _reverted(ground, [xid], again, tally)
            _require(judge, last)
            tally.forth += last - first
        # Those that changed nothing lie between the others.
        tally.forth += size - sum(last - first for _, first, last in reverts)
        _require(judge, size)
        tally.put_back.update(_values_of(ground.world, gathered))
    except (DiffersError, KnockwoodError) as error:
        tally.wrong.append(
            {
                "block": tally.blocks,
                "at": point,
                "what": f"{type(error).__name__}: {error}",
                "statements": [case.said for case in cases[max(point - 1, 0) : point + 3]],
            }
        )
    tally.blocks += 1


def _groups(size: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Stretches of transactions that are taken back together, from the newest on: one mostly, up to five."""
    last = size
    while last > 0:
        first = max(last - rng.choice((1, 1, 1, 1, 2, 3, 5)), 0)
        yield first, last
        last = first


def _gathered(ground: Ground, xids: list[int]) -> Gathered:
    """What the transactions changed, from one clone that goes from commit to commit."""
    place, found = ground.place, Gathered()
    if xids:
        bring_up_to_date(place.cluster, place.repository)
        index = ArchiveIndex.open(place.repository, programs_for=place.cluster.programs)
        changes_of(place.cluster, place.repository, [index.transaction(xid) for xid in xids], found)
        if found.reasons:
            raise DiffersError(f"the changes cannot be read: {found.reasons}")
    return found


def _values_of(world: World, gathered: Gathered) -> Iterator[str]:
    """The types of the values, NULL left out, that a revert had to write, one by one."""
    types = {
        (each.name, name): kind.name for each in (*world.typed, *world.keyed) for name, kind in each.columns
    }
    for culprit in gathered.culprits.values():
        for change in culprit.changes:
            for name, value in (change.before or {}).items():
                kind = types.get((f"{change.table.schema}.{change.table.name}", name))
                if (
                    kind
                    and value.text is not None
                    and (change.after is None or not value.same(change.after[name]))
                ):
                    yield kind


def _reverted(ground: Ground, xids: list[int], gathered: Gathered, tally: Tally) -> int | None:
    """Propose and execute, as the command does; the revert's own transaction, None where nothing was to do."""
    cluster = ground.place.cluster
    sequences = ground.judge.sequences()
    proposal: Proposal = propose(cluster, Wish(tuple(xids)), gathered=gathered)
    if proposal.nothing:
        return None
    if proposal.refused:
        shown = "; ".join(str(each) for each in proposal.conflicts[:3])
        raise DiffersError(f"{xids} refused: {proposal.plan.refused} {shown}")
    done: Executed = execute(cluster, proposal)
    results = done.recovery.results
    if done.xid is None or any(each.outcome is not Outcome.DONE for each in results):
        raise DiffersError(f"{xids} not done: {results}")
    tally.rows += sum(int(str(each.values.get("rows", 0))) for each in results)
    if ground.judge.sequences() != sequences:
        raise DiffersError(f"the revert of {xids} moved a sequence")
    return done.xid


def _require(judge: Judge, point: int) -> None:
    wrong = judge.differences(point)
    if wrong:
        raise DiffersError(f"point {point}: rows differ in {wrong}")


def run(
    major: int,
    seed: int,
    wanted: int,
    tally: Tally,
    *,
    size: int = BLOCK,
    parent: Path | None = None,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Go on until `wanted` cases are done."""
    if tally.cases >= wanted:
        return
    with ground(major, seed + tally.blocks, parent) as here:
        world = here.world
        tally.schema = {
            "types": world.types,
            "columns": world.columns,
            "tables": here.judge.tables,
            "stored": sorted({kind.name for each in world.typed for _, kind in each.columns}),
            "not_stored": world.not_stored,
            "null_only": world.values.empty,
        }
        say(f"{world.columns} columns of {world.types} types, {here.judge.tables} tables")
        first = True
        while tally.cases < wanted:
            began = time.monotonic()
            before = len(tally.wrong)
            rng = random.Random(f"{seed} {major} {tally.blocks}")
            block(here, rng, min(size, wanted - tally.cases), tally, first)
            first = False
            tally.seconds += time.monotonic() - began
            done()
            say(f"{major}: {tally.cases} cases, {tally.seconds:.0f} s, {len(tally.wrong)} wrong")
            for each in tally.wrong[before:]:
                say(f"  block {each['block']} at {each['at']}: {each['what'][:3000]}")


def report(stored: dict[str, dict[str, Any]]) -> str:
    """The tables of all versions and seeds."""
    heads = (
        "PostgreSQL",
        "seed",
        "types",
        "columns",
        "tables",
        "cases",
        "back",
        "forth",
        "rows",
        "wrong",
        "seconds",
    )
    lines = []
    kinds: Counter[str] = Counter()
    for name, entry in sorted(stored.items()):
        major, seed = name.split("/")
        tally = Tally.of(entry)
        kinds += tally.kinds
        schema = tally.schema
        lines.append(
            [major, seed, str(schema["types"]), str(schema["columns"]), str(schema["tables"]), str(tally.cases),
             str(tally.back), str(tally.forth), str(tally.rows), str(len(tally.wrong)), f"{tally.seconds:.0f}"]
        )  # fmt: skip
    parts = [markdown(heads, lines)]
    parts.append(
        markdown(("statement", "kept"), [[kind, str(count)] for kind, count in sorted(kinds.items())])
    )
    newest = Tally.of(stored[max(stored)]).schema
    written: Counter[str] = Counter()
    for entry in stored.values():
        written += Tally.of(entry).put_back
    lacking = sorted(set(newest["stored"]) - set(newest["null_only"]) - written.keys())
    parts.append(
        f"Values of {len(written)} types were put back, {written.total()} in all; none, by chance, of"
        f" {len(lacking)}: {', '.join(lacking) or 'no type'}."
    )
    for title, which in (("cannot be stored", "not_stored"), ("NULL only", "null_only")):
        reasons: dict[str, list[str]] = {}
        for kind, reason in newest[which].items():
            reasons.setdefault(reason.replace(f" {kind.split('.')[-1]}", " …"), []).append(kind)
        rows = [[", ".join(sorted(names)[:12]), str(len(names)), reason] for reason, names in reasons.items()]
        parts.append(markdown((title, "types", "what the server says"), rows))
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--postgres", type=int, default=18)
    parser.add_argument("--block", type=int, default=BLOCK)
    given = parser.parse_args()
    end_cleanly()
    OUT.mkdir(exist_ok=True)
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    name = f"{given.postgres}/{given.seed}"
    tally = Tally.of(stored[name]) if name in stored else Tally()

    def keep() -> None:
        # Another run, of another version, may have written meanwhile.
        now = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        now[name] = vars(tally)
        RESULT.write_text(json.dumps(now, indent=1))
        TABLE.write_text(report(now) + "\n")

    run(given.postgres, given.seed, given.cases, tally, size=given.block, done=keep)
    print(TABLE.read_text())
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
