"""Base backups and the WAL archive: take, receive, fetch, verify, expire."""
