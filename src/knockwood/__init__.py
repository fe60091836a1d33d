"""Knockwood makes PostgreSQL outages caused by damaged data short, explained and lossless."""
