"""Plain tables that are Markdown too."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; raises ValueError for a row of another length."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(header)}: {list(row)}")
    lines = [[_cell(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in lines)) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    printed = [lines[0], rule, *lines[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in printed
    )


def _cell(text: str) -> str:
    # A line break or a bar would end the cell.
    return " ".join(text.split()).replace("|", "\\|")


def clipped(text: str, width: int) -> str:
    """The text, or its beginning with an ellipsis."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
