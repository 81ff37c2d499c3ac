"""Say where a file's tensors lie in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .content import state_signature

# The boundary at which slabs begin and parts of them are put: a cache line, and what torch.save
# aligns storages to. No dtype and no vector instruction wants more.
ALIGNMENT = 64


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


class Move(NamedTuple):
    """Say which bytes to copy to where their dtype may be read."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Describe a file's tensors, as far as files of one study have it in common.

    Attributes:
        places: where each tensor lies, in the state dict's order.
        moves: what to copy first, because it does not lie where its dtype can be read.
        start: a multiple of the alignment, at or before the first byte of any tensor.
        stop: the byte after the last of any tensor.
        needed: bytes of slab.
        signature: as state_signature gives it.
    """

    places: Mapping[str, TensorPlace]
    moves: tuple[Move, ...]
    start: int
    stop: int
    needed: int
    signature: str


class Found(NamedTuple):
    """Hold what a file is, as Checkpoint and SlabCheckpoint say it, and where its tensors are."""

    format: str
    layout: Layout
    container: str
    removed_prefix: str
    extra: dict[str, Any]


def last_byte(offset: int, dtype: torch.dtype, shape: Iterable[int], stride: Iterable[int]) -> int:
    """Return the byte after the last one that a tensor reaches; its offset if it is empty."""
    reach = 1
    for size, step in zip(shape, stride, strict=True):
        if size == 0:
            return offset
        reach += (size - 1) * step
    return offset + reach * dtype.itemsize


def aligned(offset: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def make_layout(places: Mapping[str, TensorPlace], file_stop: int) -> Layout:
    """Put what is misaligned behind the file, and sum up."""
    moved: dict[tuple[int, int], Move] = {}
    final: dict[str, TensorPlace] = {}
    end = file_stop
    for name, place in places.items():
        stop = last_byte(*place)
        if place.offset % place.dtype.itemsize and stop > place.offset:
            span = (place.offset, stop)
            if span not in moved:
                target = aligned(end)
                moved[span] = Move(place.offset, target, stop - place.offset)
                end = target + stop - place.offset
            place = place._replace(offset=moved[span].target)
        elif stop == place.offset:
            place = place._replace(offset=0)  # no bytes, so that any place will do
        final[name] = place
    spans = [(p.offset, last_byte(*p)) for p in final.values() if last_byte(*p) > p.offset]
    # On the alignment, so that a copy from there on keeps every tensor's.
    start = min((first for first, _ in spans), default=0) // ALIGNMENT * ALIGNMENT
    stop = max((last for _, last in spans), default=0)
    return Layout(final, tuple(moved.values()), start, stop, end, state_signature(final))


def without_data(value: Any) -> Any:
    """Replace the tensors in nested containers by tensors on the meta device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("meta") if value.layout == torch.strided else None
    if isinstance(value, dict):
        return {key: without_data(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_data(item) for item in value)
    return value
