"""The console that commands talk on."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from .text import for_terminal


class EscapingConsole(Console):
    """A console of rich that does not pass on what a file or a name wants of the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; texts lose their control characters, rich's own styles stay."""
        super().print(
            *(for_terminal(item) if isinstance(item, str) else item for item in objects), **options
        )
