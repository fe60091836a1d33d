"""The only door to the machine: processes, files, clock, locks, privileges."""
