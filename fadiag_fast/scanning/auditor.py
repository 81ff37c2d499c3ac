"""Batched auditing: run several checkpoints and batches in one forward pass.

Samples do not see each other in eval mode, so that several evaluation batches may share a pass, or
a batch be cut to what the cache holds; checkpoints of one architecture may lie side by side
(torch.vmap). None of this changes a figure beyond rounding, and that is not assumed: the first
checkpoint is measured batch by batch, and a way of sharing whose figures differ is not taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import ops
from .._common.cuda_graphs import mark_unwritten, on_device, record
from .._common.row_layout import RowLayout
from ..capture import Captured, Path, Probe, own_attributes
from ..capture.batches import check_labels
from ..capture.directions import direction_figures
from ..capture.points import TapError, Taps
from ..capture.reduction import SampleReduction
from ..capture.statistics import (
    Reduced,
    equal_logits,
    reduce_captured,
)
from ..protocol import OUTPUT, Figures
from .batching import (
    CACHED_SAMPLES,
    BatchingPlan,
    Unit,
    UnitLoss,
    accuracy_of,
    class_error_of,
    finite_of,
)
from .weight_layout import Fit, canonical

# Of two ways that share passes differently, figures may differ by this much in 16 bits, and by a
# tenth of it in others: rounding (also of TF32) in a network that is not chaotic. Where it is, or
# where samples see each other, passes are not shared.
_TOLERANCE = 1e-2


# Each holds its own memory.
_MOST_GRAPHS = 4

# The columns of a checkpoint's figures: those that are compared as norms, those as cosines, and
# counts of what both are made of.
_NORMS = {
    "residual_norms": True,  # whether there is one for each state
    "bp_grad_norms": True,
    "credit_gains": True,
    "output_grad_norm": False,
    "pooled_norms": True,
    "pooled_gains": True,
    "output_error": False,
}
_COSINES = {
    "stabilities": True,
    "num_directions": True,
    "stability_errors": True,
    "stability_nulls": True,
    "finite_weights": False,
    "accuracy": False,
}
_COUNTS = {"num_measurable": False, "num_non_finite": False, "equal_logits": False}
_COLUMNS = {**_NORMS, **_COSINES, **_COUNTS}
_SINGLE = [name for name, per_state in _COLUMNS.items() if not per_state]
# What goes into Figures as it is.
_PER_STATE = [name for name, each in _COLUMNS.items() if each and name != "num_directions"]


class Traits(NamedTuple):
    """What a pass shows beside figures: the same for all checkpoints of an architecture.

    Attributes:
        shapes: of a sample of each state.
        samples: of all batches.
        grad_dtype: of the states' gradients.
        has_output: whether the network has an output with a row for each sample.
    """

    shapes: tuple[tuple[int, ...], ...]
    samples: int
    grad_dtype: torch.dtype
    has_output: bool


class Measured:
    """What a stack of S checkpoints says, on the host.

    Args:
        each: per checkpoint what its :class:`~fadiag_fast.protocol.Figures` are made of.
        finite: per checkpoint whether all its weights are.
        accuracies: per checkpoint over the evaluation batches; None where labels are no classes.
        num_samples: of all batches.
    """

    def __init__(
        self,
        each: list[dict[str, Any]],
        finite: list[bool],
        accuracies: list[float | None],
        num_samples: int,
    ) -> None:
        self._each = each
        self.num_samples = num_samples
        self.finite = finite
        self.accuracies = accuracies

    def figures(self, index: int, **accuracies: Any) -> Figures:
        """Return a checkpoint's figures, with the accuracies to be judged if there are some."""
        return Figures(**self._each[index], **accuracies)


class _Rest:
    """What a model holds beside a checkpoint's weights, to be put back before the next one.

    That is buffers that no checkpoint has, and the attributes of modules: what one checkpoint's
    forward pass leaves there, also one that raised half-way, is not seen by another's.

    Args:
        model: as it is before the first checkpoint.
        stored: names of what checkpoints hold.
    """

    def __init__(self, model: nn.Module, stored: Collection[str]) -> None:
        self._buffers = [
            (buffer, buffer.detach().clone())
            for name, buffer in model.named_buffers()
            if name not in stored
        ]
        self._modules = [
            (module, dict(module._buffers), own_attributes(module))
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]

    def restore(self) -> None:
        for module, buffers, attributes in self._modules:
            module._buffers.update(buffers)
            if own_attributes(module).keys() != attributes.keys():
                for name in own_attributes(module).keys() - attributes.keys():
                    del module.__dict__[name]
            module.__dict__.update(attributes)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)


