"""Plain-text and Markdown tables."""

import math
from collections.abc import Sequence


def number(value: float | None, digits: int = 3) -> str:
    """Format a figure in at most nine characters; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-" if value is None else "nan"
    if value != 0 and not 1e-2 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns; the last one is left as long as it is."""
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def table_cell(text: str) -> str:
    """Escape what would end a Markdown table cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(table_cell(cell) for cell in line) + " |" for line in lines]
