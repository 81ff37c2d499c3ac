"""The operator's packed output, and the statistics as views of it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import LayerStatistics


def _memory_order(sizes: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """Return a dense sample's dimensions from slowest to fastest, None if it has gaps."""
    # The same search as in csrc/checks.h; comparisons only, so that symbolic sizes can be traced.
    left = list(range(len(sizes) - 1, -1, -1))
    order: list[int] = []
    expected = 1
    while left:
        found = next((d for d in left if sizes[d] == 1 or strides[d] == expected), None)
        if found is None:
            return None
        left.remove(found)
        order.insert(0, found)
        expected *= sizes[found]
    return order


class PackedStatistics(LayerStatistics):
    """``LayerStatistics`` as the operator returns them: cut up when they are read.

    A training loop that only keeps them for later pays for no view, and keeps no gradient alive.

    Attributes:
        packed: what ``torch.ops.fadiag.layer_statistics`` returned, with any leading dimensions.
        shapes: of the grads, ``batch_dims`` leading dimensions included.
        strides: of the grads; None where every sample has one dimension.
        batch_dims: leading dimensions of the grads that number samples.
        without_mean: the layers whose mean was not asked for.
    """

    __slots__ = ("batch_dims", "packed", "shapes", "strides", "without_mean")

    def __init__(
        self,
        packed: Tensor,
        shapes: tuple[Sequence[int], ...],
        strides: tuple[Sequence[int], ...] | None,
        batch_dims: int,
        without_mean: tuple[int, ...] = (),
    ) -> None:
        self.packed = packed
        self.shapes = shapes
        self.strides = strides
        self.batch_dims = batch_dims
        self.without_mean = without_mean

    def _norms_width(self) -> int:
        words = 2 if self.packed.dtype == torch.float64 else 4
        return words * len(self.shapes) * self.shapes[0][self.batch_dims - 1]

    @property
    def norms(self) -> Tensor:
        """Norms of hidden states, then of gradients, ``[2, L, B]`` float64."""
        rows = self.shapes[0][self.batch_dims - 1]
        words = self.packed.narrow(-1, 0, self._norms_width())
        try:
            both = words.view(torch.float64)
        except RuntimeError:
            # Under vmap, before torch had a batching rule for this view.
            both = torch.ops.fadiag.reinterpret_as_double.default(words)
        # As unflatten does, at a third of its time.
        norms: Tensor = both.view(*both.shape[:-1], 2, len(self.shapes), rows)
        return norms

    @property
    def hidden_norm(self) -> Tensor:
        """L2 norm of each sample's hidden state, ``[L, B]`` float64."""
        return self.norms.select(-3, 0)

    @property
    def grad_norm(self) -> Tensor:
        """L2 norm of each sample's gradient, ``[L, B]`` float64."""
        return self.norms.select(-3, 1)

    def _mean_widths(self) -> list[int]:
        widths = [math.prod(shape[self.batch_dims :]) for shape in self.shapes]
        for layer in self.without_mean:
            widths[layer] = 0
        return widths

    @property
    def grad_mean(self) -> tuple[Tensor, ...]:
        """Per layer the batch mean of the gradients, shaped like one sample.

        Of a layer whose mean was not asked for an empty tensor, ``[0]``.
        """
        widths = self._mean_widths()
        packed_means = self.packed.narrow(-1, self._norms_width(), sum(widths))
        means: tuple[Tensor, ...] = packed_means.split(widths, dim=-1)
        if self.strides is None:
            return means
        return tuple(
            mean
            if layer in self.without_mean
            else _shape_mean(mean, tuple(shape[self.batch_dims :]), strides[self.batch_dims :])
            for layer, (mean, shape, strides) in enumerate(
                zip(means, self.shapes, self.strides, strict=True)
            )
        )

    def mean_of(self, layer: int) -> Tensor:
        """Return one element of ``grad_mean``, at the cost of one view."""
        if self.strides is not None:
            return self.grad_mean[layer]
        widths = self._mean_widths()
        start = self._norms_width() + sum(widths[:layer])
        return self.packed.narrow(-1, start, widths[layer])


def _shape_mean(mean: Tensor, sizes: tuple[int, ...], strides: Sequence[int]) -> Tensor:
    """Give a mean, which lies in the memory order of the grad's samples, their shape."""
    lead = mean.shape[:-1]
    order = _memory_order(sizes, strides)
    if order is None or order == sorted(order):
        return mean.reshape((*lead, *sizes))
    inverse = [order.index(d) + len(lead) for d in range(len(order))]
    shaped = mean.reshape((*lead, *(sizes[d] for d in order)))
    return shaped.permute((*range(len(lead)), *inverse))


def without_mean_sums(means: Sequence[int] | None, layers: int) -> tuple[int, ...]:
    """Return the layers whose mean is not asked for."""
    if means is None:
        return ()
    wanted = set(means)
    unknown = [l for l in means if not 0 <= l < layers]
    if unknown:
        raise ValueError(
            f"layer_statistics: means: expected layers from 0 to {layers - 1}, got {unknown[0]}"
        )
    return tuple([l for l in range(layers) if l not in wanted])
