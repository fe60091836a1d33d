"""kill -9 of whoever keeps the shadow's server, and of whoever borrowed it: no server is left, no answer is wrong."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from fix_clones import Protected, protected, rows
from fix_shadow import BORROWER, LOOP, Shop, told
from knockwood.operations import shadow, shadow_steps

if TYPE_CHECKING:
    from fix_server import ServerFactory


def contents(shop: Shop) -> list[int]:
    with shadow.open_shadow(shop.cluster, shop.made.repository) as held:
        return rows(held.standing().dsn())


def started(made: Protected) -> Shop:
    shop = Shop.of(made)
    made.backup()
    made.insert(1)
    made.flush()
    return shop


def test_the_loop_is_killed_while_a_borrower_reads(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop = started(made)
        with told(LOOP, shop.config) as loop:
            loop.until("stood")
            with told(BORROWER, shop.config) as borrower:
                assert borrower.says() == f"lent {shop.postmaster}"
                assert borrower.asked("sleep") == "sleeping"
                loop.child.send_signal(signal.SIGKILL)
                loop.child.wait()
                assert borrower.says().startswith("error")
                assert shop.servers() == []
                # It has the shadow still, and starts a server of its own to go on.
                made.insert(2)
                made.flush()
                assert borrower.asked("advance") == "1 2"
                assert borrower.asked("give back") == "gave back"
        assert shop.servers() == []
        made.insert(3)
        made.flush()
        assert shadow_steps.step(shop.cluster, made.repository, check=True).did == "advanced"
        assert contents(shop) == [1, 2, 3]


@pytest.mark.parametrize("late", [0.0, 0.05, 0.2])
def test_the_borrower_is_killed_while_it_feeds(new_server: ServerFactory, late: float) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop = started(made)
        with told(LOOP, shop.config) as loop:
            loop.until("stood")
            with told(BORROWER, shop.config) as borrower:
                assert borrower.says().startswith("lent")
                made.execute("insert into t select generate_series(2, 20000)")
                made.execute("update t set a = -a; update t set a = -a")
                made.flush()
                assert borrower.child.stdin is not None
                borrower.child.stdin.write("advance\n")
                borrower.child.stdin.flush()
                deadline = time.monotonic() + 20
                while shop.record.stage != "moving" and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert shop.record.stage == "moving"
                time.sleep(late)
                os.kill(borrower.child.pid, signal.SIGKILL)
                borrower.child.wait()
            made.insert(30000)
            made.flush()
            loop.until("advanced")
            assert not [
                line for line in loop.lines if line.startswith(("rebuilt", "made")) and line != loop.lines[0]
            ]
            assert contents(shop) == [*range(1, 20001), 30000]
            assert shop.record.stage == "standing"
            loop.child.terminate()
            loop.until("ended")
        assert shop.servers() == []


def test_the_loop_is_told_to_end_while_it_is_lent(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop = started(made)
        with told(LOOP, shop.config) as loop:
            loop.until("stood")
            with told(BORROWER, shop.config) as borrower:
                pid = shop.postmaster
                assert borrower.says() == f"lent {pid}"
                loop.child.terminate()
                made.insert(2)
                made.flush()
                time.sleep(2)
                assert loop.child.poll() is None
                assert borrower.asked("advance") == "1 2"
                assert shop.postmaster == pid
                assert borrower.asked("give back") == "gave back"
            loop.until("ended")
            assert loop.child.wait() == 0
        assert shop.servers() == []
        assert contents(shop) == [1, 2]


def test_the_loop_is_killed_at_any_moment(new_server: ServerFactory) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        shop = started(made)
        for number in range(2, 8):
            with told(LOOP, shop.config) as loop:
                if number > 2:
                    loop.says()
                made.insert(number)
                made.execute("select pg_logical_emit_message(false, 'x', repeat('y', 300000))")
                made.flush()
                time.sleep(0.37 * (number - 1))
                loop.child.send_signal(signal.SIGKILL)
                loop.child.wait()
            assert shop.servers() == []
        shadow_steps.step(shop.cluster, made.repository, check=True)
        assert contents(shop) == list(range(1, 8))
