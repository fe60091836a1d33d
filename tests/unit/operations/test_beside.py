"""Work beside other work: its result, its error, and its end."""

from __future__ import annotations

import threading
import time

import pytest

from knockwood.operations.beside import GoOn, beside


def test_the_result_or_the_error_comes_when_it_is_asked_for() -> None:
    with beside(lambda go_on: 7) as result:
        assert result() == 7

    def fail(go_on: GoOn) -> int:
        raise ValueError("no")

    with beside(fail) as result, pytest.raises(ValueError, match="no"):
        result()


def test_work_that_nobody_waits_for_is_ended() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(go_on: GoOn) -> None:
        begun.set()
        try:
            while True:
                go_on()
                time.sleep(0.001)
        finally:
            ended.set()

    def interrupted() -> None:
        with beside(work):
            assert begun.wait(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ended.is_set()
