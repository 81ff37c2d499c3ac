"""Make tensors of the bytes that their places name, and read no others."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .places import TensorPlace, last_byte


class Gathered:
    """Tensors with memory of their own; what overlaps in the file shares memory.

    Args:
        places: of the tensors.
        fill: is given a byte's number and a view, which it fills from there on.
        device: where the tensors go. Without data, nothing is read.
    """

    def __init__(
        self,
        places: Iterable[TensorPlace],
        fill: Callable[[int, memoryview], None],
        device: torch.device,
    ) -> None:
        self._device = device
        self._starts: list[int] = []
        self._parts: list[Tensor] = []
        spans = ((place.offset, last_byte(*place)) for place in set(places))
        stop = -1
        merged: list[list[int]] = []
        for first, last in sorted(span for span in spans if span[1] > span[0]):
            if merged and first < stop:
                merged[-1][1] = stop = max(stop, last)
            else:
                merged.append([first, last])
                stop = last
        for first, last in merged:
            if device.type == "meta":
                part = torch.empty(last - first, dtype=torch.uint8, device=device)
            else:
                part = torch.empty(last - first, dtype=torch.uint8)
                fill(first, part.numpy().data)
                part = part.to(device)
            self._starts.append(first)
            self._parts.append(part)

    def __call__(self, place: TensorPlace) -> Tensor:
        """Return the tensor of a place."""
        if last_byte(*place) == place.offset:
            return torch.empty_strided(
                place.shape, place.stride, dtype=place.dtype, device=self._device
            )
        index = bisect_right(self._starts, place.offset) - 1
        part, start = self._parts[index], self._starts[index]
        if (place.offset - start) % place.dtype.itemsize:
            # Only where tensors of different dtypes overlap.
            part = part[place.offset - start : last_byte(*place) - start].clone()
            start = place.offset
        return place.view(part, start)
