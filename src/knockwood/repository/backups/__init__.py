"""Base backups: taken, listed, fetched, expired.

Light on purpose: a backup's worker processes import what they need and no more.
"""
