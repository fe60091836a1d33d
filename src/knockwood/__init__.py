"""Knockwood makes PostgreSQL outages caused by damaged data short, explained and lossless."""

__version__ = "0.1.0"
