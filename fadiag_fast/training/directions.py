"""Compare the batch-mean gradient of a step with those of the steps before it.

A direction is kept whole, or as a count sketch of fixed width: a linear map, so that sums over
micro-batches and ranks may be taken before or after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops

_SEED = 0x5EED


class CountSketch:
    """Map vectors of D numbers to ``width``, so that inner products stay the same on average.

    A seeded permutation deals the D numbers evenly to the buckets, a seeded sign goes with each,
    and a bucket holds the sum of what it was dealt. For two unit vectors with cosine c the sketch's
    inner product is unbiased, and its standard error at most √((1 + c²) / width): 1/√width near
    zero, and √(2 / width) at worst. Unlike a bucket drawn for each number, a permutation makes it a
    sum along a dimension, which is the same on every run on any device.

    Args:
        size: D.
        width: of the sketch.
        device: of the vectors.

    Memory: 5 bytes for each of the D numbers, kept once for all layers of that size.
    """

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        drawn = torch.Generator().manual_seed(_SEED + size)
        self.depth = -(-size // width)
        self.width = width
        order = torch.randperm(size, generator=drawn).to(torch.int32)
        signs = torch.randint(0, 2, (size,), generator=drawn, dtype=torch.int8) * 2 - 1
        self.order, self.signs = order.to(device), signs.to(device)

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the sketch ``[width]`` of a vector ``[D]``, in its dtype."""
        dealt = vector.index_select(0, self.order) * self.signs
        missing = self.depth * self.width - len(dealt)
        padded = torch.nn.functional.pad(dealt, (0, missing))
        return padded.view(self.depth, self.width).sum(0)


class Directions:
    """The last K directions of some layers and their exponential average, on the device.

    Args:
        num_layers: whose directions are kept.
        window: K.
        decay: of the exponential average: a step enters with the weight 1 − decay.
        sketch: width of a :class:`CountSketch`; None keeps directions whole. One that is not longer
            than the sketch would be stays whole.

    Memory: K + 1 vectors for each layer, in float32 (float64 for float64 states).
    """

    def __init__(self, num_layers: int, window: int, decay: float, sketch: int | None) -> None:
        self.num_layers = num_layers
        self.window = window
        self.decay = decay
        self.sketch = sketch
        self._past_of: list[Tensor] = []  # K rows for each layer
        self._kept: list[list[Tensor]] = []  # the same by row, then the averages
        self._average: list[Tensor] = []
        self._kept_like: tuple[object, ...] = ()
        self._sketches: dict[tuple[int, torch.device], CountSketch] = {}
        self._next = 0
        self._device_next: Tensor | None = None
        self.starts = 0  # how often the kept directions were put into other memory

    @property
    def width(self) -> int:
        """How many cosines one layer yields: K, then that with the average."""
        return self.window + 1

    @property
    def bytes(self) -> int:
        """How much memory the kept directions take."""
        return sum(t.nbytes for t in (*self._past_of, *self._average))

    def _sketched(self, direction: Tensor) -> Tensor:
        flat = direction if direction.dim() == 1 else direction.reshape(-1)
        if self.sketch is None or len(flat) <= self.sketch:
            return flat
        key = (len(flat), flat.device)
        if key not in self._sketches:
            self._sketches[key] = CountSketch(len(flat), self.sketch, flat.device)
        return self._sketches[key](flat)

    def _start(self, directions: Sequence[Tensor]) -> None:
        self.starts += 1
        self._past_of = [d.new_zeros((self.window, len(d))) for d in directions]
        self._average = [torch.zeros_like(d) for d in directions]
        rows = zip(*(past.unbind(0) for past in self._past_of), strict=True)
        self._kept = [*map(list, rows), self._average]
        self._next = 0
        self._device_next = torch.zeros(1, dtype=torch.int64, device=directions[0].device)

    def compare(self, means: Sequence[Tensor | None], captured: bool = False) -> Tensor | None:
        """Return cosines with what is kept, and keep these directions too.

        Args:
            means: the layers' batch-mean (or batch-sum) gradients, of any shape; None for one
                that did not arrive.
            captured: the call is being captured into a CUDA graph.

        Returns:
            ``[layers, K + 1]`` float64: with each of the last K, in no order, then with the
            average. NaN where either is not there, zero or not finite; None where nothing is.
            States of another shape, dtype or device begin anew.
        """
        present_means = [mean for mean in means if mean is not None]
        if len(present_means) < len(means) and (not self._average or not present_means):
            return None
        directions = [
            torch.full_like(self._average[l], torch.nan) if mean is None else self._sketched(mean)
            for l, mean in enumerate(means)
        ]
        like = tuple([(d.shape, d.dtype, d.device) for d in directions])
        if like != self._kept_like:
            if captured:
                raise RuntimeError(
                    "StepProbe: expected a step outside of the CUDA graph first, with states of "
                    "the same shapes; run one before capturing"
                )
            self._start(directions)
            self._kept_like = like
        batches = [directions, *self._kept]
        # One call may serve all layers of one dtype; others need one each.
        if len(directions) == 1 or len({d.dtype for d in directions}) == 1:
            cosines = ops.direction_cosines(batches)
        else:
            cosines = torch.cat(
                [
                    ops.direction_cosines([[batch[l]] for batch in batches])
                    for l in range(self.num_layers)
                ]
            )
        cosines = cosines.select(1, 0)
        # A direction that is not there must not spoil the average for ever.
        present = (cosines[:, :1] == 1).unbind(0)
        entering = list(map(torch.where, present, directions, self._average))
        torch._foreach_lerp_(self._average, entering, 1.0 - self.decay)
        self._keep(directions, captured)
        return cosines[:, 1:]

    def replayed(self) -> None:
        """Note that a direction was kept, here or by a graph: this goes on where that ended."""
        self._next = (self._next + 1) % self.window

    def _keep(self, directions: list[Tensor], captured: bool) -> None:
        if not captured:
            torch._foreach_copy_(self._kept[self._next], directions)
            self.replayed()
            # A graph goes on where this ends.
            if self._device_next is not None and self._device_next.is_cuda:
                self._device_next.fill_(self._next)
            return
        # In a graph the place must be read on the device: the host is not there when it replays.
        place = self._device_next
        assert place is not None
        for past_of, direction in zip(self._past_of, directions, strict=True):
            past_of.index_copy_(0, place, direction[None])
        place.add_(1).remainder_(self.window)
