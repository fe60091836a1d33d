"""The commands by name. Each module is imported when its command runs: `wal push` runs once per segment."""

from __future__ import annotations

from typing import Final

from cyclopts import App

_COMMANDS: Final = {
    "init": (
        "init:init",
        "Write the settings and make the repository; show the SQL that prepares the server.",
    ),
    "doctor": (
        "doctor:doctor",
        "Say what Knockwood can reach here, what is missing for more, and print what mends it.",
    ),
    "status": (
        "status:status",
        "Up to where each cluster can be brought back, and how fresh its backups and proofs are.",
    ),
    "wal receive": (
        "wal:receive_wal",
        "Receive WAL in the foreground until Ctrl-C; goes on where it stopped.",
    ),
    "wal push": ("wal:push_wal", "Store one finished WAL file, for archive_command."),
    "wal fetch": ("wal:fetch_wal", "Bring back one WAL file, for restore_command."),
    "wal gaps": ("wal:list_gaps", "List the WAL that the archive lacks between what it has."),
    "wal acknowledge": ("wal:acknowledge", "Accept a gap: what lies in it cannot be restored, and you know."),
    "backup": ("backup:backup", "Take a base backup; every page is verified on the way."),
    "backups": ("backup:backups", "List the complete backups, oldest first."),
    "verify": (
        "verify:verify",
        "Check the repository with no server: what can be restored, and what cannot.",
    ),
    "prove": ("prove:prove", "Restore, check, compare with the live server, and store the proof."),
    "check": ("check:check", "Look for damage: lightly on the server, with --heavy everywhere on a clone."),
    "restore": (
        "restore:restore",
        "Restore a cluster, or one table, beside the running one, complete or not at all.",
    ),
    "log": ("history:log", "List transactions from the archive: when, how much, which tables they changed."),
    "mark": ("history:mark", "Say what happens now (a release), so that the log shows it where it happened."),
    "revert": (
        "revert:revert",
        "Take transactions back, keep what came after them: the plan, and with --apply its execution.",
    ),
    "recover": (
        "recover:recover",
        "Plan the smallest safe repair of what the checks find, show it, and with --apply carry it out.",
    ),
    "blame": ("blame:blame", "Say which transaction wrote these rows, or deleted them."),
    "diff": ("diff:diff", "Show what a transaction, or all of a range, did to rows, column by column."),
    "bisect": ("bisect:bisect", "Find the first commit at which a rule, a check or any SQL turns bad."),
    "shadow run": (
        "shadow:run",
        "Keep a clone that follows the repository, in the foreground until Ctrl-C.",
    ),
    "shadow status": ("shadow:status", "Where the shadow stands, what was proved of it, what holds it."),
    "shadow hold": ("shadow:hold", "Keep the shadow from replaying past an LSN."),
    "shadow release": ("shadow:release", "Let the shadow go on past a hold."),
    "shadow remove": ("shadow:remove", "Remove the shadow and its holds."),
    "expire": ("expire:expire", "Show, and with --apply remove, what the settings no longer keep."),
    "drill list": ("drill:list_drills", "List the scenarios."),
    "drill run": ("drill:run_drills", "Play the scenarios named, and print their scorecards."),
}
_GROUPS: Final = {
    "wal": "WAL into the repository and back.",
    "shadow": "A clone that follows the repository, at hand for proofs and repairs.",
    "drill": "Outages on purpose, in a sandbox of their own.",
}


def register_commands(app: App) -> None:
    """Add every command to the app, in the order of the help."""
    groups: dict[str, App] = {}
    for words, (place, text) in _COMMANDS.items():
        path = f"knockwood.cli.commands.{place}"
        group, _, name = words.rpartition(" ")
        if group and group not in groups:
            groups[group] = App(name=group, help=_GROUPS[group])
            app.command(groups[group])
        (groups[group] if group else app).command(path, name=name, help=text)
