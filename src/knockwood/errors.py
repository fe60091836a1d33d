"""Every error Knockwood raises on purpose: what, where, a hint, a stable code, and whether a retry is safe.

The text says what happened in lower case without a full stop. `where` names the object, file or
server, `hint` says what to do next. Only entry points turn an error into output and an exit status.
"""

from __future__ import annotations

from typing import ClassVar, Final

EXIT_HELD: Final = 0
EXIT_BROKEN: Final = 1
EXIT_NOT_CHECKED: Final = 2
EXIT_USAGE: Final = 3
EXIT_REFUSED: Final = 4


class KnockwoodError(Exception):
    """The root of the tree; an operation that fails with it has left nothing half-done that looks done."""

    code: ClassVar[str] = "KW000"
    exit_status: ClassVar[int] = EXIT_NOT_CHECKED
    retry_safe: ClassVar[bool] = False

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.what}{place}"


class InternalError(KnockwoodError):
    """Knockwood itself failed: a defect of it, not of what it looked at."""

    code = "KW001"


class StoppedError(KnockwoodError):
    """The work was stopped by a signal before its end."""

    code = "KW002"
    retry_safe = True


# --- what the user wrote -------------------------------------------------------------------------


class UsageError(KnockwoodError):
    """A command line that cannot be understood."""

    code = "KW100"
    exit_status = EXIT_USAGE


class SettingsError(KnockwoodError):
    """Settings that cannot be used; `problems` holds one `file:line: key: what` per mistake."""

    code = "KW101"
    exit_status = EXIT_USAGE

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        problems: tuple[str, ...] = (),
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.problems = problems


# --- refused as unsafe ---------------------------------------------------------------------------


class RefusedError(KnockwoodError):
    """Knockwood could do it, but it would lose or endanger data."""

    code = "KW200"
    exit_status = EXIT_REFUSED


class TargetUnreachableError(RefusedError):
    """The archive cannot bring a cluster to the target asked for."""

    code = "KW201"


class DirectoryNotEmptyError(RefusedError):
    """A restore was pointed at a folder that already holds something."""

    code = "KW202"


class NoSpaceError(RefusedError):
    """The disk has no room for what was asked."""

    code = "KW203"
    retry_safe = True


# --- the machine ---------------------------------------------------------------------------------


class HostError(KnockwoodError):
    """A file, process or lock of this machine failed."""

    code = "KW300"


class ProgramFailedError(HostError):
    """A child program ended with a failure; `what` holds the last lines it printed."""

    code = "KW301"


class LockHeldError(HostError):
    """Another process or machine does the same work now."""

    code = "KW302"
    retry_safe = True


class LoadTooHighError(HostError):
    """The machine stayed busier than the load budget allows."""

    code = "KW303"
    retry_safe = True


# --- PostgreSQL ----------------------------------------------------------------------------------


class PostgresError(KnockwoodError):
    """The server refused or failed."""

    code = "KW400"


class ProgramsMissingError(PostgresError):
    """No PostgreSQL programs of the cluster's major version were found."""

    code = "KW401"


class ServerDownError(PostgresError):
    """Nothing answers at the address."""

    code = "KW402"
    retry_safe = True


class AuthenticationError(PostgresError):
    """The server did not accept the role or its password."""

    code = "KW403"


class MissingPrivilegeError(PostgresError):
    """The role may not do this; the hint holds the GRANT that mends it."""

    code = "KW404"


class WrongSystemError(PostgresError):
    """The server, backup or WAL belongs to another cluster (system identifier)."""

    code = "KW405"
    exit_status = EXIT_REFUSED


class UnsupportedVersionError(PostgresError):
    """The server's major version cannot do this."""

    code = "KW406"


class SlotLostError(PostgresError):
    """The replication slot no longer holds the WAL that the archive lacks."""

    code = "KW407"


class RecoveryFailedError(PostgresError):
    """A clone did not reach, or did not stop at, the LSN asked for."""

    code = "KW408"


# --- the repository ------------------------------------------------------------------------------


class RepositoryError(KnockwoodError):
    """The repository cannot be read or written."""

    code = "KW500"


class ObjectMissingError(RepositoryError):
    """An object that should be in the repository is not."""

    code = "KW501"


class ObjectDamagedError(RepositoryError):
    """An object's content is not what was written."""

    code = "KW502"
    exit_status = EXIT_BROKEN


class ObjectExistsError(RepositoryError):
    """An object of that name is already stored; objects are never overwritten."""

    code = "KW503"


class WrongKeyError(RepositoryError):
    """No identity given can decrypt the object."""

    code = "KW504"


class StorageUnavailableError(RepositoryError):
    """The storage did not answer, or answered with a passing failure."""

    code = "KW505"
    retry_safe = True


class RepositoryFormatError(RepositoryError):
    """The repository was written by a newer Knockwood, or is none."""

    code = "KW506"


class BackupIncompleteError(RepositoryError):
    """A backup could not be completed with the WAL that makes it consistent; it is not listed."""

    code = "KW507"
    retry_safe = True
