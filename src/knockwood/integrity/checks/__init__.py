"""One file per check; each holds `CHECK`, and the registry finds it there."""
