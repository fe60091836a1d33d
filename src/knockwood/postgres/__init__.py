"""The only door to PostgreSQL: programs, local servers, connections, catalog, pages, WAL."""
