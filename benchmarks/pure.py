"""The best that pure PyTorch does for the operator's figures: what the operator must beat.

Every path returns what ``layer_statistics`` returns: the norms of each sample of h and of g, and
the mean over the batch of g. float32 results are accepted from them, though the operator's norms
are float64 and right over the whole range of the input: a path may be faster for doing less, never
for being wrong, so each is compared with the operator before it is timed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fadiag_fast import LayerStatistics

from . import handwritten
from .timing import Run, Timing, failed

Statistics = tuple[Tensor, Tensor, list[Tensor]]
Path = Callable[[Sequence[Tensor], Sequence[Tensor]], Statistics]

# Relative, of the whole figure: float32 sums stay under 1e-5 at every size used here, and anything
# accumulated in bfloat16 or by tf32 lies above 3e-4.
TOLERANCE = 1e-4
# Row by row, foreach needs one tensor per sample; beyond this, unbinding them takes seconds.
_MOST_FOREACH_TENSORS = 20_000

# One kernel of hundreds of reductions takes minutes to compile.
_MOST_COMBINED_LAYERS = 40

# Copying the layers together saves launches; where bytes cost more than launches it cannot win.
_MOST_STACKED_BYTES = 256 << 20
# The paths that copy; the ratio without them is reported too.
STACKING = ("stack", "compile stack")
# Not PyTorch, but what would be written in place of the operator.
BY_HAND = "triton by hand"


def rows(states: Tensor) -> Tensor:
    """Return samples as rows in the order they have in memory: a view, never a copy."""
    if states.is_contiguous():
        return states.view(states.shape[0], -1)
    if states.dim() == 4:
        return states.permute(0, 2, 3, 1).view(states.shape[0], -1)
    raise ValueError(f"rows: expected contiguous or channels_last, got strides {states.stride()}")


def _unrow(mean: Tensor, grad: Tensor) -> Tensor:
    """Give a mean in memory order the shape of a sample, again as a view."""
    if grad.is_contiguous():
        return mean.view(grad.shape[1:])
    channels, height, width = grad.shape[1:]
    return mean.view(height, width, channels).permute(2, 0, 1)


def eager(hiddens: Sequence[Tensor], grads: Sequence[Tensor]) -> Statistics:
    """Layer by layer: three reductions each, widened inside the reduction and not before."""

    def norms(layers: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [torch.linalg.vector_norm(rows(x), dim=1, dtype=torch.float32) for x in layers]
        )

    means = [_unrow(rows(g).mean(0, dtype=torch.float32), g) for g in grads]
    return norms(hiddens), norms(grads), means


def foreach(hiddens: Sequence[Tensor], grads: Sequence[Tensor]) -> Statistics:
    """All norms by one multi-tensor call on the samples; there is no such call for the means."""
    samples = [row for x in (*hiddens, *grads) for row in rows(x).unbind(0)]
    norms = torch.stack(torch._foreach_norm(samples, 2, dtype=torch.float32))
    norms = norms.view(2, len(hiddens), -1)
    means = [_unrow(rows(g).mean(0, dtype=torch.float32), g) for g in grads]
    return norms[0], norms[1], means


def stack(hiddens: Sequence[Tensor], grads: Sequence[Tensor]) -> Statistics:
    """Copy equal layers together: few launches, but every byte moved three times."""
    h = torch.stack([rows(x) for x in hiddens])
    g = torch.stack([rows(x) for x in grads])
    means = g.mean(1, dtype=torch.float32)
    return (
        torch.linalg.vector_norm(h, dim=2, dtype=torch.float32),
        torch.linalg.vector_norm(g, dim=2, dtype=torch.float32),
        [_unrow(mean, grad) for mean, grad in zip(means.unbind(0), grads, strict=True)],
    )


def paths(
    hiddens: Sequence[Tensor], grads: Sequence[Tensor], compiled: bool, autotune: bool = False
) -> tuple[dict[str, Path], list[Timing]]:
    """Return the paths that apply to a workload, and a row with the reason for each other.

    Args:
        hiddens: the layers; they decide what applies.
        grads: their gradients.
        compiled: whether torch.compile takes part: seconds to a minute of compilation per path.
        autotune: whether its max-autotune mode does too.
    """
    found: dict[str, Path] = {"eager": eager}
    left_out: list[Timing] = []
    samples = 2 * len(hiddens) * hiddens[0].shape[0]
    if samples <= _MOST_FOREACH_TENSORS:
        found["foreach"] = foreach
    else:
        left_out.append(failed("foreach", "eager", f"{samples} tensors, one per sample"))
    if len({(h.shape, h.stride(), h.dtype) for h in hiddens}) != 1:
        left_out.append(failed("stack", "eager", "layers differ in shape"))
    elif sum(h.nbytes for h in hiddens) * 2 > _MOST_STACKED_BYTES:
        left_out.append(failed("stack", "eager", "left out: moves three times the bytes"))
    else:
        found["stack"] = stack
    by_hand = handwritten.tuned(hiddens, grads) if hiddens[0].is_cuda else None
    if by_hand is not None:
        found[BY_HAND] = by_hand
    if compiled:
        # One workload's guards and cache entries are of no use to the next.
        torch._dynamo.reset()
        found["compile"] = _compile(eager)
        # Combo kernels join the layers' reductions into few launches; off by default in Inductor.
        if len(hiddens) <= _MOST_COMBINED_LAYERS:
            try:
                found["compile combo"] = _compile(eager, options={"combo_kernels": True})
            except RuntimeError as error:  # an option that this torch does not know
                left_out.append(failed("compile combo", "eager", error))
        else:
            left_out.append(failed("compile combo", "eager", "left out: minutes of compilation"))
        if "stack" in found:
            found["compile stack"] = _compile(stack)
        if autotune:
            found["compile autotune"] = _compile(eager, mode="max-autotune-no-cudagraphs")
    return found, left_out


def _compile(path: Path, **settings: Any) -> Path:
    # One graph of all layers, and an error instead of a silent break into several.
    return torch.compile(path, dynamic=False, fullgraph=True, **settings)


def difference(got: Statistics, expected: LayerStatistics) -> float:
    """Return the largest relative error: of any single norm, and of any layer's mean."""
    errors: list[Tensor] = []
    for norms, right in ((got[0], expected.hidden_norm), (got[1], expected.grad_norm)):
        if norms.shape != right.shape:
            return math.inf
        errors.append(((norms.double() - right).abs() / right).amax())
    for mean, right in zip(got[2], expected.grad_mean, strict=True):
        if mean.shape != right.shape:
            return math.inf
        errors.append(torch.linalg.vector_norm(mean - right) / torch.linalg.vector_norm(right))
    worst = torch.stack([error.double() for error in errors]).amax().item()  # keeps a NaN
    return math.inf if math.isnan(worst) else worst


