"""Describe where a tensor lies among bytes: what a file says of it, before it is one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class TensorPlace(NamedTuple):
    """Say where a tensor lies in a slab: `offset` in bytes, `stride` in elements."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, buffer: torch.Tensor, base: int = 0) -> torch.Tensor:
        """Return the tensor as a view of a buffer whose first byte is the slab's byte `base`."""
        whole = buffer[self.offset - base :]
        whole = whole[: len(whole) // self.dtype.itemsize * self.dtype.itemsize]
        return whole.view(self.dtype).as_strided(self.shape, self.stride)


def last_byte(offset: int, dtype: torch.dtype, shape: Iterable[int], stride: Iterable[int]) -> int:
    """Return the byte after the last one that a tensor reaches; its offset if it is empty."""
    reach = 1
    for size, step in zip(shape, stride, strict=True):
        if size == 0:
            return offset
        reach += (size - 1) * step
    return offset + reach * dtype.itemsize
