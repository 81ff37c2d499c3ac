"""Define every figure in float64 PyTorch: the meaning, the test oracle and the fallback.

The native kernels compute these figures and nothing else. Elements are read as they are stored,
widened to float64, and only the batch mean is rounded back. Norms and means hold over the whole
range of the input type; NaN and infinity stay in the sample and the column they occur in.

Source: the diagnostic protocol of "Beyond Accuracy and Alignment" (arXiv 2606.21126).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

# No sum of fewer than 2**64 float64 elements scaled by this can overflow.
_MEAN_SCALE = 2.0**-64
_LARGEST = torch.finfo(torch.float64).max


class LayerStatistics:
    """What one batch says of L layers; a stack of C networks puts ``[C]`` in front of all shapes.

    Attributes:
        hidden_norm: L2 norm of each sample's hidden state, ``[L, B]`` float64.
        grad_norm: L2 norm of each sample's gradient, ``[L, B]`` float64. Under a loss with mean
            reduction it carries the factor 1/B.
        grad_mean: per layer the mean over the batch of the raw gradients, shaped like one sample,
            float32 (float64 for float64 layers). The mean of no samples is NaN.

    It can be taken apart: ``hidden_norm, grad_norm, grad_mean = statistics``.
    """

    __slots__ = ("_figures",)

    def __init__(
        self, hidden_norm: Tensor, grad_norm: Tensor, grad_mean: tuple[Tensor, ...]
    ) -> None:
        self._figures = (hidden_norm, grad_norm, grad_mean)

    @property
    def hidden_norm(self) -> Tensor:
        return self._figures[0]

    @property
    def grad_norm(self) -> Tensor:
        return self._figures[1]

    @property
    def grad_mean(self) -> tuple[Tensor, ...]:
        return self._figures[2]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.hidden_norm, self.grad_norm, self.grad_mean))

    def __repr__(self) -> str:
        return (
            f"LayerStatistics(hidden_norm={self.hidden_norm}, grad_norm={self.grad_norm}, "
            f"grad_mean={self.grad_mean})"
        )


# vmap, torch.compile and torch.export look into containers that they know.
register_pytree_node(
    LayerStatistics,
    lambda found: (list(found), None),
    lambda figures, _: LayerStatistics(*figures),
    serialized_type_name="fadiag_fast.ops.reference.LayerStatistics",
)


def sample_norm(states: Tensor, batch_dims: int = 1) -> Tensor:
    """Return the L2 norm over all features of each sample.

    Args:
        states: ``[B, ...]``, or ``[C, B, ...]`` with ``batch_dims=2``; any floating type.
        batch_dims: leading dimensions that number samples.

    Returns:
        ``[B]`` or ``[C, B]`` float64. float64 states are scaled by their largest element first, so
        that no square leaves the range; the norm is infinite only where the true norm is.
    """
    features = math.prod(states.shape[batch_dims:])
    flat = states.reshape((*states.shape[:batch_dims], features)).double()
    if states.dtype != torch.float64 or features == 0:
        norm: Tensor = torch.linalg.vector_norm(flat, dim=-1)
        return norm
    largest = flat.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    scaled: Tensor = torch.linalg.vector_norm(flat / scale, dim=-1)
    return scaled * scale.squeeze(-1)


def batch_mean(grads: Tensor, batch_dim: int = 0) -> Tensor:
    """Return the mean over the batch of raw gradients; the mean of finite values is finite.

    Args:
        grads: ``[B, ...]``, or ``[C, B, ...]`` with ``batch_dim=1``; any floating type.
        batch_dim: the dimension to average over.

    Returns:
        The input's shape without ``batch_dim``; float64 for float64 input, else float32.
    """
    count = grads.shape[batch_dim]
    wide = grads.double()
    plain = wide.sum(batch_dim) / count
    if grads.dtype != torch.float64:
        return plain.float()
    scaled = (wide * _MEAN_SCALE).sum(batch_dim) / count
    # Rounding of the sum may put the mean of equal, largest values one unit above them.
    limit = _LARGEST * _MEAN_SCALE
    bounded = torch.where(torch.isfinite(scaled), scaled.clamp(-limit, limit), scaled)
    return torch.where(torch.isfinite(plain), plain, bounded / _MEAN_SCALE)


def layer_statistics(
    hiddens: Sequence[Tensor], grads: Sequence[Tensor], *, stacked: bool = False
) -> LayerStatistics:
    """Compute :class:`LayerStatistics` of checked input, as the operator of that name does."""
    batch_dims = 2 if stacked else 1
    return LayerStatistics(
        torch.stack([sample_norm(hidden, batch_dims) for hidden in hiddens], dim=batch_dims - 1),
        torch.stack([sample_norm(grad, batch_dims) for grad in grads], dim=batch_dims - 1),
        tuple(batch_mean(grad, batch_dims - 1) for grad in grads),
    )


class CreditStatistics(NamedTuple):
    """What one batch says of the credit vectors of L layers beside the gradients there.

    All ``[L, B]`` float64, one figure per layer and sample.

    Attributes:
        dot: ⟨a, g⟩; infinite only where the true product leaves float64.
        credit_norm: ‖a‖.
        grad_norm: ‖g‖.
        cosine: ⟨a, g⟩ / (max(‖a‖, 1e-30)·max(‖g‖, 1e-30)); 0 where either vector is zero, NaN
            where either is not finite. There is no other clamp.
    """

    dot: Tensor
    credit_norm: Tensor
    grad_norm: Tensor
    cosine: Tensor


# Below this norm a vector counts as gone: the protocol's floor, in place of an epsilon of the
# product's size, which would make two equal vectors of norm 1e-9 look unrelated.
NORM_FLOOR = 1e-30


def sample_products(credit: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ⟨a, g⟩, ‖a‖, ‖g‖ and their cosine for each sample, ``[B]`` float64 each.

    Args:
        credit: ``[B, ...]``, any floating type.
        grad: of the same shape, any floating type.

    Both are scaled by powers of two, which rounds nothing, so that no product leaves the range.
    """

    def scaled(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = states.reshape(states.shape[0], math.prod(states.shape[1:])).double()
        if wide.shape[1] == 0:
            return wide, wide.new_ones(len(wide)), wide.new_zeros(len(wide))
        largest = wide.abs().amax(dim=1)
        usable = torch.isfinite(largest) & (largest > 0)
        _, exponent = torch.frexp(torch.where(usable, largest, 1.0))
        scale = torch.ldexp(torch.ones_like(largest), exponent - 1)
        wide = wide / scale[:, None]
        return wide, scale, torch.linalg.vector_norm(wide, dim=1)

    def floored(scale: Tensor, norm: Tensor) -> Tensor:
        """Return what turns the scaled vector into one divided by its floored norm."""
        return torch.where(norm * scale < NORM_FLOOR, scale / NORM_FLOOR, 1 / norm)

    a, a_scale, a_norm = scaled(credit)
    g, g_scale, g_norm = scaled(grad)
    product = (a * g).sum(dim=1)
    cosine = product * floored(a_scale, a_norm) * floored(g_scale, g_norm)
    finite = torch.isfinite(a_norm) & torch.isfinite(g_norm)
    cosine = torch.where(finite, cosine.clamp(-1.0, 1.0), torch.nan)
    # The larger scale last: the other order could underflow on the way to a product in range.
    low, high = torch.minimum(a_scale, g_scale), torch.maximum(a_scale, g_scale)
    return product * low * high, a_norm * a_scale, g_norm * g_scale, cosine


def credit_statistics(credits: Sequence[Tensor], grads: Sequence[Tensor]) -> CreditStatistics:
    """Compute :class:`CreditStatistics` of L ≥ 1 pairs ``[B, ...]`` of equal shapes."""
    columns = zip(*map(sample_products, credits, grads), strict=True)
    return CreditStatistics(*(torch.stack(column) for column in columns))


def cosine_matrix(directions: Tensor) -> Tensor:
    """Return the cosines between the rows of a matrix.

    Args:
        directions: ``[..., K, D]``, any floating type.

    Returns:
        ``[..., K, K]`` float64 in [-1, 1], exactly 1 on the diagonal. A zero or non-finite row has
        no direction: its cosines are NaN. Nothing is clamped to an epsilon.
    """
    wide = directions.double()
    if directions.shape[-1] > 0:
        # Scaled first: the norm of a float64 direction can leave the range, the direction cannot.
        largest = wide.abs().amax(dim=-1, keepdim=True)
        wide = wide / torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    units = wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # One triangle serves both sides: a matrix product need not be symmetric to the last bit.
    upper = torch.triu((units @ units.transpose(-1, -2)).clamp(-1.0, 1.0), diagonal=1)
    own = torch.where(units.isfinite().all(-1), 1.0, torch.nan).double()
    if directions.shape[-1] == 0:
        own = torch.full_like(own, torch.nan)
    return upper + upper.transpose(-1, -2) + torch.diag_embed(own)


def direction_cosines(grad_means: Sequence[Sequence[Tensor]], *, stacked: bool = False) -> Tensor:
    """Compute cosines of checked input, as the operator of that name does."""
    sample_dim = 1 if stacked else 0
    matrices = []
    for layer in zip(*grad_means, strict=True):
        rows = [row.reshape((*row.shape[:sample_dim], -1)) for row in layer]
        matrices.append(cosine_matrix(torch.stack(rows, dim=sample_dim)))
    return torch.stack(matrices, dim=sample_dim)


def step_row(
    norms: Tensor,
    directions: Sequence[Tensor],
    kept: Sequence[Tensor],
    rows: Tensor,
    places: Tensor,
    *,
    decay: float,
    extras: Sequence[Tensor] = (),
) -> None:
    """Write the row of a training step; see :func:`fadiag_fast.ops.step_row`."""
    states = norms.shape[1]
    flat = norms.flatten(0, 1)
    values = torch.cat([flat, flat[states:-1] / flat[-1]])
    if values.shape[1]:
        parts = [torch.nanmedian(values, dim=1).values]
    else:
        parts = [values.new_full((len(values),), torch.nan)]
    for direction, held in zip(directions, kept, strict=True):
        cosines = direction_cosines([[direction], *([one] for one in held.unbind(0))])[0, 0]
        parts.append(cosines[1:])
        average = held[-1]
        average.lerp_(torch.where(cosines[0] == 1, direction, average), 1.0 - decay)
        held.index_copy_(0, places[1:2], direction[None])
    row = torch.cat([*parts, *extras])
    rows[:, : len(row)].index_copy_(0, places[:1], row[None])
    places[:1].add_(1).remainder_(len(rows))
    if kept:
        places[1:2].add_(1).remainder_(len(kept[0]) - 1)
