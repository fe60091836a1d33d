"""The values that flow through Knockwood: frozen, comparable, without I/O."""

from knockwood.model.finding import Finding, Location, Severity, Verdict, worst
from knockwood.model.proof import Claim, Commit, Proof
from knockwood.model.recovery import (
    Alternative,
    ExpectedLoss,
    Outcome,
    Plan,
    Precondition,
    Recovery,
    Step,
    StepResult,
)
from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalRange, WalSegment

__all__ = [
    "Alternative",
    "Claim",
    "Commit",
    "ExpectedLoss",
    "Finding",
    "Location",
    "Lsn",
    "Outcome",
    "Plan",
    "Precondition",
    "Proof",
    "Recovery",
    "Severity",
    "Step",
    "StepResult",
    "Timeline",
    "TimelineHistory",
    "Verdict",
    "WalRange",
    "WalSegment",
    "worst",
]
