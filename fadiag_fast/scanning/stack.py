"""Checkpoints of one architecture side by side in memory, and their figures in one go."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..batches import check_labels
from ..capture import Probe
from ..protocol import Figures
from ..statistics import Reduced, SampleReduction, direction_figures, reduce_captured
from ..taps import Taps

_ALIGNMENT = 64  # bytes: every dtype, and a cache line


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in a row of a slab."""

    name: str
    offset: int
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype


class Layout:
    """The place of every parameter and buffer of an architecture in a row of bytes.

    Attributes:
        places: one per tensor; tied weights have one.
        row_bytes: of one checkpoint.
    """

    def __init__(self, model: nn.Module) -> None:
        self.places: list[Place] = []
        offset = 0
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            nbytes = tensor.numel() * tensor.element_size()
            self.places.append(Place(name, offset, nbytes, tensor.shape, tensor.dtype))
            offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self.row_bytes = max(offset, _ALIGNMENT)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the tensors in ``rows``, uint8 ``[S, row_bytes]`` or ``[row_bytes]``."""
        found = {}
        for place in self.places:
            raw = rows.narrow(-1, place.offset, place.nbytes)
            found[place.name] = raw.view(place.dtype).unflatten(-1, place.shape or (1,))
            if not place.shape:
                found[place.name] = found[place.name].squeeze(-1)
        return found


class Slab:
    """Rows of host memory that checkpoints are read into, and their copy on the device.

    Args:
        layout: of the architecture.
        rows: checkpoints it holds.
        device: where they are computed; for a GPU the host memory is pinned.
    """

    def __init__(self, layout: Layout, rows: int, device: torch.device) -> None:
        self.layout = layout
        self.on_host = torch.zeros(
            (rows, layout.row_bytes), dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        self.device = device
        self._on_device: Tensor | None = None

    def __len__(self) -> int:
        return len(self.on_host)

    def to_device(self, rows: int) -> Tensor:
        """Return the first rows on the device; the copy runs in the current stream."""
        if self.device.type == "cpu":
            return self.on_host[:rows]
        if self._on_device is None:
            self._on_device = torch.empty_like(self.on_host, device=self.device)
        self._on_device[:rows].copy_(self.on_host[:rows], non_blocking=True)
        return self._on_device[:rows]


class RowModel:
    """A copy of a model whose tensors lie in a row of a slab: loading into it fills the row.

    Args:
        model: the architecture.
        layout: of its tensors in a row.
        values: what a row holds before a checkpoint is loaded, by name, on the host. Values that
            no checkpoint has, non-persistent buffers, stay.
    """

    def __init__(self, model: nn.Module, layout: Layout, values: dict[str, Tensor]) -> None:
        self.model = copy.deepcopy(model).cpu()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.new_empty(0)  # readers hold no weights of their own
        self._values = values
        self._layout = layout

    def at(self, row: Tensor) -> nn.Module:
        """Return the model with its tensors in ``row``, set to the original's values."""
        views = self._layout.views(row)
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            views[name].copy_(self._values[name])
            tensor.data = views[name]
        return self.model


@dataclass(frozen=True)
class Measured:
    """What a stack of S checkpoints says, on the host.

    Attributes:
        figures: one per checkpoint, without a judged accuracy.
        finite: per checkpoint whether all its weights are.
        accuracies: per checkpoint over the evaluation batches; None where labels are no classes.
    """

    figures: list[Figures]
    finite: list[bool]
    accuracies: list[float | None]


