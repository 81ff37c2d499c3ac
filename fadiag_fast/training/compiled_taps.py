"""Observe a network inside ``torch.compile``.

Hooks on tensors cannot be traced into a graph, so that a state passes through a gradient slot: an
identity with a second, empty argument, whose backward returns the figures of the state and of its
gradient as the gradient of that argument. They are written in plain ATen, which the compiler fuses
with what computes the state and the gradient. A slot is a leaf of autograd that belongs to the
probe: its gradient comes out of any graph, and nothing is written in place.

Squares are summed in float32 behind exact powers of two, 2⁻³² for states and 2³² for gradients:
norms of states from 1e-9 to 1e28 and of gradients from 1e-28 to 1e9 keep float32's precision.
Beyond that a state's norm reads as 0 or inf, as its sum of squares would in float32 beyond 1e±19.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..capture import sample_rows
from ..capture.outputs import by_sample
from ..capture.reduction import SampleReduction
from .figures import StepFigures
from .gradients import Gradients

_STATE_SCALE = 2.0**-32
_GRAD_SCALE = 2.0**32
# Features of a position whose sum is kept from the forward to the backward.
_WIDE = 128
# The state's sum of squares, the gradient's, one more than the features of a sample that was there,
# and where a sample begins the number of calls that brought it.
_ROWS = 4


@dataclass(frozen=True)
class Job:
    """What is taken of a tensor that a hook sees.

    Attributes:
        slot: index of the state; n for the logits.
        state: whether the tensor's own norm is taken.
        grad: whether its gradient's is.
    """

    slot: int
    state: bool
    grad: bool


# The factors stand here as literals: with dynamic=True a number from anywhere else becomes an input
# of the graph, which the backward of an autograd function cannot have.
def _state_squares(samples: Tensor) -> Tensor:
    return _partly_summed((samples.float() * 2.0**-32).square())


def _grad_squares(samples: Tensor) -> Tensor:
    return _partly_summed((samples.float() * 2.0**32).square())


def _partly_summed(squares: Tensor) -> Tensor:
    """Return ``[N, P]``, whose sum over P is that of each sample's squares.

    Over the features first: that is how a normalisation beside it reads the state, forwards and
    backwards, so that the compiler lets both share one kernel and the state is not read again. What
    is left of a long sequence is a number for each position, a hundredth of the state; the rest of
    the sum is taken in the backward, by one kernel for all rows of a slot.
    """
    if squares.dim() == 3 and squares.shape[1] > 0 and squares.shape[2] >= _WIDE:
        return squares.sum(-1)
    if squares.dim() > 2:
        squares = squares.sum(-1)
    return (squares.flatten(1).sum(1) if squares.dim() > 1 else squares)[:, None]


def _rows_of(
    state: Tensor | None, grad: Tensor | None, like: Tensor, features: int, each: int
) -> Tensor:
    """Return the four rows of a slot, ``[4, N]``, of what is left to sum over P.

    Chosen by an index, and not stacked: a stack would be a copy, and its sum a kernel more.

    Args:
        state: ``[N, P]``; None if another hook gives it.
        grad: ``[N, P]``; likewise. The sample counts where its gradient is given.
        like: either.
        features: of a sample.
        each: rows of a sample: of tokens, as many as it has.
    """
    row = torch.arange(_ROWS, device=like.device)[:, None, None]
    first = torch.arange(like.shape[1], device=like.device) == 0
    nothing = like.new_zeros(())
    count = calls = nothing
    if grad is not None:
        count = torch.where(first, torch.full_like(nothing, features + 1), nothing)
        begins = torch.arange(like.shape[0], device=like.device)[:, None] % each == 0
        calls = torch.where(begins & first, torch.ones_like(nothing), nothing)
    chosen = torch.where(row == 1, nothing if grad is None else grad, count)
    chosen = torch.where(row == 3, calls, chosen)
    return torch.where(row == 0, nothing if state is None else state, chosen).sum(-1)


def _first(rows: Tensor, count: int) -> Tensor:
    return rows[:count] if 0 < count < rows.shape[0] else rows


class _GradientTap(torch.autograd.Function):
    """Pass a tensor on; in the backward, give its figures to ``slot`` and its sum to ``total``."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        slot: Tensor,
        total: Tensor | None,
        kind: str,
        feature_dim: int | None,
        batch_dim: int,
        samples: int,
        observed: int,
        take_state: bool,
        take_grad: bool,
    ) -> Tensor:
        ctx.kind, ctx.feature_dim, ctx.batch_dim = kind, feature_dim, batch_dim
        ctx.observed = observed
        ctx.samples, ctx.take_grad, ctx.summed = samples, take_grad, total is not None
        ctx.capacity = slot.shape[1]
        if take_state:
            how = SampleReduction(kind, feature_dim)  # type: ignore[arg-type]
            with torch.no_grad():
                rows = _first(by_sample(tensor, batch_dim), observed)
                rows = _state_squares(how.of_hidden(rows))
            ctx.save_for_backward(rows)
        else:
            ctx.save_for_backward()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        how = SampleReduction(ctx.kind, ctx.feature_dim)
        if ctx.samples:  # the logits: a row for each of so many samples
            samples = sample_rows(grad, ctx.samples, ctx.batch_dim, "StepProbe")
            samples = reduced = _first(samples, ctx.observed)
        else:
            samples = _first(by_sample(grad, ctx.batch_dim), ctx.observed)
            reduced = how.of_grad(samples)
        squares = _grad_squares(reduced) if ctx.take_grad else None
        state = ctx.saved_tensors[0] if ctx.saved_tensors else None
        like = squares if squares is not None else state
        assert like is not None  # a slot takes one of them
        if squares is not None and state is not None and state.shape != squares.shape:
            state, squares = (part.sum(-1, keepdim=True) for part in (state, squares))
            like = squares
        count = max(1, reduced.shape[0])
        each = max(1, count // max(1, samples.shape[0]))
        rows = _rows_of(state, squares, like, reduced.numel() // count, each)
        if rows.shape[1] != ctx.capacity:
            rows = torch.nn.functional.pad(rows, (0, ctx.capacity - rows.shape[1]))
        total = reduced.float().sum(0) if ctx.summed else None
        return grad, rows, total, None, None, None, None, None, None, None


class GradientTaps:
    """The gradient taps of one probe.

    Args:
        labels: of the n states.
        capacity: samples that a forward pass may have.
        error_capacity: rows of the logits in it: the same, or 1/T of it with T tokens a sample.
        sum_shapes: per kept direction, by layer, the shape of a sample.
        reduction, batch_dim: what a sample is.
        device: of the states.
        refusals: per state that cannot be reached in a compiled network the reason.
        samples: only the first so many of a pass are observed; None observes all.
        gradients: is told of every backward pass that reached a slot.
        arrived: is called at the end of every backward pass that reached a slot.
    """

    def __init__(
        self,
        labels: Sequence[str],
        capacity: int,
        error_capacity: int,
        sum_shapes: Mapping[int, torch.Size],
        reduction: SampleReduction,
        batch_dim: int,
        device: torch.device,
        refusals: Mapping[int, str],
        samples: int | None,
        gradients: Gradients,
        arrived: Callable[[StepFigures], None],
    ) -> None:
        n = len(labels)
        self.labels = tuple(labels)
        self.reduction = reduction
        self.batch_dim = batch_dim
        self.observed = samples or 0  # a number in compiled code: 0 for all
        self.refusal = "; ".join(refusals.values())
        # What is wrong with what came, on the device: that several forward passes were summed, and
        # that several calls made logits of some of the samples each.
        self._flaws: Tensor | None = None
        self._without_logits = False
        self._gradients = gradients
        self._arrived = arrived
        self.leaves = [self._leaf((_ROWS, capacity), device) for _ in range(n)]
        self.leaves.append(self._leaf((_ROWS, error_capacity), device))
        self.totals: list[Tensor | None] = [None] * (n + 1)
        for l, shape in sum_shapes.items():
            self.totals[l] = self._leaf(tuple(shape), device)
        factors = torch.tensor([1 / _STATE_SCALE, 1 / _GRAD_SCALE], dtype=torch.float64)
        self._factors = factors[:, None, None].to(device)
        self._got: dict[int, Tensor] = {}
        self._got_sums: dict[int, Tensor] = {}
        for l, leaf in enumerate(self.leaves):
            leaf.register_post_accumulate_grad_hook(lambda t, l=l: self._take(self._got, l, t))
        for l, total in enumerate(self.totals):
            if total is not None:
                total.register_post_accumulate_grad_hook(
                    lambda t, l=l: self._take(self._got_sums, l, t)
                )

    @staticmethod
    def _leaf(shape: tuple[int, ...], device: torch.device) -> Tensor:
        leaf = torch.zeros(shape, device=device, requires_grad=True)
        # What torch._dynamo.mark_static_address says, whose import takes seconds: CUDA graphs of
        # the compiler may read the leaf where it lies, like a parameter.
        leaf._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
        return leaf

    # ---- inside the graph

    def through(self, job: Job, tensor: Tensor, samples: int = 0) -> Tensor:
        """Return a tensor that has gone through its slot; this is traced by the compiler."""
        if self.refusal:
            raise RuntimeError(f"StepProbe: {self.refusal}")
        slot, total = self.leaves[job.slot], self.totals[job.slot]
        if tensor.device != slot.device:
            raise RuntimeError(
                f"StepProbe: expected states on {slot.device} as in the example, got "
                f"{tensor.device}; remove the probe and build another one after the model is moved"
            )
        if job.slot < len(self.labels):
            rows = _first(by_sample(tensor, self.batch_dim), self.observed)
            count = rows.shape[0]
            if self.reduction.kind == "token" and tensor.dim() > 2:
                count = rows.numel() // rows.shape[self.reduction.feature_index(rows)]
        else:
            count = min(samples, self.observed) if self.observed else samples
        if count > slot.shape[1]:
            raise RuntimeError(
                f"StepProbe: expected at most {slot.shape[1]} samples in a compiled forward pass, "
                f"got {count}; give max_samples="
            )
        if not job.grad or (total is not None and not self._sums(tensor, total)):
            total = None
        passed: Tensor = _GradientTap.apply(  # type: ignore[no-untyped-call]
            tensor,
            slot,
            total,
            self.reduction.kind,
            self.reduction.feature_dim,
            self.batch_dim,
            samples,
            self.observed,
            job.state,
            job.grad,
        )
        return passed

    def _sums(self, tensor: Tensor, total: Tensor) -> bool:
        if self.reduction.kind == "flatten" or tensor.dim() < 3:
            return by_sample(tensor, self.batch_dim).shape[1:] == total.shape
        return True

    # ---- outside of it

    def _take(self, got: dict[int, Tensor], l: int, leaf: Tensor) -> None:
        """Take the gradient away from a leaf: the next backward pass has its own."""
        if not self._got and not self._got_sums:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
            self._gradients.begins()
        if leaf.grad is not None:
            got[l] = leaf.grad
        leaf.grad = None

    def summed_passes(self) -> bool:
        """Return whether passes came together as one sum; waits for the device.

        A backward pass through several of them brings a slot one gradient, summed over all.
        """
        return self._flaws is not None and bool(self._flaws[0])

    def divided_logits(self) -> bool:
        """Return whether logits came in pieces of the samples; waits for the device.

        The pieces are added into the same places then. From now on, logits are not looked at.
        """
        self._without_logits |= self._flaws is not None and bool(self._flaws[1])
        return self._without_logits

    def _look_for_flaws(self, calls: Tensor, of_logits: Tensor | None) -> Tensor:
        """Return both flaws of a backward pass, ``[2]``, and keep them beside earlier ones.

        Args:
            calls: ``[n, N]``, where a sample begins how many calls brought it.
            of_logits: ``[N']``, the same.
        """
        found = calls.amax(0)
        several = found.amax() > 1
        divided = torch.zeros_like(several)
        if of_logits is not None:
            divided = of_logits.count_nonzero() != found.count_nonzero()
        now = torch.stack([several, divided])
        first = self._flaws is None
        self._flaws = now if self._flaws is None else self._flaws | now
        captured = now.is_cuda and torch.cuda.is_current_stream_capturing()
        if first and not captured:
            self.divided_logits()  # of the first pass at once: it is usually like all others
        return now

    def forget(self) -> None:
        """Drop what a backward pass brought that did not come to its end."""
        self._got, self._got_sums = {}, {}

    def _norms(self, rows: Tensor) -> Tensor:
        """Return the norms of states and gradients, ``[2, k, N]`` float64, of rows ``[4, k, N]``.

        NaN where there was no sample.
        """
        norms = torch.empty((2, *rows.shape[1:]), dtype=torch.float64, device=rows.device)
        # Not by the features: logits that several calls make have those of all of them.
        torch.div(rows[:2], rows[2] > 0, out=norms)
        return norms.sqrt_().mul_(self._factors)

    @torch.no_grad()  # of a backward pass that makes a graph of its own, gradients have gradients
    def _finish(self) -> None:
        n = len(self.labels)
        got, sums = self._got, self._got_sums
        self.forget()
        self._gradients.ended()
        present = [l for l in range(n) if l in got]
        if not present:
            return
        # Each of these calls is a launch: some 4 µs of a step of 45 ms.
        one = got[present[0]]
        empty = one if len(present) == n else torch.zeros_like(one)
        if self._without_logits:
            got.pop(n, None)
        beside = n in got and got[n].shape == one.shape
        # A copy too: what a graph of the compiler returned is overwritten by its next replay.
        rows = torch.stack([got.get(l, empty) for l in range(n + beside)], 1)
        flaws = self._look_for_flaws(rows[3, :n], got[n][3] if n in got else None)
        norms = self._norms(rows).masked_fill_(flaws[0], torch.nan)
        if beside:
            norms[:, n].masked_fill_(flaws[1], torch.nan)
        rms = norms[0, :n] / (rows[2, :n].double() - 1).sqrt()
        there = (rows[2, :n] > 0).any(0).float()
        if not beside:
            error = norms.new_full((2, 1, norms.shape[2]), torch.nan)
            if n in got:
                # So many rows of a state go with one of the logits: in this pass, not the example.
                each = (there.sum() / (got[n][2] > 0).sum()).nan_to_num(1.0).round().clamp(min=1.0)
                places = torch.arange(len(there), device=there.device)
                at = (places / each).long().clamp(max=got[n].shape[1] - 1)
                found = self._norms(got[n][:, None]).index_select(2, at)
                error = found.masked_fill((there == 0) | flaws.any(), torch.nan)
            norms = torch.cat([norms, error], 1)
        samples = there.sum(dtype=torch.float64)
        kept = [
            (sums[l] / samples).masked_fill_(flaws[0], torch.nan) if l in sums else None
            for l, total in enumerate(self.totals)
            if total is not None
        ]
        missing = {l for l in range(n) if l not in got}
        has_error = n in got and not self._without_logits
        self._arrived(
            StepFigures(norms, kept, missing, None, samples, rms=rms, has_error=has_error)
        )
