"""Restored clusters at an exact LSN, isolated from production."""
