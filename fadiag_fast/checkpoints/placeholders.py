"""Stand for what is not loaded beside the weights: values of classes that are not looked for."""

from __future__ import annotations

from typing import Any

from .errors import printable
from .restricted_pickle import Shell, Unknown


class NotLoaded:
    """Stand for an object, a class or a function that a file names, and that was not loaded.

    Attributes:
        name: of the class or function, with its module.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{printable(self.name)}, not loaded>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NotLoaded) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


def is_opaque(value: Any) -> bool:
    """Return whether a pickle made something of unknown classes or functions here."""
    return type(value) in (Shell, Unknown, NotLoaded)


def shown(value: Any) -> Any:
    """Return what stands for a value beside the weights: itself, unless it is opaque."""
    return NotLoaded(value.name) if type(value) in (Shell, Unknown) else value
