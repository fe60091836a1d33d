"""One rule for each kind of damage: from findings to the repairs that could be done."""
