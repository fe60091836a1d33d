from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from knockwood.clone.feed import _cut_copy, _least, _wanted, feeding_command
from knockwood.clone.goal import GUARD_STATUS, Goal
from knockwood.model import Lsn, Timeline, WalSegment

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20


def segments(*numbers: int) -> tuple[WalSegment, ...]:
    return tuple(WalSegment(Timeline(1), number, SIZE) for number in numbers)


def give(command: str, name: str, into: Path) -> int:
    text = command.replace("%f", name).replace("%p", str(into)).replace("%%", "%")
    return subprocess.run(["sh", "-c", text], check=False).returncode


def test_a_segment_is_given_once_and_a_history_as_often_as_asked(tmp_path: Path) -> None:
    spool, into = tmp_path / "sp'o%ol", tmp_path / "RECOVERYXLOG"
    (spool / "offered").mkdir(parents=True)
    command = feeding_command(spool, Goal(Timeline(2), Lsn(5), True, Lsn(1)))
    name = segments(3)[0].name
    (spool / "offered" / name).write_bytes(b"wal")
    (spool / "00000002.history").write_bytes(b"history")
    (spool / segments(4)[0].name).write_bytes(b"not offered")
    assert give(command, name, into) == 0
    assert into.read_bytes() == b"wal"
    assert give(command, name, into) == 1
    assert give(command, segments(4)[0].name, into) == 1
    for _ in range(2):
        assert give(command, "00000002.history", into) == 0
        assert into.read_bytes() == b"history"
    assert give(command, "00000003.history", into) == GUARD_STATUS


def test_what_holds_something_between_two_positions_is_offered_the_last_first() -> None:
    known = segments(1, 2, 3, 4)
    assert _wanted(known, Lsn(0), Lsn(3 * SIZE)) == list(segments(2, 1))
    assert _wanted(known, Lsn(2 * SIZE + 5), Lsn(3 * SIZE + 1)) == list(segments(3, 2))
    assert _wanted(known, Lsn(4 * SIZE), Lsn(4 * SIZE + 100)) == list(segments(4))


@pytest.mark.parametrize(
    ("stop", "least"),
    [
        (5 * SIZE + 8192 * 3 + 24, 5 * SIZE + 8192 * 3),
        (5 * SIZE + 40, 5 * SIZE),
        (5 * SIZE + 8192 * 3 + 40, 5 * SIZE + 8192 * 3 + 40),
        (5 * SIZE + 8192 * 3, 5 * SIZE + 8192 * 3),
        (5 * SIZE + 24, 5 * SIZE + 24),
    ],
)
def test_a_record_that_ends_with_its_page_ends_before_the_next_header(stop: int, least: int) -> None:
    assert _least(Lsn(stop), segments(5)) == Lsn(least)


def test_a_segment_is_cut_at_the_goal_and_keeps_its_size(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(bytes([7]) * SIZE)
    _cut_copy(source, target, 12345, SIZE)
    content = target.read_bytes()
    assert len(content) == SIZE
    assert content[:12345] == bytes([7]) * 12345
    assert not any(content[12345:])
