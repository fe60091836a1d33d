"""One module per command; each offers `register(app)`."""

from __future__ import annotations

from cyclopts import App

from knockwood.cli.commands import (
    backup,
    check,
    doctor,
    drill,
    expire,
    init,
    prove,
    restore,
    status,
    verify,
    wal,
)

_MODULES = (init, doctor, status, wal, backup, verify, prove, check, restore, expire, drill)


def register_commands(app: App) -> None:
    """Add every command to the app, in the order of the help."""
    for module in _MODULES:
        module.register(app)
