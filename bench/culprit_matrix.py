"""The matrix of culprits: each reverted exactly or refused with the exact conflict, nothing else touched.

Every case has a schema of its own and a mirror, in which the culprit never ran. After a revert each table of the
schema must equal its mirror, and every other table of the database what it was before, by record image. After a
refusal nothing may have changed. Exit status 1 if anything is otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from culprit_cases import AFTER, CULPRITS, Culprit
from knockwood.drill.sandbox import DATABASE, Sandbox, choose_programs, sandbox
from knockwood.errors import RefusedError
from knockwood.history.index import ArchiveIndex
from knockwood.integrity.tables import open_pinned
from knockwood.model.recovery import Outcome
from knockwood.operations.freshness import bring_up_to_date
from knockwood.operations.protect import take
from knockwood.operations.revert import Wish, execute, propose
from knockwood.operations.revert_changes import Gathered, changes_of
from knockwood.postgres.connection import Connection, connect
from round_schema import Judge
from sandbox import OUT, end_cleanly, say
from tables import markdown

RESULT = OUT / "culprits.json"
TABLE = OUT / "culprits.md"
_SETTINGS = {"wal_level": "replica", "max_prepared_transactions": "10", "fsync": "off"}


@dataclass(frozen=True, slots=True)
class Came:
    """What came of one case: the answer in words, and what is wrong with it."""

    answer: str
    wrong: str = ""


class Matrix:
    """All cases on one server: first every culprit and the work after it, then revert by revert."""

    def __init__(self, place: Sandbox, connection: Connection, culprits: Sequence[Culprit]) -> None:
        self._place, self._connection, self._culprits = place, connection, culprits
        self._gathered: dict[int, Gathered] = {}
        self.xids: dict[int, int] = {}

    def set_up(self) -> None:
        """Both schemas of each case; then the backup."""
        for number, culprit in enumerate(self._culprits):
            for schema in _schemas(number):
                self._connection.execute(f"create schema {schema}; {culprit.setup.format(s=schema)}".encode())
        take(self._place.cluster, self._place.repository)

    def happen(self) -> None:
        """The culprits, each followed by its good work."""
        for number, culprit in enumerate(self._culprits):
            own, mirror = _schemas(number)
            self.xids[number] = self._run(culprit, own)
            for text in (culprit.later, AFTER.get(culprit.name, "")):
                self._each(text, own)
            for text in (culprit.later, culprit.only):
                self._each(text, mirror)

    def _each(self, text: str, schema: str) -> None:
        # One by one: some must not be in a transaction block.
        for statement in filter(None, text.split(";")):
            self._connection.execute(statement.format(s=schema).encode())

    def _run(self, culprit: Culprit, schema: str) -> int:
        with connect(self._place.dsn) as other:
            if culprit.beside:
                other.execute(f"begin; {culprit.beside.format(s=schema)}".encode())
            self._connection.execute("begin")
            for statement in culprit.does:
                self._connection.execute(statement.format(s=schema).encode())
            if culprit.copies:
                table, *lines = culprit.copies
                with (
                    self._connection.cursor() as cursor,
                    cursor.copy(f"copy {schema}.{table} from stdin".encode()) as copy,
                ):
                    copy.write("\n".join(lines) + "\n")
            row = self._connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
            if culprit.two_phase:
                self._connection.execute("prepare transaction 'culprit'")
                self._connection.execute("commit prepared 'culprit'")
            else:
                self._connection.execute("commit")
        assert row is not None
        return int(row[0]) & 0xFFFF_FFFF

    def read(self) -> None:
        """What each culprit changed, from one clone that goes from commit to commit."""
        bring_up_to_date(self._place.cluster, self._place.repository)
        index = ArchiveIndex.open(self._place.repository, programs_for=self._place.cluster.programs)
        plain = [number for number, culprit in enumerate(self._culprits) if not culprit.refused]
        together = Gathered()
        changes_of(
            self._place.cluster,
            self._place.repository,
            [index.transaction(self.xids[number]) for number in plain],
            together,
        )
        assert not together.reasons, together.reasons
        self._gathered = {
            number: together if number in plain else Gathered() for number in range(len(self._culprits))
        }

    def revert(self, number: int, judge: Judge) -> Came:
        """Propose and execute; judge the outcome."""
        judge.forget()
        judge.keep(1)
        came = self._answer(number)
        changed = judge.differences(1)
        own, mirror = _schemas(number)
        if came.wrong or "refused" in came.answer:
            return (
                came if not changed else Came(came.answer, f"{came.wrong} yet it changed {changed}".strip())
            )
        elsewhere = {name: rows for name, rows in changed.items() if not name.startswith(own + ".")}
        unlike = self._unlike(own, mirror)
        wrong = f"touched {elsewhere}" if elsewhere else ""
        return Came(came.answer, wrong + (f" unlike the mirror: {unlike}" if unlike else ""))

    def _answer(self, number: int) -> Came:
        culprit = self._culprits[number]
        counters = tuple(f"{_schemas(number)[0]}.{each}" for each in culprit.counters)
        wish = Wish((self.xids[number],), culprit.mode, counters)
        try:
            proposal = propose(self._place.cluster, wish, gathered=self._gathered[number])
        except RefusedError as error:
            return Came(
                f"refused: {error}", "" if culprit.refused and culprit.refused in str(error) else "unexpected"
            )
        reasons = "; ".join(proposal.plan.refused)
        if culprit.refused:
            right = proposal.refused and culprit.refused in reasons
            answer = reasons.replace(str(self.xids[number]), "it")
            return Came(f"refused: {answer}", "" if right else "another answer was due")
        if culprit.conflicts:
            found = Counter(
                (str(each.kind), each.table.name, tuple(each.columns)) for each in proposal.conflicts
            )
            words = ", ".join(
                sorted({f"{kind} ({', '.join(columns) or table})" for kind, table, columns in found})
            )
            right = proposal.refused and found == Counter(culprit.conflicts)
            return Came(f"refused: {words}", "" if right else f"found {dict(found)}")
        if proposal.refused:
            return Came(
                f"refused: {reasons}", f"unexpected; {[str(each) for each in proposal.conflicts[:3]]}"
            )
        results = execute(self._place.cluster, proposal).recovery.results
        if any(each.outcome is not Outcome.DONE for each in results):
            return Came("not done", str(results))
        rows = sum(int(str(each.values.get("rows", 0))) for each in results)
        left = f", {len(proposal.waived)} conflicts passed over" if proposal.waived else ""
        return Came(f"reverted: {rows} rows{left}")

    def _unlike(self, own: str, mirror: str) -> dict[str, int]:
        """Tables of a case that do not equal their mirror, byte by byte."""
        found = {}
        rows = self._connection.execute(
            "select relname from pg_catalog.pg_class where relnamespace = %s::regnamespace and relkind = 'r'",
            [own],
        ).fetchall()
        for (table,) in rows:
            numbered = (
                "select r, row_number() over (order by r using operator(pg_catalog.*<)) n"
                " from (select t::record r from {}.{} t) x"
            )
            row = self._connection.execute(
                f"select count(*) from ({numbered.format(own, table)}) a"
                f" full join ({numbered.format(mirror, table)}) b using (n)"
                " where (a.r operator(pg_catalog.*=) b.r) is not true".encode()
            ).fetchone()
            if row and row[0]:
                found[table] = row[0]
        return found


def _schemas(number: int) -> tuple[str, str]:
    return f"case_{number}", f"mirror_{number}"


def run(major: int, culprits: Sequence[Culprit] = CULPRITS, parent: Path | None = None) -> list[Came]:
    """Every case on one server of that version."""
    programs = choose_programs(major)
    protected = sandbox(orders=20, clients=1, seed=1, parent=parent, programs=programs, settings=_SETTINGS)
    with protected as place, open_pinned(place.dsn, DATABASE) as connection:
        matrix = Matrix(place, connection, culprits)
        matrix.set_up()
        matrix.happen()
        matrix.read()
        schemas = [each for number in range(len(culprits)) for each in _schemas(number)]
        judge = Judge(connection, [*schemas, "public"])
        came = []
        for number, culprit in enumerate(culprits):
            came.append(matrix.revert(number, judge))
            say(f"{major}: {culprit.name}: {came[-1].answer} {came[-1].wrong}")
        return came


def report(stored: dict[str, dict[str, list[str]]]) -> str:
    """The table of all versions; a case that was not run on one is not said to be right there."""
    majors = sorted(stored, key=int)
    lines = []
    for culprit in CULPRITS:
        came = [stored[major].get(culprit.name) for major in majors]
        shown = list(
            dict.fromkeys(f"WRONG: {each[1]} ({each[0]})" if each[1] else each[0] for each in came if each)
        )
        marks = ["not run" if each is None else "NO" if each[1] else "yes" for each in came]
        lines.append([culprit.name, " / ".join(shown), *marks])
    return markdown(("culprit", "answer", *majors), lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgres", type=int, nargs="*", default=[15, 17, 18])
    parser.add_argument(
        "--cases", nargs="*", default=[], help="parts of names; the others keep their results"
    )
    given = parser.parse_args()
    end_cleanly()
    OUT.mkdir(exist_ok=True)
    began = time.monotonic()
    stored: dict[str, dict[str, list[str]]] = {}
    chosen = [each for each in CULPRITS if not given.cases or any(part in each.name for part in given.cases)]
    for major in given.postgres:
        came = run(major, chosen)
        answers = {
            culprit.name: [each.answer, each.wrong] for culprit, each in zip(chosen, came, strict=True)
        }
        # Read only now: a run of another version may have written meanwhile.
        stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        stored[str(major)] = stored.get(str(major), {}) | answers
        RESULT.write_text(json.dumps(stored, indent=1))
    table = report(stored)
    TABLE.write_text(table + "\n")
    print(table)
    wrong = sum(bool(each[1]) for answers in stored.values() for each in answers.values())
    total = sum(map(len, stored.values()))
    print(f"\n{total} cases, {wrong} wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
