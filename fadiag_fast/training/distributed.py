"""Put the samples and directions of all ranks together, with one collective for each step.

Ranks of data parallelism have samples of their own; the T ranks of tensor parallelism that hold one
copy of the model have parts of the same samples' states (:mod:`.sharded`). Both go through the same
all-reduce: every rank writes the norms of its parts into a place of its own, and whoever reads them
takes the root of the sum of squares over the T places of a sample. The squares themselves, which
the all-reduce could sum, would leave the range of float32, and float64 would double the directions.
Parts of a direction are written beside each other, so that each rank has it whole and its cosines
need no collective more; the order of its numbers does not change them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference import sample_norm
from .sharded import TensorRanks


class Merged(NamedTuple):
    """What all ranks saw in one step, the W ranks holding W / T copies of the model.

    Attributes:
        samples: ``[figures, W / T · capacity]``; NaN where a rank had fewer samples.
        counts: ``[W / T]``, samples of each copy.
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


class Share:
    """Whose figures a rank's records are, and so which rank writes them into a file.

    Ranks that share figures have the same records. The first rank of the group writes them; where
    ranks hold different layers, as pipeline stages do, the first rank of each kind.

    Args:
        group: as the probe has it.
        judged: whether alarms judge the records and are written beside them.

    Attributes:
        leads: whether this rank is the first of those that hold the same layers.
    """

    def __init__(self, group: Any = None, judged: bool = False) -> None:
        self.judged = judged
        self._group = group
        self._rank: int | None = None  # None while torch.distributed is not initialised
        self._main = True
        self.leads = False

    def look(self) -> None:
        """Find out this process's place: the group may be gone when the last record is written."""
        if self._rank is None and dist.is_available() and dist.is_initialized():
            self._rank = dist.get_rank()
            group = None if self._group is False else self._group
            self._main = dist.get_rank(group) <= 0

    def file(self, path: Path, every_rank: bool = False) -> Path | None:
        """Return where this rank writes; None for nowhere."""
        self.look()
        if self._main:
            return path
        if self.leads or every_rank:
            return path.with_name(f"{path.stem}.rank{self._rank}{path.suffix}")
        return None


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
        tensor_ranks: those that hold one copy of the model with this one; None for it alone.
    """

    def __init__(
        self,
        group: Any,
        capacity: int | None = None,
        wide: bool = False,
        tensor_ranks: TensorRanks | None = None,
    ) -> None:
        self.group = group
        self.world = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.capacity = capacity
        self.wide = wide
        self._first = dist.get_rank() if tensor_ranks is None else tensor_ranks.ranks[0]
        self._part = 0 if tensor_ranks is None else tensor_ranks.index
        self._parts = 1 if tensor_ranks is None else tensor_ranks.size
        self._place = self.rank
        self._sizes: list[list[int]] | None = None  # per direction, of each part
        self._warned = False

    def _agree(self, samples: int, sizes: Sequence[int], device: torch.device) -> None:
        """Settle, once and waiting for the device, how large everybody's buffer is."""
        on_gpu = "nccl" in str(dist.get_backend(self.group))
        layers, parts, world = len(sizes), self._parts, self.world
        own = torch.full((1 + world + 2 * parts * layers,), -(2**62), dtype=torch.int64)
        own[0] = samples
        own[1 + self.rank] = self._first
        bounds = own[1 + world :].view(2, parts, layers)
        bounds[:, self._part] = torch.tensor([sizes, [-size for size in sizes]])
        agreed = own.to(device if on_gpu else "cpu")
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.group)
        agreed = agreed.cpu()
        if self.capacity is None:
            self.capacity = int(agreed[0])
        first = agreed[1 : 1 + world].tolist()
        copies = sorted(set(first))
        if any(first.count(copy) != parts for copy in copies):
            raise ValueError(
                f"StepProbe: group: expected all {parts} ranks of each copy of the model, got a "
                f"group of {world} ranks with {[first.count(copy) for copy in copies]} of them; "
                f"give one that holds whole copies"
            )
        self._place = copies.index(self._first) * parts + self._part
        highest, lowest = agreed[1 + world :].view(2, parts, layers).tolist()
        lowest = [[-size for size in row] for row in lowest]
        self._sizes = [
            [row[l] for row in highest]
            if [row[l] for row in highest] == [row[l] for row in lowest]
            else []
            for l in range(layers)
        ]
        if not all(map(sum, self._sizes)):
            warnings.warn(
                f"StepProbe: expected directions of the same size on all ranks, got "
                f"{_flat(lowest)} to {_flat(highest)}: those that differ are left out; pad the "
                f"batches to one length, or compare the positions' averages with reduction='mean'",
                RuntimeWarning,
                stacklevel=5,
            )

    def start(self, samples: Tensor, directions: Sequence[Tensor | None]) -> Pending:
        """Begin to merge.

        Args:
            samples: ``[figures, N]`` of this rank: norms where it has parts, and zeros where
                another rank counts a state that both have whole.
            directions: sums over this rank's samples, empty where another rank counts them. One
                that is missing, or of another size than in the first step, enters as NaN: buffers
                of different sizes would never meet.

        Raises:
            ValueError: the group has a part of a copy of the model only.
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
        summed = sum(map(sum, self._sizes))
        buffer = samples.new_zeros(self.world * (own + 1) + summed, dtype=dtype)
        places = buffer[: self.world * own].view(self.world, figures, self.capacity)
        mine = places[self._place]
        mine[:, :kept] = samples[:, :kept]
        mine[:, kept:] = torch.nan
        buffer[self.world * own + self._place].fill_(float(count))
        at = self.world * (own + 1)
        shapes: list[torch.Size | None] = []
        for direction, parts in zip(directions, self._sizes, strict=True):
            size = parts[self._part] if parts else 0
            begin = at + sum(parts[: self._part])
            place = buffer[begin : begin + size]
            fits = direction is not None and direction.numel() == size
            if direction is not None and fits:
                place.copy_(direction.reshape(-1))
            else:
                place.fill_(torch.nan)
            total = sum(parts)
            whole = direction.shape if direction is not None and fits and size == total else None
            shapes.append((whole or torch.Size([total])) if total else None)
            at += total
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        return Pending(work, buffer, places, self._parts, shapes)


def _flat(sizes: list[list[int]]) -> list[int]:
    """Return the sizes of the directions of all parts; of one part, those of the layers."""
    return [size for row in sizes for size in row]


class Pending:
    """A merge under way."""

    def __init__(
        self,
        work: Any,
        buffer: Tensor,
        places: Tensor,
        parts: int,
        shapes: Sequence[torch.Size | None],
    ) -> None:
        self._work = work
        self._buffer = buffer
        self._places = places
        self._parts = parts
        self._shapes = shapes

    def wait(self) -> Merged:
        """Return the result; on a GPU the stream waits for it, not the host."""
        self._work.wait()
        world, figures, capacity = self._places.shape
        at = world * figures * capacity
        counts = self._buffer[at : at + world : self._parts]
        at += world
        directions: list[Tensor | None] = []
        for shape in self._shapes:
            if shape is None:
                directions.append(None)
                continue
            directions.append(self._buffer[at : at + shape.numel()].view(shape))
            at += shape.numel()
        samples = self._places.double()
        if self._parts > 1:
            of_copy = samples.view(-1, self._parts, figures * capacity)
            samples = sample_norm(of_copy.transpose(1, 2), batch_dims=2)
        samples = samples.view(-1, figures, capacity).transpose(0, 1).reshape(figures, -1)
        return Merged(samples, counts, directions)
