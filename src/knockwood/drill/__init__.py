"""Outages on purpose, in a sandbox, measured against a witness."""
