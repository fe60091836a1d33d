"""Queries kept in a `.sql` file beside the module that runs them, under names."""

from __future__ import annotations

import re
from pathlib import Path


def sql(module_file: str) -> dict[str, bytes]:
    """The queries of the `.sql` file beside a module; each begins with a line `-- name: NAME`."""
    text = Path(module_file).with_suffix(".sql").read_text()
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return {name: body.strip().encode() for name, body in zip(parts[1::2], parts[2::2], strict=True)}
