"""The checks, one file each: what is read becomes findings."""
