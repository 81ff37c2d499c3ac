"""The operators as functions: checked, dispatched to a kernel or to the reference."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from . import reference
from . import validation as checks
from .native import Backend, is_native
from .packed import PackedStatistics, without_mean_sums
from .prepared import is_plain, note_call, recent
from .reference import LayerStatistics
from .registration import cosines_op, statistics_op, step_row_op

# vmap, torch.compile and torch.export look into containers that they know.
register_pytree_node(
    PackedStatistics,
    lambda found: (
        [found.packed],
        (found.shapes, found.strides, found.batch_dims, found.without_mean),
    ),
    lambda packed, context: PackedStatistics(next(iter(packed)), *context),
    serialized_type_name="fadiag_fast.ops.PackedStatistics",
)


def layer_statistics(
    hiddens: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    stacked: bool = False,
    means: Sequence[int] | None = None,
    backend: Backend | None = None,
) -> LayerStatistics:
    """Compute per-sample norms and batch-mean gradients of all layers in one pass.

    Args:
        hiddens: L tensors ``[B, ...]``, one per layer, of any width; float16, bfloat16, float32 or
            float64; any strides. With ``stacked=True``: ``[C, B, ...]``, C networks at once.
        grads: the gradients of the loss with respect to ``hiddens``, of equal shape, dtype and
            device in pairs. Under a mean-reduced loss they carry the factor 1/B, and so do the
            figures made from them.
        stacked: whether a stack dimension stands before the batch.
        means: numbers of the layers whose mean gradient is wanted; None for all. Of the others it
            is neither computed nor stored, which few samples of many features gain by.
        backend: ``"native"`` or ``"torch"`` to force one.

    Returns:
        :class:`LayerStatistics`: ``hidden_norm`` and ``grad_norm``, ``[L, B]`` float64, and
        ``grad_mean``, a tuple of one tensor per layer, shaped like a sample, or ``[0]`` where it
        was not wanted. None of them is differentiable.

    Raises:
        TypeError: no list of tensors, a tensor of no floating type, or a pair that differs in
            dtype.
        ValueError: the list is empty, layers differ in samples, shape or device, or ``means`` names
            a layer that is not there.
        RuntimeError: ``backend="native"`` and there is no kernel for the device.

    Source: protocol of arXiv 2606.21126, diagnostics (a), (b) and (c).

    >>> import torch
    >>> h = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    >>> g = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> statistics = layer_statistics([h], [g])
    >>> statistics.hidden_norm
    tensor([[5., 2.]], dtype=torch.float64)
    >>> statistics.grad_mean[0]
    tensor([0.5000, 0.5000])
    """
    if type(hiddens) is not list or type(grads) is not list:
        checks.check_lists("layer_statistics", hiddens=hiddens, grads=grads)
    if (
        len(hiddens) == 0
        or not isinstance(hiddens[0], Tensor)
        or not is_native(hiddens[0].device.type, backend)
    ):
        checks.check_statistics_input(hiddens, grads, stacked)
        without_mean = without_mean_sums(means, len(hiddens))
        with torch.no_grad():
            found = reference.layer_statistics(hiddens, grads, stacked=stacked)
        return found if means is None else _less(found, without_mean)
    if is_plain():
        key = None if means is None else tuple(means)
        for prepared in recent:
            if prepared.stacked == stacked and prepared.means == key:
                ready = prepared.offer(hiddens, grads)
                if ready is not None:
                    return ready
    return _layer_statistics(hiddens, grads, stacked, means, backend)


def _layer_statistics(
    hiddens: Sequence[Tensor],
    grads: Sequence[Tensor],
    stacked: bool,
    means: Sequence[int] | None,
    backend: Backend | None,
) -> LayerStatistics:
    """Call the operator; prepare for tensors like these where they came the second time."""
    without_mean = without_mean_sums(means, len(hiddens))
    try:
        packed = statistics_op(hiddens, grads, stacked, without_mean)
    except (RuntimeError, TypeError, NotImplementedError):
        checks.check_statistics_input(hiddens, grads, stacked)
        if len({hidden.dtype == torch.float64 for hidden in hiddens}) == 2:
            return _statistics_by_width(hiddens, grads, stacked, means, backend)
        raise
    batch_dims = 2 if stacked else 1
    shapes = tuple([grad.shape for grad in grads])
    strides = None
    if set(map(len, shapes)) != {batch_dims + 1}:
        strides = tuple([grad.stride() for grad in grads])
    if is_plain():
        note_call(hiddens, grads, stacked, means)
    return PackedStatistics(packed, shapes, strides, batch_dims, without_mean)


def _less(found: LayerStatistics, without_mean: Sequence[int]) -> LayerStatistics:
    means = list(found.grad_mean)
    for layer in without_mean:
        means[layer] = means[layer].new_empty(0)
    return LayerStatistics(found.hidden_norm, found.grad_norm, tuple(means))


def _statistics_by_width(
    hiddens: Sequence[Tensor],
    grads: Sequence[Tensor],
    stacked: bool,
    means: Sequence[int] | None,
    backend: Backend | None,
) -> LayerStatistics:
    """Serve float64 layers beside narrower ones: their packed means differ in type."""
    layer_dim = 1 if stacked else 0
    hidden_norm: list[Tensor] = [hiddens[0]] * len(hiddens)
    grad_norm = list(hidden_norm)
    grad_mean = list(hidden_norm)
    for wide in (False, True):
        layers = [l for l, hidden in enumerate(hiddens) if (hidden.dtype == torch.float64) == wide]
        part = layer_statistics(
            [hiddens[l] for l in layers],
            [grads[l] for l in layers],
            stacked=stacked,
            means=None if means is None else [layers.index(l) for l in means if l in layers],
            backend=backend,
        )
        for position, l in enumerate(layers):
            hidden_norm[l] = part.hidden_norm.select(layer_dim, position)
            grad_norm[l] = part.grad_norm.select(layer_dim, position)
            grad_mean[l] = part.grad_mean[position]
    return LayerStatistics(
        torch.stack(hidden_norm, layer_dim), torch.stack(grad_norm, layer_dim), tuple(grad_mean)
    )


# --- Calls without torch's dispatcher: see csrc/prepared.h ---


def direction_cosines(
    grad_means: Sequence[Sequence[Tensor]],
    *,
    stacked: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Compute the cosines between the batch-mean gradients of K batches, layer by layer.

    Args:
        grad_means: K batches, each a sequence of L tensors, as ``layer_statistics(...).grad_mean``
            gives them; one floating type and one device. With ``stacked=True`` each has a leading
            ``[C]``.
        stacked: whether a stack dimension stands first.
        backend: ``"native"`` or ``"torch"`` to force one.

    Returns:
        ``[L, K, K]`` float64 (stacked: ``[C, L, K, K]``) in [-1, 1], not differentiable. The cosine
        with a zero or non-finite direction is NaN, that of a direction with itself exactly 1.

    Raises:
        TypeError, ValueError: batches differ in layers, shape, dtype or device.
        RuntimeError: ``backend="native"`` and there is no kernel for the device.

    Source: protocol of arXiv 2606.21126, diagnostic (c).

    >>> import torch
    >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([1e-30, 1e-30])
    >>> direction_cosines([[x], [y]])[0, 0, 1]
    tensor(0.7071, dtype=torch.float64)
    """
    checks.check_directions(grad_means)
    if (
        len(grad_means) == 0
        or len(grad_means[0]) == 0
        or not isinstance(grad_means[0][0], Tensor)
        or not is_native(grad_means[0][0].device.type, backend)
    ):
        checks.check_cosines_input(grad_means, stacked)
        with torch.no_grad():
            return reference.direction_cosines(grad_means, stacked=stacked)
    flat = [direction for batch in grad_means for direction in batch]
    try:
        cosines: Tensor = cosines_op(flat, len(grad_means), stacked)
    except (RuntimeError, TypeError, NotImplementedError):
        checks.check_cosines_input(grad_means, stacked)
        raise
    return cosines


