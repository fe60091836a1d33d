"""Plans, findings and results read back from the JSON that they were printed as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from knockwood.errors import UsageError
from knockwood.model.finding import Finding, Location, Severity, Verdict
from knockwood.model.proof import Claim
from knockwood.model.recovery import (
    Alternative,
    ExpectedLoss,
    Outcome,
    Plan,
    Precondition,
    Step,
    StepResult,
)
from knockwood.model.wal import Lsn

T = TypeVar("T")


def parse_finding(value: Any) -> Finding:
    """A finding as `check --json` prints it; raises UsageError that names what is wrong."""
    return _of("finding", value, _finding)


def parse_findings(value: Any) -> tuple[Finding, ...]:
    """The findings of a whole answer of `check --json`, of a list, or of a single finding."""
    if isinstance(value, Mapping) and "findings" in value:
        value = value["findings"]
    elif isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise UsageError("no findings in it", hint="give what knockwood check --json printed")
    return tuple(parse_finding(each) for each in value)


def parse_plan(value: Any) -> Plan:
    """A plan as its `as_json` wrote it; its id is that of the original. Raises UsageError."""
    return _of("plan", value, _plan)


def parse_result(value: Any) -> StepResult:
    """The result of a step as its `as_json` wrote it; raises UsageError."""
    return _of("result of a step", value, _result)


def parse_claim(value: Any) -> Claim:
    """A claim as its `as_json` wrote it; raises UsageError."""
    return _of(
        "claim", value, lambda v: Claim(_text(v, "name"), Verdict(_text(v, "verdict")), v.get("detail", ""))
    )


def _of(what: str, value: Any, make: Callable[[Mapping[str, Any]], T]) -> T:
    if not isinstance(value, Mapping):
        raise UsageError(f"not a {what}: {str(value)[:60]!r}")
    try:
        return make(value)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"not a {what}: {reason}") from error


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise TypeError(f"{key!r} is not a text")
    return text


def _finding(value: Mapping[str, Any]) -> Finding:
    return Finding(
        check=_text(value, "check"),
        severity=Severity(_text(value, "severity")),
        location=_location(value.get("location", {})),
        summary=_text(value, "summary"),
        meaning=value.get("meaning", ""),
        remedy=value.get("remedy", ""),
        evidence=dict(value.get("evidence", {})),
    )


def _location(value: Mapping[str, Any]) -> Location:
    known = dict(value)
    unknown = sorted(set(known) - set(Location.__slots__))
    if unknown:
        raise ValueError(f"a location has no {unknown[0]!r}")
    lsn = known.pop("lsn", None)
    block = known.pop("block", None)
    if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < 0):
        raise ValueError(f"{block!r} is not the number of a block")
    return Location(**known, block=block, lsn=Lsn.parse(lsn) if lsn is not None else None)


def _plan(value: Mapping[str, Any]) -> Plan:
    return Plan(
        cluster=_text(value, "cluster"),
        purpose=_text(value, "purpose"),
        steps=tuple(_step(each) for each in value["steps"]),
        expected_loss=_loss(value["expected_loss"]),
        heals=tuple(_finding(each) for each in value.get("heals", ())),
        alternatives=tuple(_alternative(each) for each in value.get("alternatives", ())),
        refused=tuple(value.get("refused", ())),
    )


def _step(value: Mapping[str, Any]) -> Step:
    return Step(
        kind=_text(value, "kind"),
        title=_text(value, "title"),
        arguments=dict(value["arguments"]),
        preconditions=tuple(Precondition(each["name"], each["detail"]) for each in value["preconditions"]),
        locks=_text(value, "locks"),
        blocked_seconds=value["blocked_seconds"],
        seconds=value["seconds"],
        undo=_text(value, "undo"),
    )


def _alternative(value: Mapping[str, Any]) -> Alternative:
    return Alternative(
        title=_text(value, "title"),
        why_not=_text(value, "why_not"),
        expected_loss=_loss(value["expected_loss"]),
        locks=value["locks"],
        seconds=value["seconds"],
    )


def _loss(value: Mapping[str, Any]) -> ExpectedLoss:
    return ExpectedLoss(value["transactions"], value["rows"], value["detail"])


def _result(value: Mapping[str, Any]) -> StepResult:
    return StepResult(
        kind=_text(value, "kind"),
        title=_text(value, "title"),
        outcome=Outcome(_text(value, "outcome")),
        detail=value["detail"],
        seconds=value["seconds"],
        blocked_seconds=value["blocked_seconds"],
        evidence=tuple(value["evidence"]),
        values=dict(value["values"]),
    )
