"""A row's columns by name: names tile the row, in order, for whatever holds it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fadiag_fast._common.row_layout import RowLayout


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 3))
def test_the_names_tile_a_row_in_order(widths, start):
    layout = RowLayout({f"part {i}": width for i, width in enumerate(widths)}, start)
    row = list(range(start + sum(widths) + 2))
    assert [column for part in layout.split(row).values() for column in part] == row[
        start : start + sum(widths)
    ]
    assert [layout.width_of(name) for name in layout] == widths
    assert (layout.start, layout.stop, layout.width) == (start, start + sum(widths), sum(widths))
    for column in range(layout.start, layout.stop):
        name, at = layout.place_of(column)
        assert row[layout[name]][at] == column


def test_rows_are_split_along_their_last_dimension_without_a_copy():
    rows = torch.arange(12.0).reshape(2, 6)
    parts = RowLayout({"a": 2, "none": 0, "b": 4}).split(rows)
    assert parts["a"].tolist() == [[0, 1], [6, 7]]
    assert parts["none"].shape == (2, 0)
    parts["b"].zero_()
    assert rows[:, 2:].abs().sum() == 0


@pytest.mark.parametrize("column", [-1, 3])
def test_a_column_outside_is_refused(column):
    with pytest.raises(IndexError, match=rf"a 0:3.*expected one of its columns, got {column}"):
        RowLayout({"a": 3}).place_of(column)


def test_a_negative_width_is_refused():
    with pytest.raises(ValueError, match="b: expected a width of at least 0, got -1"):
        RowLayout({"a": 1, "b": -1})
