"""`knockwood shadow`: a clone that follows the repository, at hand for proofs and repairs."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from knockwood.cli.answer import Answer, coloured, megabytes, print_answer, print_error, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import byte_progress
from knockwood.errors import KnockwoodError, UsageError
from knockwood.host import clock
from knockwood.model import Lsn
from knockwood.operations import shadow, shadow_steps
from knockwood.operations.shadow import ShadowStatus
from knockwood.operations.shadow_steps import Step


def run(
    *,
    once: Annotated[bool, Parameter(negative="", help="Make one step, with checks, and end.")] = False,
    common: Common = DEFAULT,
) -> int:
    """Make the shadow if there is none and let it follow, in the foreground until Ctrl-C.

    Its server runs on meanwhile. The end waits for a repair that reads from it; a second Ctrl-C does not.
    """
    cluster = common.open_cluster()
    if once:
        with byte_progress("shadow", quiet=common.json) as progress:
            done = shadow_steps.step(cluster, cluster.repository(), check=True, progress=progress)
        answer = Answer(
            _values(done), lambda console: _show(console, done), done.proof.verdict if done.proof else None
        )
        return print_answer(answer, as_json=common.json)
    stop = threading.Event()
    _set_on_signal(stop)
    console = Console(stderr=True, highlight=False)
    shadow_steps.run(
        cluster,
        stop,
        on_step=lambda step: _show(console, step),
        on_error=lambda error: _error(error, common),
    )
    return 0


def _set_on_signal(stop: threading.Event) -> None:
    """A first signal ends in order; a second one at once, and the shadow's server with it."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def ended(*_: object) -> None:
        stop.set()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, ended)


def _error(error: KnockwoodError, common: Common) -> None:
    print_error(error, as_json=common.json)


def _values(done: Step) -> dict[str, object]:
    record = done.record
    return {
        "did": done.did,
        "reached_lsn": str(record.stand.reached) if record.stand else None,
        "last_commit": record.stand.commit.as_json() if record.stand and record.stand.commit else None,
        "proof": done.proof.as_json() if done.proof else None,
        "holds": [hold.as_json() for hold in done.holds],
        "waits_for": done.waits_for,
        "seconds": round(done.seconds, 3),
    }


def _show(console: Console, done: Step) -> None:
    at = done.record.stand.reached if done.record.stand else "nowhere"
    words = f"[dim]{clock.now():%H:%M:%S}[/] {done.did} at {at} in {seconds(done.seconds)}"
    if done.proof is not None:
        words += f", checks: {coloured(done.proof.verdict)}"
    console.print(words)
    for name, verdict, detail in done.proof.checks if done.proof is not None else ():
        if detail:
            console.print(f"         {coloured(verdict)} {name} [dim]{escape(detail)}[/]", soft_wrap=True)
    for hold in done.holds:
        console.print(f"         [red]hold[/] {hold.id} at {hold.lsn}: {escape(hold.reason)}", soft_wrap=True)
    if done.waits_for:
        console.print(f"         [yellow]waits[/] {escape(done.waits_for)}", soft_wrap=True)


def status(*, common: Common = DEFAULT) -> Answer:
    """Say where the shadow stands, what was proved of it, and what holds it."""
    cluster = common.open_cluster()
    found = shadow.status(cluster, cluster.repository())
    return Answer(shadow.as_json(found), lambda console: _show_status(console, found), found.verdict)


def _show_status(console: Console, found: ShadowStatus) -> None:
    record = found.record
    if record is None:
        switched = "" if found.enabled else ", and the settings do not ask for one ([cluster.NAME.shadow])"
        console.print(f"there is no shadow in {escape(str(found.folder))}{switched}", soft_wrap=True)
    else:
        stand = record.stand
        console.print(
            f"{record.stage} at {stand.reached if stand else 'nowhere'} on timeline {record.timeline}"
        )
        if stand is not None and stand.commit is not None:
            console.print(f"last commit in: xid {stand.commit.xid}, {stand.commit.time.isoformat()}")
        if found.behind_bytes is not None:
            console.print(f"{megabytes(found.behind_bytes)} of WAL behind the archive")
        for name, verdict, detail in record.proof.checks if record.proof else ():
            console.print(f"{coloured(verdict)} {name} [dim]{escape(detail)}[/]", soft_wrap=True)
    for hold in found.holds:
        if hold.active:
            console.print(f"[red]hold[/] {hold.id} at {hold.lsn}: {escape(hold.reason)}", soft_wrap=True)
    if found.past_hold:
        console.print("[red]it is past a hold: the next run makes it anew from before that[/]")


def hold(
    lsn: str,
    *,
    reason: Annotated[str, Parameter(help="Why, for whoever looks next.")] = "set by hand",
    common: Common = DEFAULT,
) -> Answer:
    """Keep the shadow from replaying any record that starts at or after an LSN."""
    try:
        position = Lsn.parse(lsn)
    except ValueError:
        raise UsageError(f"not an LSN: {lsn!r}", hint="an LSN looks like 16/B374D848") from None
    made = shadow.hold(common.open_cluster(), position, reason)
    return Answer({"hold": made.as_json()}, lambda console: console.print(f"hold {made.id} at {made.lsn}"))


def release(id: str, *, common: Common = DEFAULT) -> Answer:
    """Let the shadow go on past a hold, once what it was for is mended or understood."""
    done = shadow.release(common.open_cluster(), id)
    return Answer({"hold": done.as_json()}, lambda console: console.print(f"released {done.id}"))


def remove(*, common: Common = DEFAULT) -> Answer:
    """Remove the shadow and its holds; the repository keeps everything it was made from."""
    cluster = common.open_cluster()
    gone = shadow.remove(cluster, cluster.repository())
    text = "removed" if gone else "there was none"
    return Answer({"removed": gone}, lambda console: console.print(text))
