"""Restored clusters at an exact LSN, isolated from production."""

from knockwood.clone.recovery import UnreadableError
from knockwood.clone.registry import Record, Registry
from knockwood.clone.spawn import Clone, Timings, spawn

__all__ = ["Clone", "Record", "Registry", "Timings", "UnreadableError", "spawn"]