def checked(
    found: Mapping[str, Path],
    hiddens: Sequence[Tensor],
    grads: Sequence[Tensor],
    expected: LayerStatistics,
) -> tuple[dict[str, Run], list[Timing]]:
    """Return the paths that agree with the operator, bound to their inputs, and the others' rows.

    Args:
        found: paths by name.
        hiddens: the layers.
        grads: their gradients.
        expected: the operator's figures.
    """
    runs: dict[str, Run] = {}
    rejected: list[Timing] = []
    for name, path in found.items():
        try:
            error = difference(path(hiddens, grads), expected)
        except Exception as problem:  # a path that does not run is a row with its reason
            rejected.append(failed(name, "eager", f"{type(problem).__name__}: {problem}"))
            continue
        if error <= TOLERANCE:
            runs[name] = lambda path=path: path(hiddens, grads)
        else:
            rejected.append(failed(name, "eager", f"wrong: relative error {error:.1e}"))
    return runs, rejected


def cosines(grad_means: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return ``[L, K, K]``: normalise each layer's directions, then one product of them."""
    matrices = []
    for layer in zip(*grad_means, strict=True):
        directions = torch.stack([direction.reshape(-1) for direction in layer])
        # Divided by its own norm: a clamped one would call a tiny direction orthogonal to itself.
        units = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        matrices.append(units @ units.T)
    return torch.stack(matrices)


def stacked_cosines(grad_means: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the same for equal layers, all in one batched product."""
    directions = torch.stack(
        [torch.stack([d.reshape(-1) for d in layer]) for layer in zip(*grad_means, strict=True)]
    )
    units = directions / torch.linalg.vector_norm(directions, dim=2, keepdim=True)
    return units @ units.mT
