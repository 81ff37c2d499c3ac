"""Warnings that point to the user's own line."""

from __future__ import annotations

import sys

# Whose frames stand between a record and the line that the user wrote.
_NOT_THE_USER = tuple(
    f"{name}."
    for name in (
        "fadiag_fast",
        "torch",
        "accelerate",
        "lightning",
        "pytorch_lightning",
        "transformers",
    )
)


def user_level() -> int:
    """Return the level of the first caller outside this package, torch and training frameworks.

    A warning with it as its ``stacklevel`` names the user's line.
    """
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_NOT_THE_USER):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    return level
