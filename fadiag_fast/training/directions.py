"""Compare the batch-mean gradient of a step with those of the steps before it.

A direction is kept whole, or as a count sketch of fixed width: a linear map, so that sums over
micro-batches and ranks may be taken before or after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
        sketch: width of a :class:`CountSketch`; None keeps directions whole. One that is not longer
            than the sketch would be stays whole.

    Attributes:
        kept: per layer the K past directions and the average, ``[K + 1, D]``.

    Memory: K + 1 vectors for each layer, in float32 (float64 for float64 states).
    """

    def __init__(self, num_layers: int, window: int, sketch: int | None) -> None:
        self.num_layers = num_layers
        self.window = window
        self.sketch = sketch
        self.kept: list[Tensor] = []
        self._kept_like: tuple[object, ...] = ()
        self._sketches: dict[tuple[int, torch.device], CountSketch] = {}
        self.starts = 0  # how often the kept directions were put into other memory

    @property
    def width(self) -> int:
        """How many cosines one layer yields: K, then that with the average."""
        return self.window + 1

    def _sketched(self, direction: Tensor) -> Tensor:
        flat = direction if direction.dim() == 1 else direction.reshape(-1)
        if self.sketch is None or len(flat) <= self.sketch:
            return flat
        key = (len(flat), flat.device)
        if key not in self._sketches:
            self._sketches[key] = CountSketch(len(flat), self.sketch, flat.device)
        return self._sketches[key](flat)

    def take(self, means: Sequence[Tensor | None], captured: bool = False) -> list[Tensor] | None:
        """Return the directions of a step, for :func:`fadiag_fast.ops.step_row` with ``kept``.

        Args:
            means: the layers' batch-mean (or batch-sum) gradients, of any shape; None for one
                that did not arrive.
            captured: the call is being captured into a CUDA graph.

        Returns:
            ``[D]`` each, NaN for one that did not arrive; None where nothing is to be compared.
            States of another shape, dtype or device begin anew.
        """
        there = [mean for mean in means if mean is not None]
        if len(there) < len(means) and (not self.kept or not there):
            return None
        directions = [
            self.kept[l].new_full((self.kept[l].shape[1],), torch.nan)
            if mean is None
            else self._sketched(mean)
            for l, mean in enumerate(means)
        ]
        if len({d.dtype for d in directions}) > 1:
            directions = [d.double() for d in directions]
        like = tuple([(d.shape, d.dtype, d.device) for d in directions])
        if like != self._kept_like:
            if captured:
                raise RuntimeError(
                    "StepProbe: expected a step outside of the CUDA graph first, with states of "
                    "the same shapes; run one before capturing"
                )
            self.starts += 1
            self.kept = [d.new_zeros((self.window + 1, len(d))) for d in directions]
            self._kept_like = like
        return directions
