"""The columns of a packed row, by name: the one place that knows where each of them begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class RowLayout(Mapping[str, slice]):
    """Name the stretches of a row that several parties write and read.

    A layout is a mapping from names to slices, in the order of the columns. What it is applied to
    is a tensor, an array or a list: a row, or rows of which the last dimension counts columns.

    Args:
        widths: columns of each name, in order; a name may have none.
        start: the first column.

    Attributes:
        start: the first column.
        stop: the column behind the last one.

    Raises:
        ValueError: a width is negative.
    """

    __slots__ = ("_slices", "start", "stop")

    def __init__(self, widths: Mapping[str, int], start: int = 0) -> None:
        self.start = start
        self._slices: dict[str, slice] = {}
        for name, width in widths.items():
            if width < 0:
                raise ValueError(f"RowLayout: {name}: expected a width of at least 0, got {width}")
            self._slices[name] = slice(start, start + width)
            start += width
        self.stop = start

    def __getitem__(self, name: str) -> slice:
        return self._slices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def __repr__(self) -> str:
        columns = ", ".join(f"{name} {s.start}:{s.stop}" for name, s in self._slices.items())
        return f"RowLayout({columns})"

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.stop - self.start

    def width_of(self, name: str) -> int:
        """Return the number of columns of a name."""
        place = self._slices[name]
        return int(place.stop - place.start)

    def place_of(self, column: int) -> tuple[str, int]:
        """Return the name that a column belongs to, and its number there.

        Raises:
            IndexError: the layout does not have the column.
        """
        for name, place in self._slices.items():
            if place.start <= column < place.stop:
                return name, column - place.start
        raise IndexError(f"{self!r}: expected one of its columns, got {column}")

    def split(self, rows: Any) -> dict[str, Any]:
        """Return the columns of each name: views, where slices of ``rows`` are."""
        if isinstance(rows, list | tuple):
            return {name: rows[place] for name, place in self._slices.items()}
        return {name: rows[..., place] for name, place in self._slices.items()}
