"""Base backups: taken, listed, fetched, expired."""
