"""The error tree is an interface: scripts and runbooks match on its codes and exit statuses."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from knockwood import errors
from knockwood.errors import (
    EXIT_BROKEN,
    EXIT_HELD,
    EXIT_NOT_CHECKED,
    EXIT_REFUSED,
    EXIT_USAGE,
    KnockwoodError,
    ObjectDamagedError,
    SettingsError,
)

# A line here is never changed or removed, only added: code -> (class, exit status, safe to retry).
STABLE = {
    "KW000": ("KnockwoodError", 2, False),
    "KW001": ("InternalError", 2, False),
    "KW002": ("StoppedError", 2, True),
    "KW100": ("UsageError", 3, False),
    "KW101": ("SettingsError", 3, False),
    "KW200": ("RefusedError", 4, False),
    "KW201": ("TargetUnreachableError", 4, False),
    "KW202": ("DirectoryNotEmptyError", 4, False),
    "KW203": ("NoSpaceError", 4, True),
    "KW300": ("HostError", 2, False),
    "KW301": ("ProgramFailedError", 2, False),
    "KW302": ("LockHeldError", 2, True),
    "KW400": ("PostgresError", 2, False),
    "KW401": ("ProgramsMissingError", 2, False),
    "KW402": ("ServerDownError", 2, True),
    "KW403": ("AuthenticationError", 2, False),
    "KW404": ("MissingPrivilegeError", 2, False),
    "KW405": ("WrongSystemError", 4, False),
    "KW406": ("UnsupportedVersionError", 2, False),
    "KW407": ("SlotLostError", 2, False),
    "KW408": ("RecoveryFailedError", 2, False),
    "KW500": ("RepositoryError", 2, False),
    "KW501": ("ObjectMissingError", 2, False),
    "KW502": ("ObjectDamagedError", 1, False),
    "KW503": ("ObjectExistsError", 2, False),
    "KW504": ("WrongKeyError", 2, False),
    "KW505": ("StorageUnavailableError", 2, True),
    "KW506": ("RepositoryFormatError", 2, False),
    "KW507": ("BackupIncompleteError", 2, True),
}

KINDS = tuple(
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KnockwoodError)
)


def test_the_exit_statuses_are_those_documented() -> None:
    statuses = (EXIT_HELD, EXIT_BROKEN, EXIT_NOT_CHECKED, EXIT_USAGE, EXIT_REFUSED)
    assert statuses == (0, 1, 2, 3, 4)


def test_no_two_errors_share_a_code() -> None:
    assert [code for code, uses in Counter(kind.code for kind in KINDS).items() if uses > 1] == []


def test_every_error_has_a_code_of_its_own() -> None:
    assert [kind.__name__ for kind in KINDS if "code" not in vars(kind)] == []


@pytest.mark.parametrize("code", sorted(STABLE))
def test_a_published_code_keeps_its_meaning(code: str) -> None:
    [kind] = [kind for kind in KINDS if kind.code == code]
    assert (kind.__name__, kind.exit_status, kind.retry_safe) == STABLE[code]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_well_formed(kind: type[KnockwoodError]) -> None:
    assert re.fullmatch(r"KW\d{3}", kind.code)
    assert kind.__doc__
    # A failure must never look like an answer: only damage that was seen is one, and none is ever held.
    seen = {EXIT_BROKEN} if kind is ObjectDamagedError else {EXIT_NOT_CHECKED, EXIT_USAGE, EXIT_REFUSED}
    assert kind.exit_status in seen


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_belongs_to_the_group_of_its_code(kind: type[KnockwoodError]) -> None:
    groups = {"1": EXIT_USAGE, "2": EXIT_REFUSED}
    group = groups.get(kind.code[2])
    assert group is None or kind.exit_status == group


def test_the_text_names_what_and_where() -> None:
    error = KnockwoodError("checksum differs", where="wal/1/00000001", hint="is the disk healthy?")
    assert str(error) == "checksum differs (wal/1/00000001)"
    assert error.hint == "is the disk healthy?"


def test_the_text_without_a_place_is_what_happened() -> None:
    assert str(KnockwoodError("checksum differs")) == "checksum differs"


def test_settings_errors_carry_every_problem() -> None:
    problems = ("knockwood.toml:3: rpo: not a duration", "knockwood.toml:9: dns: unknown key")
    assert SettingsError("settings have 2 mistakes", problems=problems).problems == problems
    assert SettingsError("no settings").problems == ()
