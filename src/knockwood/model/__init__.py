"""The values that flow through Knockwood: frozen, comparable, without I/O."""

from knockwood.model.finding import Finding, Location, Severity, Verdict, worst
from knockwood.model.proof import Claim, Commit, Proof
from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalRange, WalSegment

__all__ = [
    "Claim",
    "Commit",
    "Finding",
    "Location",
    "Lsn",
    "Proof",
    "Severity",
    "Timeline",
    "TimelineHistory",
    "Verdict",
    "WalRange",
    "WalSegment",
    "worst",
]
