"""Repairs: planned purely, shown, executed with a journal, verified."""
