"""Decisions about repairs: pure, with no way to the machine or to PostgreSQL."""
