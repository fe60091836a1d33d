"""The command line: parse, run one command, print its answer or its error, exit with its status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from cyclopts import App, CycloptsError
from rich.console import Console

from knockwood import __version__
from knockwood.cli.answer import Answer, print_answer, print_error
from knockwood.cli.commands import register_commands
from knockwood.errors import EXIT_NOT_CHECKED, EXIT_USAGE, KnockwoodError

_COMMON_WITH_VALUE = ("--config", "--cluster")


def build_app() -> App:
    """The whole command tree."""
    app = App(
        name="knockwood",
        help="Makes PostgreSQL outages caused by damaged data short, explained and lossless.",
        version=__version__,
        result_action="return_value",
    )
    register_commands(app)
    return app


def run(arguments: Sequence[str] | None = None) -> None:
    """Entry point: never returns, exits with 0 held, 1 broken, 2 not checked, 3 usage, 4 refused."""
    sys.exit(main(list(sys.argv[1:] if arguments is None else arguments)))


def main(arguments: list[str]) -> int:
    """Run one command line; returns its exit status."""
    signal.signal(signal.SIGTERM, _end_as_interrupted)
    words = common_last(arguments)
    as_json = "--json" in words
    try:
        result = build_app()(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        message = str(error).strip()
        Console(stderr=True, highlight=False).print(
            f"[bold red]error[/] {message}", markup=True, soft_wrap=True
        )
        return EXIT_USAGE
    except KnockwoodError as error:
        return print_error(error, as_json=as_json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return EXIT_NOT_CHECKED
    if isinstance(result, Answer):
        return print_answer(result, as_json=as_json)
    return result if isinstance(result, int) else 0


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
