"""Run checks over a subject: what breaks in a check is 'not checked', never a crash and never green."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psycopg

from knockwood.errors import KnockwoodError, ServerDownError
from knockwood.host import clock
from knockwood.integrity.budget import pace
from knockwood.integrity.check import Check, CheckResult, NotChecked, Subject, Weight
from knockwood.integrity.registry import select
from knockwood.model import Finding, Location, Verdict, worst


@dataclass(frozen=True, slots=True)
class Report:
    """How a run of checks ended; the results are in the registry's order."""

    results: tuple[CheckResult, ...]

    @property
    def verdict(self) -> Verdict:
        """Broken if anything is; not checked if anything was not, or nothing ran at all."""
        return worst(result.verdict for result in self.results)

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(finding for result in self.results for finding in result.findings)

    @property
    def not_checked(self) -> tuple[NotChecked, ...]:
        return tuple(gap for result in self.results for gap in result.not_checked)


@dataclass(frozen=True, slots=True)
class CheckProgress:
    """Said before each check (`result` is None) and after it."""

    check: Check
    position: int
    total: int
    result: CheckResult | None = None


def run_checks(
    subject: Subject,
    names: Iterable[str] | None = None,
    weights: Iterable[Weight] | None = None,
    progress: Callable[[CheckProgress], None] | None = None,
) -> Report:
    """Run the checks of these names and weights (None: all), one after the other.

    An error inside a check becomes NotChecked with its reason, beside what it found before; once the
    server no longer answers, the checks left are not checked. Raises UsageError for an unknown name.
    """
    chosen = select(names, weights)
    results: list[CheckResult] = []
    down: str | None = None
    for position, check in enumerate(chosen, 1):
        if progress:
            progress(CheckProgress(check, position, len(chosen)))
        if down is None:
            result, failure = _run_one(check, subject)
            if failure is not None and not _answers(subject):
                down = failure
        else:
            result = CheckResult(
                check.name, (), (NotChecked(check.name, f"the server is gone: {down}"),), 0.0
            )
        results.append(result)
        if progress:
            progress(CheckProgress(check, position, len(chosen), result))
    return Report(tuple(results))


def _run_one(check: Check, subject: Subject) -> tuple[CheckResult, str | None]:
    """The result, and the reason if the connection was lost."""
    findings: list[Finding] = []
    gaps: list[NotChecked] = []
    lost: str | None = None
    seen: set[tuple[Location, str]] = set()
    started = clock.monotonic()
    try:
        pace(subject)
        for outcome in check.run(subject):
            if isinstance(outcome, NotChecked):
                gaps.append(outcome)
            elif (outcome.location, outcome.summary) not in seen:  # a shared catalog is met in each database
                seen.add((outcome.location, outcome.summary))
                findings.append(outcome)
    except Exception as error:
        # A check that failed has not checked: whatever went wrong, the answer may not be green.
        gaps.append(NotChecked(check.name, reason_of(error)))
        lost = reason_of(error) if isinstance(error, ServerDownError | psycopg.OperationalError) else None
    result = CheckResult(check.name, tuple(findings), tuple(gaps), clock.monotonic() - started)
    return result, lost


def _answers(subject: Subject) -> bool:
    try:
        subject.connect().close()
    except (KnockwoodError, psycopg.Error):
        return False
    return True


def reason_of(error: BaseException) -> str:
    """One sentence on why something could not be checked; a lock or time limit is named as such."""
    cause = error if isinstance(error, psycopg.Error) else error.__cause__
    if isinstance(cause, psycopg.errors.LockNotAvailable):
        return f"a lock was not free within the lock timeout: {_first_line(cause)}"
    if isinstance(cause, psycopg.errors.QueryCanceled):
        return f"it took longer than the statement timeout: {_first_line(cause)}"
    if isinstance(error, KnockwoodError):
        return f"{error}; {error.hint}" if error.hint else str(error)
    if isinstance(error, psycopg.Error):
        return _first_line(error)
    return f"{type(error).__name__}: {error}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