class Auditor:
    """Turn rows of weights into figures.

    Args:
        model: the architecture, on its device and in eval mode.
        batches: (x, y) on that device.
        options: what :class:`~fadiag_fast.capture.Probe` takes: select, loss, output, batch_dim.
        reduction: see :class:`~fadiag_fast.capture.reduction.SampleReduction`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Any, Any]],
        options: dict[str, Any],
        reduction: SampleReduction,
    ) -> None:
        self.model = model
        self.batches = batches
        self.reduction = reduction
        self._options = options
        self._probes: dict[tuple[bool, int], Probe] = {}
        self._end_to_end: dict[bool, tuple[Tensor, Tensor]] = {}
        self._graphs: dict[BatchingPlan, _Graph] = {}
        self._canonical = canonical(model)
        self._buffers = {name for name, _ in model.named_buffers()}
        self._can_graph = True
        alone = self._probe(False, 0)
        for index, (x, y) in enumerate(batches):
            plan = alone.prepare(x)
            if options["loss"] is None and isinstance(y, Tensor) and plan.has_output:
                check_labels(index, y, plan.spots[plan.output].shape, "scan")
        self.device = plan.spots[plan.output].device
        self._shareable = self._batches_alike()
        self._rest = _Rest(model, set(self._canonical.places))
        states = len(self.labels)
        self._layout = RowLayout({name: states if each else 1 for name, each in _COLUMNS.items()})

    @property
    def labels(self) -> tuple[str, ...]:
        return self.taps.labels

    @property
    def taps(self) -> Taps:
        return self._probe(False, 0).taps

    # ---- ways

    def _batches_alike(self) -> bool:
        """Return whether the batches can be laid end to end."""
        first = self.batches[0]
        for batch in self.batches:
            for given, other in zip(batch, first, strict=True):
                if not isinstance(given, Tensor) or not isinstance(other, Tensor):
                    return False
                if given.shape != other.shape or given.dtype != other.dtype or given.dim() == 0:
                    return False
        sizes = {len(tensor) for tensor in first}
        return self._options["batch_dim"] == 0 and len(sizes) == 1

    @property
    def batch_size(self) -> int:
        """Samples of the first batch where batches are alike."""
        return len(self.batches[0][0])

    def _plain_labels(self) -> bool:
        """Return whether a batch's loss is a mean over all its samples of terms of their own."""
        return self._options["loss"] is None and all(
            y.dim() == 1 and not y.is_floating_point() and bool((y >= 0).all())
            for _, y in self.batches
        )

    def candidates(self) -> list[BatchingPlan]:
        """Return the ways of sharing passes that are worth a trial, smaller passes first."""
        found = []
        if self._shareable:
            divisors = [d for d in range(2, CACHED_SAMPLES + 1) if self.batch_size % d == 0]
            smaller = max(divisors, default=self.batch_size)
            # A GPU wants more at once, never less.
            if self.device.type == "cpu" and smaller < self.batch_size and self._plain_labels():
                found.append(BatchingPlan(samples=smaller))
            if len(self.batches) > 1:
                found.append(BatchingPlan(samples=len(self.batches) * self.batch_size))
        return found

    def with_other_layout(self, way: BatchingPlan) -> BatchingPlan | None:
        """Return the same way with images laid out channels last; None where states are none."""
        spots = self._probe(False, 0).prepare(self.batches[0][0]).spots
        images = self._shareable and any(len(spot.shape) == 4 for spot in spots)
        return replace(way, channels_last=True) if images and way.samples else None

    def _probe(self, stacked: bool, samples: int) -> Probe:
        key = (stacked, samples)
        if key not in self._probes:
            options = dict(self._options, several=self.reduction.kind != "token")
            if samples:
                units = max(1, samples // self.batch_size)
                size = self.batch_size if self._plain_labels() else None
                options["loss"] = UnitLoss(options["loss"], options["output"], units, size)
            path: Path = "torch.func" if stacked else "autograd"
            self._probes[key] = Probe(self.model, path=path, **options)
        return self._probes[key]

    def _passes(self, way: BatchingPlan) -> Iterator[tuple[Any, Any, list[tuple[int, Any]]]]:
        """Yield (x, y, units) of each pass; a unit is (index of its batch, its labels)."""
        if not way.samples:
            for index, (x, y) in enumerate(self.batches):
                yield x, y, [(index, y)]
            return
        if way.channels_last not in self._end_to_end:
            x = torch.cat([x for x, _ in self.batches])
            if way.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            self._end_to_end[way.channels_last] = (x, torch.cat([y for _, y in self.batches]))
        unit = min(way.samples, self.batch_size)
        at = 0
        for x, y in zip(
            *(t.split(way.samples) for t in self._end_to_end[way.channels_last]), strict=True
        ):
            labels = y.split(unit)
            yield x, y, [((at + i * unit) // self.batch_size, l) for i, l in enumerate(labels)]
            at += len(y)

    # ---- measuring

    def measure(
        self, rows: Tensor, fit: Fit, way: BatchingPlan, *, graph: bool = True
    ) -> PendingFigures:
        """Compute the figures of the checkpoints in ``rows``, uint8 ``[S, bytes]``.

        On a GPU this only begins the work.

        Args:
            rows: at most ``way.stack``; they may be written to once the result is there.
            fit: where the tensors lie in each.
            way: how passes are shared.
            graph: on a GPU, replay a graph, recorded where there is none yet.
        """
        with on_device(self.device):
            if self.device.type == "cuda" and self._can_graph and graph:
                try:
                    return self._by_graph(rows, fit, way)
                except torch.OutOfMemoryError:
                    raise
                except Exception:
                    # Whatever a model does that no graph can hold: it still runs as it is.
                    self._can_graph = False
                    self._graphs.clear()
                    torch.cuda.synchronize(self.device)
            columns, traits = self._columns(rows, fit, way)
            return PendingFigures(self, columns[: len(rows)], traits)

    def _by_graph(self, rows: Tensor, fit: Fit, way: BatchingPlan) -> PendingFigures:
        if way not in self._graphs:
            if len(self._graphs) >= _MOST_GRAPHS:
                self._graphs.clear()
            own = self._canonical
            self._graphs[way] = _Graph(
                rows, fit, own, way.stack, lambda rows: self._columns(rows, own, way), self.alike
            )
        graph = self._graphs[way]
        return PendingFigures(self, graph.replay(rows, fit), graph.traits)

    def forget_graphs(self) -> None:
        """Let go of the memory that recorded graphs hold."""
        self._graphs.clear()

    def _columns(self, rows: Tensor, fit: Fit, way: BatchingPlan) -> tuple[Tensor, Traits]:
        """Return all figures of S checkpoints on the device, ``[S, figures]`` float64."""
        stacked = way.stack > 1
        if not stacked and len(rows) > 1:
            each = [self._columns(row[None], fit, way) for row in rows]
            return torch.cat([columns for columns, _ in each]), each[0][1]
        self._rest.restore()
        weights = fit.views(rows if stacked else rows[0])
        for name in self._buffers & weights.keys():
            # A forward pass may write to its buffers. The row stays as it was read: it is measured
            # several times while ways are tried.
            weights[name] = weights[name].clone()
        units = [
            unit
            for found in self._passes(way)
            for unit in self._units(weights, *found, way, len(rows))
        ]
        first = [unit for unit in units if unit.batch == 0]
        logit_dtype, grad_dtype = first[0].dtypes
        hidden, grad, gain, error = (
            torch.cat([unit.norms[i] for unit in first], dim=-1) for i in range(4)
        )
        cosines = ops.direction_cosines(self._directions(units), stacked=True)
        directions = direction_figures(cosines.flatten(0, 1))
        gains, known = zip(*(unit.measurable_gain(logit_dtype) for unit in units), strict=True)
        pooled = torch.cat([unit.norms[0] for unit in units], dim=-1)
        columns = {
            "residual_norms": torch.nanmedian(hidden, dim=-1).values,
            "bp_grad_norms": torch.nanmedian(grad, dim=-1).values,
            "credit_gains": torch.nanmedian(gain, dim=-1).values,
            "output_grad_norm": torch.nanmedian(error, dim=-1).values,
            "pooled_norms": torch.nanmedian(pooled, dim=-1).values,
            "pooled_gains": torch.nanmedian(torch.cat(gains, dim=-1), dim=-1).values,
            "output_error": class_error_of(units),
            "stabilities": directions.stability,
            "num_directions": directions.num_directions,
            "stability_errors": directions.error,
            "stability_nulls": directions.null,
            "finite_weights": finite_of(weights, len(rows)),
            "accuracy": accuracy_of(units),
            "num_measurable": torch.cat(known, dim=-1).sum(-1),
            "num_non_finite": torch.stack([unit.non_finite() for unit in units]).sum(0),
            "equal_logits": torch.stack([equal_logits(unit.logits) for unit in units]).all(0),
        }
        traits = Traits(
            tuple(tuple(mean.shape[1:]) for mean in first[0].means),
            pooled.shape[-1],
            grad_dtype,
            first[0].has_output,
        )
        in_order = [columns[name].double().view(len(rows), -1) for name in self._layout]
        return torch.cat(in_order, dim=1), traits

    def _units(
        self,
        weights: dict[str, Tensor],
        x: Any,
        y: Any,
        parts: Sequence[tuple[int, Any]],
        way: BatchingPlan,
        count: int,
    ) -> list[Unit]:
        """Run one pass and reduce its units, all of them in one call of the operator."""
        probe = self._probe(way.stack > 1, way.samples)
        if probe.prepare(x) and probe.taps.labels != self.labels:
            raise TapError(f"scan: expected taps {self.labels}, got {probe.taps.labels}")
        captured: Any
        if way.stack > 1:
            captured = torch.vmap(
                lambda given: tuple(probe.capture(x, y, constants=given)), randomness="same"
            )(weights)
        else:
            captured = tree_map(lambda t: t[None], tuple(probe.capture(x, y, constants=weights)))
        hiddens, grads, logits, logit_grads, loss = captured
        dtypes = (logit_grads.dtype, (grads[-1] if len(grads) else logit_grads).dtype)
        n = len(parts)

        def reduce(of: Captured) -> Reduced:
            return reduce_captured(of, self.reduction, has_output=probe.has_output)

        def by_unit(state: Tensor) -> Tensor:
            return state.unflatten(1, (n, -1)).flatten(0, 1) if n > 1 else state

        together = Captured(
            [by_unit(h) for h in hiddens],
            [by_unit(g) for g in grads],
            by_unit(logits),
            by_unit(logit_grads),
            loss.repeat_interleave(n),
        )
        if count * n == 1:
            alone = Captured(*tree_map(lambda t: t[0], tuple(together)))
            reduced = tree_map(lambda t: t[None], tuple(reduce(alone)))
        else:
            reduced = torch.vmap(lambda *c: tuple(reduce(Captured(*c))))(*together)
        reduced = tree_map(lambda t: t.unflatten(0, (count, n)), reduced)
        return [
            Unit(batch, reduced, i, labels, probe.has_output, dtypes)
            for i, (batch, labels) in enumerate(parts)
        ]

    def _directions(self, units: Sequence[Unit]) -> list[list[Tensor]]:
        """Return per batch the mean gradients of all states."""
        found: list[list[Tensor]] = []
        for batch in range(len(self.batches)):
            of_batch = [unit.means for unit in units if unit.batch == batch]
            if len(of_batch) == 1:
                found.append(of_batch[0])
            else:  # equal parts, so that the mean of means is the mean
                found.append([torch.stack(parts).mean(0) for parts in zip(*of_batch, strict=True)])
        return found

    def on_host(self, rows: Tensor, traits: Traits) -> Measured:
        """Read what :meth:`measure` computed, ``[S, figures]`` on the host."""
        common = {
            "layers": self.labels,
            "batch_size": self._first_batch_size(self.batches[0][0]),
            "num_batches": len(self.batches),
            "shapes": traits.shapes,
            "sizes": tuple(math.prod(shape) for shape in traits.shapes),
            "num_samples": traits.samples,
            "grad_dtype": str(traits.grad_dtype).removeprefix("torch."),
            "chain_starts": self._probe(False, 0).taps.chain_starts,
            "gain_reference": OUTPUT if traits.has_output else self.labels[-1],
        }
        each: list[dict[str, Any]] = []
        finite: list[bool] = []
        accuracies: list[float | None] = []
        # All numbers at once: each of torch's operations would leave the interpreter's lock.
        for row in map(tuple, rows.tolist()):
            found = self._layout.split(row)
            one = {name: found[name][0] for name in _SINGLE}
            each.append(
                {
                    **common,
                    **{name: found[name] for name in _PER_STATE},
                    "output_grad_norm": one["output_grad_norm"],
                    "num_directions": tuple(map(int, found["num_directions"])),
                    "num_measurable": int(one["num_measurable"]),
                    "num_non_finite": int(one["num_non_finite"]),
                    "equal_logits": bool(one["equal_logits"]),
                    "output_error": _known(one["output_error"]),
                }
            )
            finite.append(one["finite_weights"] == 1)
            accuracies.append(_known(one["accuracy"]))
        return Measured(each, finite, accuracies, traits.samples)

    def alike(self, columns: Tensor, others: Tensor) -> bool:
        """Return whether two ways of sharing passes give the same figures but for rounding."""
        states = self._probe(False, 0).prepare(self.batches[0][0]).spots
        narrow = any(spot.dtype.itemsize < 4 for spot in states)
        rtol = _TOLERANCE if narrow else _TOLERANCE / 10
        mine, theirs = self._layout.split(columns), self._layout.split(others)
        same_norms = all(
            torch.allclose(mine[name], theirs[name], rtol=rtol, atol=0.0, equal_nan=True)
            for name in _NORMS
        )
        # Cosines and counts of directions, a truth value, and an accuracy in which a tie may fall
        # otherwise.
        return same_norms and all(
            torch.allclose(mine[name], theirs[name], rtol=0.0, atol=_TOLERANCE, equal_nan=True)
            for name in _COSINES
        )

    def _first_batch_size(self, x: Any) -> int:
        plan = self._probe(False, 0).prepare(x)
        return int(plan.spots[plan.output].shape[0])


class PendingFigures:
    """Figures on their way to the host.

    Attributes:
        columns: on the device, ``[S, figures]``.
    """

    def __init__(self, auditor: Auditor, columns: Tensor, traits: Traits) -> None:
        self._auditor = auditor
        self._traits = traits
        self.columns = columns
        self._event: torch.cuda.Event | None = None
        if columns.is_cuda:
            self._host = torch.empty(columns.shape, dtype=columns.dtype, pin_memory=True)
            self._host.copy_(columns, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = columns

    def wait(self) -> None:
        """Wait until the figures are on the host."""
        if self._event is not None:
            self._event.synchronize()

    def result(self) -> Measured:
        """Wait for the figures and return them."""
        self.wait()
        return self._auditor.on_host(self._host, self._traits)


class _Graph:
    """The measuring of a stack as one CUDA graph, over rows of its own.

    These are laid out in one way, so that one graph serves files in which tensors lie elsewhere:
    names of another length, as step_99.pt and step_100.pt have, are enough for that. The first
    replay is compared with a run that is not recorded.

    Args:
        rows, fit: the checkpoints at hand.
        own: where tensors lie in the graph's rows.
        stack: how many rows those are.
        run: computes figures ``[stack, figures]`` from rows, and their traits.
        alike: whether figures are the same but for rounding.

    Raises:
        RuntimeError: it cannot be recorded, or a replay gives other figures.
    """

    def __init__(
        self,
        rows: Tensor,
        fit: Fit,
        own: Fit,
        stack: int,
        run: Callable[[Tensor], tuple[Tensor, Traits]],
        alike: Callable[[Tensor, Tensor], bool],
    ) -> None:
        own_rows = rows.new_zeros((stack, own.stop))
        self._views = own.views(own_rows)
        self._fill(rows, fit)
        columns, self.traits = run(own_rows)
        expected = columns[: len(rows)].clone()
        # The recording warms up on other weights, so that no memory that it leaves behind can
        # pass for the figures of these.
        own_rows.zero_()
        # Readers copy on streams of their own meanwhile, which is no part of the graph.
        self._graph, self._columns = record(
            lambda: run(own_rows)[0], rows.device, capture_error_mode="thread_local"
        )
        mark_unwritten([self._columns])
        if not alike(self.replay(rows, fit), expected):
            raise RuntimeError("the replay of a CUDA graph gives other figures than the model")

    def _fill(self, rows: Tensor, fit: Fit) -> None:
        given = fit.views(rows)
        for name, view in self._views.items():
            view[: len(rows)].copy_(given[name])

    def replay(self, rows: Tensor, fit: Fit) -> Tensor:
        """Return the figures of ``rows``; the graph's other rows hold what they held before."""
        self._fill(rows, fit)
        self._graph.replay()
        return self._columns[: len(rows)].clone()


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def seconds_of(
    run: Callable[[], PendingFigures], device: torch.device
) -> tuple[PendingFigures, float]:
    """Return what ``run`` returns, and how long its work took."""
    if device.type != "cuda":
        began = time.perf_counter()
        pending = run()
        return pending, time.perf_counter() - began
    with on_device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        pending = run()
        after.record()
        after.synchronize()
        return pending, before.elapsed_time(after) / 1e3
