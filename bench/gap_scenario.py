"""The gap test's scenario: one cluster, a backup by each tool, six commits in a WAL segment each, damages."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from gap_tools import AcceptsLoss, NotApplicableError, Source, Tool, flip_bit, flip_content, flip_stored
from knockwood.host import privileges
from knockwood.model import Lsn
from sandbox import Restored, Said, copy_tree, open_restored, query, say, wait_until

COMMITS = 6
DAMAGED = 3
"""The commit whose segment is damaged, counted from 1: those before it must survive."""
LEDGER_ROWS = 20_000
ACCOUNTS = 200_000
BLOCK = 8192


@dataclass(frozen=True, slots=True)
class Facts:
    """What the cluster did: the segment of each commit, and where each commit ended."""

    segments: tuple[int, ...]
    ends: tuple[Lsn, ...]
    segment_bytes: int

    @property
    def damaged(self) -> int:
        return self.segments[DAMAGED - 1]


@dataclass(frozen=True, slots=True)
class Damage:
    """One row of the table. `survivors` rows can be restored at most, and whole.

    `proved_before`: an earlier verify had found the repository whole, and may be trusted by later ones.
    """

    key: str
    title: str
    survivors: int
    apply: Callable[[Tool, Facts], str]
    proved_before: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What one tool did with one damage; `how` says what was done to its repository."""

    tool: str
    damage: Damage
    how: str
    verify: tuple[Said, ...]
    restore: Said | None
    restored: Restored | None
    loss_rows: int | None

    @property
    def applicable(self) -> bool:
        return self.restored is not None


def fill(source: Source) -> None:
    """The tables: a ledger that rests, accounts that are busy during backups, commits that follow."""
    source.ask(f"""
        CREATE TABLE ledger (id bigint PRIMARY KEY, amount bigint, note text);
        INSERT INTO ledger SELECT n, n % 97, md5(n::text) FROM generate_series(1, {LEDGER_ROWS}) n;
        CREATE TABLE accounts (id integer PRIMARY KEY, amount bigint NOT NULL DEFAULT 0);
        INSERT INTO accounts SELECT n FROM generate_series(1, {ACCOUNTS}) n;
        CREATE TABLE commits (n integer PRIMARY KEY, payload text)""")
    # Nothing may write the resting pages again: a full page in the WAL would mend a damaged one.
    source.ask("VACUUM (FREEZE) ledger")
    source.ask("CHECKPOINT")
    source.ask("SELECT pg_switch_wal()")


