"""Check plain arguments: what was expected, what came, what to do."""

from __future__ import annotations

from numbers import Real

from torch import Tensor


def describe(value: object) -> str:
    """Return what a value is, in a few words: a tensor's dtype and shape, else the type's name."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str | int | float | bool | None):
        return "None" if value is None else f"{type(value).__name__} {value!r}"
    return type(value).__name__


def check_fraction(name: str, value: object, caller: str) -> None:
    """Raise for what is neither None nor a fraction."""
    if value is None:
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(
            f"{caller}: {name}: expected a fraction from 0 to 1, got {describe(value)}"
            + ("; take its .item()" if isinstance(value, Tensor) else "")
        )
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{caller}: {name}: expected a fraction from 0 to 1, got {value}")


def check_count(name: str, value: object, caller: str, unit: str = "") -> None:
    """Raise for what is neither None nor a whole number of at least 1."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name}: expected a whole number, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{caller}: {name}: expected at least 1{unit}, got {value}")