class Auditor:
    """Turn rows of weights into figures.

    Args:
        model: the architecture, on its device and in eval mode.
        batches: (x, y) on that device.
        options: what :class:`~fadiag_fast.capture.Probe` takes: select, loss, output, batch_dim.
        reduction: see :class:`~fadiag_fast.statistics.SampleReduction`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Any, Any]],
        options: dict[str, Any],
        reduction: SampleReduction,
    ) -> None:
        self.layout = Layout(model)
        self.batches = batches
        self.reduction = reduction
        self._stacked = Probe(model, path="torch.func", **options)
        self._single = Probe(model, path="autograd", **options)
        for index, (x, y) in enumerate(batches):
            plan = self._single.prepare(x)
            if options["loss"] is None and isinstance(y, Tensor):
                check_labels(index, y, plan.spots[plan.output].shape, "scan")

    @property
    def labels(self) -> tuple[str, ...]:
        return self.taps.labels

    @property
    def taps(self) -> Taps:
        return self._single.taps

    def prepare_stacks(self) -> None:
        """Trace the model for the stacked path."""
        for x, _ in self.batches:
            self._stacked.prepare(x)

    def measure(self, rows: Tensor, stacked: bool) -> Measured:
        """Compute the figures of the checkpoints in ``rows``, uint8 ``[S, row_bytes]``.

        One transfer to the host, at the end. ``stacked`` maps one pass over all; else they take
        turns.
        """
        if stacked:
            return self._measure(self.layout.views(rows), len(rows))
        parts = [self._measure(self.layout.views(row), None) for row in rows]
        return Measured(
            [part.figures[0] for part in parts],
            [part.finite[0] for part in parts],
            [part.accuracies[0] for part in parts],
        )

    def _measure(self, weights: dict[str, Tensor], stack: int | None) -> Measured:
        found = [self._reduced(weights, x, y, stack) for x, y in self.batches]
        lead = 1 if stack is None else stack
        finite = _finite(weights, lead)
        cosines = ops.direction_cosines([r.grad_mean for r in found], stacked=True)
        first = found[0]
        columns = [
            torch.nanmedian(first.hidden_norm, dim=-1).values,
            torch.nanmedian(first.grad_norm, dim=-1).values,
            torch.nanmedian(first.credit_gain, dim=-1).values,
            torch.nanmedian(first.output_grad_norm, dim=-1).values[:, None],
            cosines.flatten(1),
            finite.double()[:, None],
            self._correct(found)[:, None],
        ]
        rows = torch.cat(columns, dim=1).cpu()
        shapes = tuple(tuple(mean.shape[1:]) for mean in first.grad_mean)
        return self._on_host(rows, shapes, batch_size=first.logits.shape[1])

    def _reduced(self, weights: dict[str, Tensor], x: Any, y: Any, stack: int | None) -> Reduced:
        if stack is None:
            one = reduce_captured(self._single.capture(x, y, constants=weights), self.reduction)
            return Reduced(
                hidden_norm=one.hidden_norm[None],
                grad_norm=one.grad_norm[None],
                output_grad_norm=one.output_grad_norm[None],
                credit_gain=one.credit_gain[None],
                grad_mean=tuple(mean[None] for mean in one.grad_mean),
                logits=one.logits[None],
                loss=one.loss[None],
            )

        def run(weights: dict[str, Tensor]) -> tuple[Any, ...]:
            captured = self._stacked.capture(x, y, constants=weights)
            return tuple(reduce_captured(captured, self.reduction))

        return Reduced(*torch.vmap(run, randomness="same")(weights))

    def _correct(self, found: Sequence[Reduced]) -> Tensor:
        """Return the accuracy per checkpoint, NaN where labels are no classes."""
        correct = torch.zeros(
            len(found[0].logits), dtype=torch.float64, device=found[0].loss.device
        )
        total = 0
        for reduced, (_, y) in zip(found, self.batches, strict=True):
            classes = isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point()
            if not classes or reduced.logits.dim() != 3:
                return torch.full_like(correct, torch.nan)
            correct += (reduced.logits.argmax(-1) == y).sum(-1)
            total += len(y)
        return correct / total

    def _on_host(
        self, rows: Tensor, shapes: tuple[tuple[int, ...], ...], batch_size: int
    ) -> Measured:
        n, k = len(self.labels), len(self.batches)
        figures = []
        for row in rows:
            hidden, grad, gain, error, cosines = row[:-2].split([n, n, n, 1, n * k * k])
            stabilities, num_directions = direction_figures(cosines.view(n, k, k))
            figures.append(
                Figures(
                    layers=self.labels,
                    residual_norms=tuple(hidden.tolist()),
                    bp_grad_norms=tuple(grad.tolist()),
                    credit_gains=tuple(gain.tolist()),
                    output_grad_norm=float(error),
                    batch_size=batch_size,
                    stabilities=tuple(stabilities),
                    num_directions=tuple(num_directions),
                    num_batches=k,
                    shapes=shapes,
                    sizes=tuple(math.prod(shape) for shape in shapes),
                )
            )
        accuracies = [None if value != value else value for value in rows[:, -1].tolist()]
        return Measured(figures, (rows[:, -2] == 1).tolist(), accuracies)


def _finite(weights: dict[str, Tensor], stack: int) -> Tensor:
    """Return per checkpoint whether all floating weights are finite, ``[S]``."""
    found: Tensor | None = None
    for tensor in weights.values():
        if not tensor.is_floating_point():
            continue
        finite = tensor.reshape(stack, -1).isfinite().all(dim=1)
        found = finite if found is None else found & finite
    if found is None:
        device = next(iter(weights.values())).device if weights else torch.device("cpu")
        return torch.ones(stack, dtype=torch.bool, device=device)
    return found