def commit_all(source: Source) -> Facts:
    """Commit six times, each in a WAL segment of its own."""
    segments, ends = [], []
    for number in range(1, COMMITS + 1):
        source.ask(
            f"INSERT INTO commits VALUES ({number}, '{marker(number)}' || repeat(md5('{number}'), 20))"
        )
        [(end,)] = source.ask("SELECT pg_current_wal_insert_lsn()::text")
        source.ask("SELECT pg_switch_wal()")
        ends.append(Lsn.parse(end))
        segments.append(Lsn.parse(end).value // source.segment_bytes)
    if len(set(segments)) != COMMITS:
        raise RuntimeError(f"the commits do not lie in a segment each: {segments}")
    return Facts(tuple(segments), tuple(ends), source.segment_bytes)


def marker(number: int) -> str:
    return f"payload-of-commit-{number}-"


def wait_archived(source: Source, number: int) -> None:
    """Wait until archive_command has taken the segment."""
    name = source.segment_name(number)

    def done() -> bool:
        [(last,)] = source.ask("SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver")
        return str(last)[:24] >= name

    wait_until(done, f"archive_command to take {name}")


@contextmanager
def busy(source: Source) -> Iterator[None]:
    """Writes and checkpoints while a backup runs, as a live server has them."""
    stop = threading.Event()

    def work() -> None:
        with psycopg.connect(source.server.dsn(), autocommit=True) as connection:
            step = 0
            while not stop.wait(0.01):
                # Each page is written once a round: a page copied before its change needs the WAL for it.
                first = step * 500 % ACCOUNTS
                connection.execute(
                    "UPDATE accounts SET amount = amount + 1 WHERE id > %s AND id <= %s", [first, first + 500]
                )
                step += 1
                if step % 10 == 0:
                    connection.execute("CHECKPOINT")

    thread = threading.Thread(target=work, name="busy")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


SUMS = {
    table: f"SELECT count(*) || ' ' || md5(string_agg(t::text, ' ' ORDER BY id)) FROM {table} t"
    for table in ("ledger", "accounts")
}


def questions(dsn: str) -> tuple[int, dict[str, str]]:
    """How many of the six commits a cluster has, and each other table's fingerprint or why it has none."""
    [(rows,)] = query(dsn, "SELECT count(*) FROM commits")
    found: dict[str, str] = {}
    for table, sql in SUMS.items():
        try:
            [(text,)] = query(dsn, sql)
            found[table] = str(text)
        except psycopg.Error as error:
            found[table] = f"unreadable: {str(error).splitlines()[0]}"
    return int(rows), found


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """Which tables are not what they were; nothing if all are."""
    wrong = []
    for table, text in wanted.items():
        now = found.get(table, "not asked")
        if now != text:
            wrong.append(f"{table} {now}" if now.startswith("unreadable") else f"{table} differs")
    return ", ".join(wrong)


def removed(tool: Tool, facts: Facts) -> str:
    tool.segment(facts.damaged).unlink()
    return "stored file removed"


def removed_and_forgotten(tool: Tool, facts: Facts) -> str:
    how = tool.forget(facts.damaged)
    tool.segment(facts.damaged).unlink()
    return f"stored file removed, {how}"


def flipped(tool: Tool, facts: Facts) -> str:
    flip_stored(tool.segment(facts.damaged))
    return "4 bytes flipped in the middle of the stored file"


def rewritten(tool: Tool, facts: Facts) -> str:
    return tool.rewrite(facts.damaged, flip_content(marker(DAMAGED).encode()))


def inconsistent(tool: Tool, facts: Facts) -> str:
    number = tool.consistency_segment()
    tool.segment(number).unlink()
    return "stored file removed"


def backup_bit(tool: Tool, facts: Facts) -> str:
    path = tool.backup_file()
    size = path.stat().st_size
    # In an uncompressed heap: a row in the middle of a page in the middle of the file.
    whole_pages = size % BLOCK == 0 and size > BLOCK
    flip_bit(path, (size // BLOCK // 2) * BLOCK + BLOCK * 3 // 4 if whole_pages else None)
    return f"one bit flipped in {path.name}"


def no_label(tool: Tool, facts: Facts) -> str:
    return tool.remove_label()


def rotted(tool: Tool, facts: Facts) -> str:
    tool.verify()
    return f"verified, then {flipped(tool, facts)}, its time and size unchanged"


def nothing(tool: Tool, facts: Facts) -> str:
    return "nothing damaged"


DAMAGES: tuple[Damage, ...] = (
    Damage("0", "nothing", COMMITS, nothing),
    Damage("a", "one archived segment removed", DAMAGED - 1, removed),
    Damage("b", "the same, removed from the tool's bookkeeping too", DAMAGED - 1, removed_and_forgotten),
    Damage("c", "4 bytes flipped in a stored segment", DAMAGED - 1, flipped),
    Damage("c2", "4 bytes of WAL flipped, checksums and names redone", DAMAGED - 1, rewritten),
    Damage("c3", "4 bytes flipped after a verify had found all whole", DAMAGED - 1, rotted, True),
    Damage("d", "the segment needed for consistency removed", 0, inconsistent),
    Damage("e", "one bit flipped in a base backup file", 0, backup_bit),
    Damage("f", "backup_label removed, bookkeeping redone", 0, no_label),
)


@contextmanager
def damaged_copy(
    tool: Tool, damage: Damage, facts: Facts, source: Source
) -> Iterator[tuple[Tool, str, Path]]:
    """A damaged copy of the tool's repository, how it was damaged, and a folder for restores."""
    work = source.work / "case"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    work.chmod(0o755)
    try:
        copy = tool.at(copy_tree(tool.repository(), work / "copy"))
        how = damage.apply(copy, facts)
        shelf = work / "restored"
        shelf.mkdir(mode=0o755)
        privileges.give(shelf, source.account)
        yield copy, how, shelf
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_case(tool: Tool, damage: Damage, facts: Facts, source: Source) -> Result:
    """Damage a fresh copy of the tool's repository, verify it, restore from it, start what came of it."""
    say(f"  {damage.key}: {damage.title}")
    try:
        with damaged_copy(tool, damage, facts, source) as (copy, how, shelf):
            verify = copy.verify()
            restore = copy.restore(shelf / "data")
            restored = open_restored(source.programs, shelf / "data", source.account, restore, questions)
            if damage.proved_before:  # after the restore, which may trust the earlier verify too
                verify += copy.verify_all()
            loss = loss_rows(copy, damage, shelf, source)
            return Result(tool.name, damage, how, tuple(verify), restore, restored, loss)
    except NotApplicableError as reason:
        return Result(tool.name, damage, str(reason), (), None, None, None)


def loss_rows(tool: Tool, damage: Damage, shelf: Path, source: Source) -> int | None:
    """What a restore gives that was told to accept the loss; None for tools and damages without one."""
    if not isinstance(tool, AcceptsLoss) or damage.survivors in (0, COMMITS):
        return None
    said = tool.restore_with_loss(shelf / "short")
    restored = open_restored(source.programs, shelf / "short", source.account, said, questions)
    if restored.rows is None:
        say(f"    restore --accept-loss: {restored.note}: {' / '.join(said.lines())}")
    return restored.rows