def step_row(
    norms: Tensor,
    directions: Sequence[Tensor],
    kept: Sequence[Tensor],
    rows: Tensor,
    places: Tensor,
    *,
    decay: float,
    extras: Sequence[Tensor] = (),
    backend: Backend | None = None,
) -> None:
    """Write all that one training step says into a row of a ring, and keep its directions.

    One call in place of some twenty, which reads its places on the device, so that a CUDA graph can
    replay it.

    Args:
        norms: ``[2, S, N]`` float64, contiguous: of S states, then of their gradients; the last
            gradient is that of the logits.
        directions: batch-mean gradients, ``[D]`` each, float32 or float64, the same in all.
        kept: per direction ``[K + 1, D]`` in its type: K earlier ones, zero where there is none
            yet, and their exponential average. Written to: the direction takes the place of the
            oldest, and enters the average unless it is zero or not finite.
        rows: the ring, ``[R, W]`` float64. Written to at ``places[0]``: 3 S - 1 medians (of the
            rows of ``norms``, NaN left out and the lower of two middle values, then of each
            gradient's norm over the logits'), K + 1 cosines per direction with what was kept
            before, the extras.
        places: ``[3]`` int64: the next row, the next kept direction, and a zero that the kernels
            count with. Both places count on.
        decay: a direction enters the average with the weight 1 - decay.
        extras: ``[E]`` float64 each, that go behind the rest; on CUDA four at most.
        backend: ``"native"`` or ``"torch"`` to force one.

    Raises:
        RuntimeError: a shape, type or device is not as above; the native kernels then have written
            nothing.

    >>> import torch
    >>> norms = torch.tensor([[[3.0, 1.0, 2.0]], [[4.0, 6.0, 5.0]]], dtype=torch.float64)
    >>> kept = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    >>> rows, places = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    >>> step_row(norms, [torch.tensor([1.0, 1.0])], [kept], rows, places, decay=0.5)
    >>> rows[0]
    tensor([2.0000, 5.0000, 0.7071,    nan], dtype=torch.float64)
    >>> kept
    tensor([[1.0000, 1.0000],
            [0.5000, 0.5000]])
    """
    if is_native(norms.device.type, backend):
        step_row_op(norms, directions, kept, rows, places, decay, extras)
    else:
        with torch.no_grad():
            reference.step_row(norms, directions, kept, rows, places, decay=decay, extras=extras)
