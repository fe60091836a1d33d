"""The command line: parse, run one command, print its answer or its error, exit with its status."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from cyclopts import App, CycloptsError

from knockwood import __version__
from knockwood.cli.answer import Answer, print_answer, print_error
from knockwood.cli.commands import register_commands
from knockwood.errors import (
    EXIT_NOT_CHECKED,
    InternalError,
    KnockwoodError,
    RefusedError,
    StoppedError,
    UsageError,
)

_COMMON_WITH_VALUE = ("--config", "--cluster")
_FETCH_ANSWERS = (0, 1)
_FETCH_FAILED = 200
_GARBAGE_AFTER = 100_000
"""Rows are held by the ten thousand and refer to nothing in a circle: looking for circles costs more than it frees."""


def build_app() -> App:
    """The whole command tree."""
    app = App(
        name="knockwood",
        help="Makes PostgreSQL outages caused by damaged data short, explained and lossless.",
        version=__version__,
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # `main` answers it, in JSON too
    )
    register_commands(app)
    return app


def run(arguments: Sequence[str] | None = None) -> None:
    """Entry point: never returns, exits with 0 held, 1 broken, 2 not checked, 3 usage, 4 refused."""
    gc.set_threshold(_GARBAGE_AFTER)
    sys.exit(main(list(sys.argv[1:] if arguments is None else arguments)))


def main(arguments: list[str]) -> int:
    """Run one command line; returns its exit status."""
    signal.signal(signal.SIGTERM, _end_as_interrupted)
    words = common_last(arguments)
    as_json = "--json" in words
    try:
        status = _run(words, as_json=as_json)
    except CycloptsError as error:
        asked = " ".join(words[:1]) if words[:1] and not words[0].startswith("-") else ""
        told = UsageError(str(error).strip(), hint=f"knockwood {asked} --help".replace("  ", " "))
        status = print_error(told, as_json=as_json)
    except KnockwoodError as error:
        status = print_error(error, as_json=as_json)
    except KeyboardInterrupt:
        print_error(StoppedError("interrupted before the end"), as_json=as_json)
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        # Nobody reads our answer; Python would try to flush the rest at its end and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_NOT_CHECKED
    except Exception as error:
        if os.environ.get("KNOCKWOOD_TRACEBACK"):
            raise
        status = print_error(_internal(error), as_json=as_json)
    # PostgreSQL takes 1 to 125 of a restore_command for "not in the archive" and ends recovery with
    # less data: whatever went wrong here must not look like that.
    if words[:2] == ["wal", "fetch"] and status not in _FETCH_ANSWERS:
        return _FETCH_FAILED
    return status


def _run(words: list[str], *, as_json: bool) -> int:
    result = build_app()(words, exit_on_error=False, print_error=False)
    if isinstance(result, Answer):
        return print_answer(result, as_json=as_json)
    return result if isinstance(result, int) else 0


def _internal(error: Exception) -> KnockwoodError:
    # Not of a terminal that has few letters.
    if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":
        near = str(error.object)[max(error.start - 20, 0) : error.end + 20]
        return RefusedError(
            "a name holds bytes that are no UTF-8, which cannot be put into a statement",
            where=near.encode("utf-8", "backslashreplace").decode(),
            hint="a database of encoding SQL_ASCII: rename the table or column",
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    return InternalError(
        f"{type(error).__name__}: {error}",
        where=f"{Path(last.filename).name}:{last.lineno}",
        hint="a defect of Knockwood: please report it with what KNOCKWOOD_TRACEBACK=1 shows",
    )


def common_last(arguments: list[str]) -> list[str]:
    """`knockwood --config F backup` means the same as `knockwood backup --config F`."""
    moved: list[str] = []
    rest = list(arguments)
    while rest:
        if rest[0] in _COMMON_WITH_VALUE and len(rest) > 1:
            moved += [rest.pop(0), rest.pop(0)]
        elif rest[0] == "--json" or rest[0].startswith(tuple(f"{name}=" for name in _COMMON_WITH_VALUE)):
            moved.append(rest.pop(0))
        else:
            break
    return rest + moved


def _end_as_interrupted(_number: int, _frame: FrameType | None) -> None:
    # SIGTERM unwinds like Ctrl-C, so that servers and leases of ours are given back.
    raise KeyboardInterrupt
