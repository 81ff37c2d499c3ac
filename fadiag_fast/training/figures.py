"""What one step showed: norms, mean gradients, and the sums they are made of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.reference import sample_norm

# Micro-batches of one step. Nobody accumulates so many; a loop that forgot to call step() does.
MOST_PARTS = 10_000

# What a backward pass does with gradients, in the order in which a step prefers them.
#: ``torch.autograd.grad`` for parameters; whoever trains so has no others in a step.
HANDED_OUT = 1
#: They are added to ``.grad``, but to none of the probed model's: of an input, a prompt, another
#: network.
ELSEWHERE = 2
#: They are added to the parameters' ``.grad``, perhaps only as the gradient of a gradient.
SECOND_ORDER = 3
TRAINS = 4


def sample_norms(samples: Tensor) -> Tensor:
    """Return the norm of each sample of ``[N, ...]``, ``[N]`` float64, without a wider copy.

    ``torch.linalg.vector_norm(dtype=torch.float64)`` would make one, and in float32 it would lose
    gradients below 1e-19.
    """
    if samples.dim() == 1:
        return samples.double().abs()
    if samples.dim() == 3 and samples.is_contiguous():
        # A row for each position: what is averaged over rows is short then.
        return sample_norm(_row_norms(samples.flatten(0, 1)).view(samples.shape[:2]))
    return _row_norms(samples)


def _row_norms(rows: Tensor) -> Tensor:
    # The operator reads pairs: of two halves, nothing is read twice but an odd row.
    half = (len(rows) + 1) // 2
    found = ops.layer_statistics([rows[:half]], [rows[len(rows) - half :]], means=())
    return torch.cat([found.hidden_norm[0][: len(rows) - half], found.grad_norm[0]])


def norms_and_mean(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm of each sample of ``[N, ...]``, ``[N]`` float64, and the samples' mean."""
    # The operator reads pairs; the second of two equal ones comes out of the cache.
    found = ops.layer_statistics([samples], [samples])
    # A copy: the figures lie in one tensor, with the mean.
    return found.grad_norm[0].clone(), found.grad_mean[0]


@dataclass
class StepFigures:
    """What one or more micro-batches say; N samples, n states.

    Attributes:
        norms: ``[2, n + 1, N]`` float64: of the states, then of their gradients. Row n of the
            gradients is ‖∂loss/∂logits‖, that of the states has no meaning. NaN where nothing
            arrived.
        means: per kept direction the mean of the samples' gradients; None where none arrived.
        missing: indices of states of which something did not arrive.
        samples: N; None where some of the columns are empty, and ``count`` says how many are not.
        count: on the device.
        micro_batches: how many.
        sizes: features of a sample of each state, ``n``; 0 where not known.
        rms: in their place ``[n, N]`` float64, the norms over the root of the features, where these
            differ between samples or only the device knows them.
        has_error: whether the gradients of the logits are among the norms.
        purpose: what the backward pass does with its gradients.
    """

    norms: Tensor
    means: list[Tensor | None]
    missing: set[int]
    samples: int | None
    count: Tensor | None = None
    micro_batches: int = 1
    sizes: tuple[int, ...] = ()
    rms: Tensor | None = None
    has_error: bool = True
    purpose: int = TRAINS

    def root_mean_squares(self) -> Tensor:
        """Return ``rms``, computed from the sizes where these are known."""
        if self.rms is not None:
            return self.rms
        hidden = self.norms[0, : len(self.sizes)]
        # A product with numbers that the host knows, without a copy that waits for the device.
        return torch.stack(
            [row / root_of(size) for row, size in zip(hidden, self.sizes, strict=True)]
        )

    @property
    def weight(self) -> Tensor | float:
        """How many samples there are, on the device where the host does not know."""
        if self.samples is not None or self.count is None:
            return float(self.samples or 0)
        return self.count


def root_of(size: int) -> float:
    """Return what turns a norm of so many features into a root mean square; NaN for none."""
    return math.sqrt(size) if size else math.nan


class Parts(list[StepFigures]):
    """The micro-batches of a step, until it ends; ``told`` is called with each new one."""

    def __init__(self, told: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self._warned = False
        self._told = told

    def add(self, figures: StepFigures) -> None:
        """Append what a backward pass has brought; forget all before where there are too many."""
        if len(self) == MOST_PARTS:
            self.clear()
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"StepProbe: expected step() after each optimiser step, got {MOST_PARTS:,} "
                    f"backward passes without one: what they said is thrown away",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self.append(figures)
        if self._told is not None:
            self._told()


def merged(parts: list[StepFigures]) -> StepFigures:
    """Put the samples of micro-batches together; their directions are averaged over samples."""
    if len(parts) == 1:
        return parts[0]
    weights = [part.weight for part in parts]
    total = sum(weights)
    means: list[Tensor | None] = []
    for of_layer in zip(*(part.means for part in parts), strict=True):
        # The mean of no samples is none.
        known = [
            (m, w)
            for part, m, w in zip(parts, of_layer, weights, strict=True)
            if m is not None and part.samples != 0
        ]
        # Micro-batches padded to different lengths have no common direction.
        if len({m.shape for m, _ in known}) != 1:
            means.append(None)
            continue
        first, weight = known[0]
        summed = first * weight
        for other, weight in known[1:]:
            summed = summed + other * weight
        means.append(summed / total)
    counted = all(part.samples is not None for part in parts)
    one = len({part.sizes for part in parts}) == 1 and all(part.rms is None for part in parts)
    return StepFigures(
        torch.cat([part.norms for part in parts], 2),
        means,
        set.intersection(*(part.missing for part in parts)),
        sum(part.samples or 0 for part in parts) if counted else None,
        total if isinstance(total, Tensor) else None,
        sum(part.micro_batches for part in parts),
        parts[0].sizes if one else (),
        None if one else torch.cat([part.root_mean_squares() for part in parts], 1),
        all(part.has_error for part in parts),
    )
