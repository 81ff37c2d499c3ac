"""How checkpoints and batches share forward passes, and what is kept of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import choose_output, classification_loss
from ..capture.points import TapError
from ..capture.statistics import (
    class_errors,
    measurable_errors,
)

# Samples of a pass whose states stay in a core's cache, for images of CIFAR's size.
CACHED_SAMPLES = 32


@dataclass(frozen=True)
class BatchingPlan:
    """How checkpoints and batches share forward passes.

    Attributes:
        stack: checkpoints side by side.
        samples: of one pass, from batches laid end to end; 0 for batch by batch.
        channels_last: whether images are laid out that way.
    """

    stack: int = 1
    samples: int = 0
    channels_last: bool = False


class Unit:
    """Samples of one batch in one pass, of S checkpoints: what is kept of them."""

    def __init__(
        self,
        batch: int,
        reduced: Sequence[Any],
        index: int,
        y: Any,
        has_output: bool,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self.batch = batch
        self.has_output = has_output
        self.dtypes = dtypes  # of the gradients of the logits, and of the states
        hidden, grad, error, gain, means, logits, _ = reduced
        self.norms = (hidden[:, index], grad[:, index], gain[:, index], error[:, index])
        self.means = [mean[:, index] for mean in means]
        # A state in their place has no classes, and no figure of logits is taken of it.
        self.logits = logits[:, index] if has_output else logits[:, index].flatten(2)[..., 0]
        self.y = y

    def measurable_gain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return gains ``[S, n, N]``, NaN where there is no measurable output error, and where."""
        _, _, gain, error = self.norms
        known = measurable_errors(error, dtype)
        return torch.where(known[:, None], gain, torch.nan), known

    def non_finite(self) -> Tensor:
        """Return how many samples have a state or gradient that is not finite, ``[S]``."""
        hidden, grad, _, _ = self.norms
        clean: Tensor = (hidden.isfinite() & grad.isfinite()).all(1)
        return (~clean).sum(-1)


class UnitLoss:
    """Sum a loss over the units of a pass, so that each sample's gradient is its batch's.

    Args:
        loss: the scan's; None for classification.
        output: which part of a structured output counts as the logits.
        units: of the pass.
        batch_size: of the batches; given where plain labels allow one sum over all.
    """

    def __init__(self, loss: Any, output: Any, units: int, batch_size: int | None) -> None:
        self.loss, self.output, self.units, self.batch_size = loss, output, units, batch_size

    def __call__(self, output: Any, y: Any) -> Tensor:
        if self.loss is None:
            logits = output if isinstance(output, Tensor) else choose_output(output, self.output)
            if self.batch_size is not None:
                total = nn.functional.cross_entropy(logits, y, reduction="sum")
                return total / self.batch_size
            output, loss = logits, classification_loss
        else:
            loss = self.loss
            if not isinstance(output, Tensor):
                raise TapError("scan: expected a tensor to share between batches")
        parts = zip(output.chunk(self.units), y.chunk(self.units), strict=True)
        return torch.stack([loss(*part) for part in parts]).sum()


def finite_of(weights: dict[str, Tensor], stack: int) -> Tensor:
    """Return per checkpoint whether all floating weights are finite, ``[S]`` float64."""
    largest: list[Tensor] = []
    for tensor in weights.values():
        if tensor.is_floating_point() and tensor.numel():
            flat = tensor.reshape(stack, -1)
            # One pass without a copy; a NaN passes through a maximum.
            largest.append(torch.linalg.vector_norm(flat, torch.inf, dim=1).double())
    if not largest:
        device = next(iter(weights.values())).device if weights else None
        return torch.ones(stack, dtype=torch.float64, device=device)
    return torch.stack(largest).isfinite().all(0).double()


def class_error_of(units: Sequence[Unit]) -> Tensor:
    """Return the median ‖softmax − onehot‖ per checkpoint, NaN where labels are no classes."""
    errors = [
        class_errors(unit.logits, unit.y) if unit.logits.dim() == 3 else None for unit in units
    ]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return torch.full_like(units[0].norms[3][:, 0], torch.nan)
    together: Tensor = torch.nanmedian(torch.cat(known, dim=-1), dim=-1).values
    return together


def accuracy_of(units: Sequence[Unit]) -> Tensor:
    """Return the accuracy per checkpoint, NaN where labels are no classes."""
    logits = units[0].logits
    correct = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    total = 0
    for unit in units:
        y = unit.y
        classes = isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point()
        if not classes or unit.logits.dim() != 3:
            return torch.full_like(correct, torch.nan)
        correct += (unit.logits.argmax(-1) == y).sum(-1)
        total += len(y)
    return correct / total
