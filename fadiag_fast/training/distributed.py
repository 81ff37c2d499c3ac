"""Put the samples and directions of all ranks together, with one collective for each step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Merged(NamedTuple):
    """What all ranks saw in one step.

    Attributes:
        samples: ``[figures, W · capacity]``; NaN where a rank had fewer samples.
        counts: ``[W]``, samples of each rank.
        directions: sums over all ranks; None where their sizes differ.
    """

    samples: Tensor
    counts: Tensor
    directions: list[Tensor | None]


def default_group(group: Any) -> Any:
    """Return the process group to merge over; None where a process stands alone.

    ``group`` is the caller's: None takes all processes, False none but this one.
    """
    if group is False or not dist.is_available() or not dist.is_initialized():
        return None
    found = dist.group.WORLD if group is None else group
    return found if dist.get_world_size(found) > 1 else None


class Exchange:
    """Sum one buffer over all ranks: each writes its samples into a place of its own.

    So the samples are gathered and the directions summed by the same all-reduce. It is started when
    a step ends and waited for when the next one does.

    Args:
        group: of W ranks.
        capacity: samples that one rank may send in one step; None agrees on the largest of the
            ranks' first step, which waits for the device once. What a rank has beyond that is left
            out, with one warning: the other ranks could not know of it.
        wide: exchange in float64; else in float32.
    """

    def __init__(self, group: Any, capacity: int | None = None, wide: bool = False) -> None:
        self.group = group
        self.world = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.capacity = capacity
        self.wide = wide
        self._sizes: list[int] | None = None
        self._warned = False

    def _agree(self, samples: int, sizes: Sequence[int], device: torch.device) -> None:
        """Settle, once and waiting for the device, how large everybody's buffer is."""
        on_gpu = "nccl" in str(dist.get_backend(self.group))
        largest = torch.tensor(
            [samples, *sizes, *(-size for size in sizes)], device=device if on_gpu else "cpu"
        )
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        samples, *bounds = largest.tolist()
        if self.capacity is None:
            self.capacity = samples
        highest, lowest = bounds[: len(sizes)], [-b for b in bounds[len(sizes) :]]
        self._sizes = [a if a == b else 0 for a, b in zip(highest, lowest, strict=True)]
        if 0 in self._sizes:
            warnings.warn(
                f"StepProbe: expected directions of the same size on all ranks, got {lowest} to "
                f"{highest}: those that differ are left out; pad the batches to one length, or "
                f"compare the positions' averages with reduction='mean'",
                RuntimeWarning,
                stacklevel=5,
            )

    def start(self, samples: Tensor, directions: Sequence[Tensor | None]) -> Pending:
        """Begin to merge.

        Args:
            samples: ``[figures, N]`` of this rank.
            directions: sums over this rank's samples. One that is missing, or of another size than
                in the first step, enters as NaN: buffers of different sizes would never meet.
        """
        figures, count = samples.shape
        sizes = [0 if d is None else d.numel() for d in directions]
        if self._sizes is None:
            self._agree(count, sizes, samples.device)
        assert self._sizes is not None
        assert self.capacity is not None
        if count > self.capacity and not self._warned:
            self._warned = True
            warnings.warn(
                f"StepProbe: rank {self.rank}: expected at most {self.capacity} samples in a step, "
                f"as in the first one, got {count}: the others are left out; give max_samples=",
                RuntimeWarning,
                stacklevel=4,
            )
        kept = min(count, self.capacity)
        wide = samples.dtype == torch.float64 and self.wide
        dtype = torch.float64 if wide else torch.float32
        own = figures * self.capacity
        buffer = samples.new_zeros(self.world * (own + 1) + sum(self._sizes), dtype=dtype)
        places = buffer[: self.world * own].view(self.world, figures, self.capacity)
        mine = places[self.rank]
        mine[:, :kept] = samples[:, :kept]
        mine[:, kept:] = torch.nan
        buffer[self.world * own + self.rank].fill_(float(count))
        at = self.world * (own + 1)
        shapes: list[torch.Size | None] = []
        for direction, size in zip(directions, self._sizes, strict=True):
            place = buffer[at : at + size]
            fits = direction is not None and direction.numel() == size
            if direction is not None and fits:
                place.copy_(direction.reshape(-1))
            else:
                place.fill_(torch.nan)
            whole = direction.shape if direction is not None and fits else torch.Size([size])
            shapes.append(whole if size else None)
            at += size
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        return Pending(work, buffer, places, shapes)


class Pending:
    """A merge under way."""

    def __init__(
        self, work: Any, buffer: Tensor, places: Tensor, shapes: Sequence[torch.Size | None]
    ) -> None:
        self._work = work
        self._buffer = buffer
        self._places = places
        self._shapes = shapes

    def wait(self) -> Merged:
        """Return the result; on a GPU the stream waits for it, not the host."""
        self._work.wait()
        world, figures, capacity = self._places.shape
        at = world * figures * capacity
        counts = self._buffer[at : at + world]
        at += world
        directions: list[Tensor | None] = []
        for shape in self._shapes:
            if shape is None:
                directions.append(None)
                continue
            directions.append(self._buffer[at : at + shape.numel()].view(shape))
            at += shape.numel()
        samples = self._places.transpose(0, 1).reshape(figures, world * capacity)
        return Merged(samples.double(), counts, directions)
