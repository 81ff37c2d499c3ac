"""What a hostile pickle that is run leaves behind inside the process."""

from __future__ import annotations

from typing import Any

MARKS: list[str] = []


class Mark:
    """Say of every way in which a pickle may use a class that it was used."""

    def __new__(cls, *arguments: Any, **named: Any) -> Mark:
        MARKS.append("made")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        MARKS.append("given a state")

    def __setitem__(self, key: Any, value: Any) -> None:
        MARKS.append("given an item")

    def append(self, value: Any) -> None:
        MARKS.append("given an element")

    @staticmethod
    def leave() -> None:
        MARKS.append("called")
