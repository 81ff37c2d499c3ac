"""JSON of numbers that need not be finite: one dialect for all files, lines and pages.

JSON has no NaN and no infinities. They are written as the strings ``"NaN"``, ``"Infinity"`` and
``"-Infinity"``, which ``float`` of Python, ``Number`` of JavaScript and ``pandas.to_numeric`` read;
``null`` means that there is no value. Earlier versions wrote ``"nan"``, ``"inf"`` and ``"-inf"``,
and step records null for NaN: readers take these as well.
"""

from __future__ import annotations

import math
from typing import Any

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def strict(value: Any) -> Any:
    """Return a value in which numbers that are not finite stand by name; tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def plain(value: Any) -> Any:
    """Undo :func:`strict` where every string of these names is a number."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def number(value: Any) -> Any:
    """Return a number as it was before it was written, by this version or an earlier one.

    Raises:
        ValueError: a string that names no number.
    """
    if value is None:
        return math.nan
    if not isinstance(value, str):
        return value
    return _NOT_FINITE[value] if value in _NOT_FINITE else float(value)
