"""What one forward pass of the training and the backward passes through it show.

The hooks replace nothing. A state whose bytes are few is kept, detached, until the step ends, and
all layers are reduced together by one launch of the operator. A larger one is reduced as it passes:
its norm in the forward, its gradient's in the backward, and nothing of it is kept.

A pass is held by the hooks in its graph and by nothing else until a gradient arrives: a forward
that is never differentiated is gone with its graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..capture import sample_rows
from ..reference import sample_norm
from ..statistics import SampleReduction

_queue_callback: Callable[[Callable[[], None]], None] = (
    torch.autograd.Variable._execution_engine.queue_callback
)


@dataclass
class Settings:
    """What the hooks need to know.

    Attributes:
        name: of the model, for messages.
        labels: of the n states.
        reduction: what a sample is.
        batch_dim: the dimension of the states that counts samples.
        direction_layers: indices of the states whose direction is kept.
        kept_bytes: a state of at most so many bytes is kept until the step ends.
        passing: states that must be reduced as they pass: something writes into them later.
    """

    name: str
    labels: tuple[str, ...]
    reduction: SampleReduction
    batch_dim: int
    direction_layers: tuple[int, ...]
    kept_bytes: int
    passing: set[int] = field(default_factory=set)


def sample_norms(samples: Tensor) -> Tensor:
    """Return the norm of each sample of ``[N, ...]``, ``[N]`` float64, without a wider copy."""
    if samples.dtype == torch.float64:  # squares may leave the range
        return sample_norm(samples)
    if samples.dim() == 1:
        return samples.double().abs()
    dims = list(range(1, samples.dim()))
    norms: Tensor = torch.linalg.vector_norm(samples, dim=dims, dtype=torch.float64)
    return norms


def by_sample(state: Tensor, batch_dim: int) -> Tensor:
    return state if batch_dim == 0 else state.movedim(batch_dim, 0)


@dataclass
class Figures:
    """What one or more micro-batches say; N samples, n states.

    Attributes:
        hidden, grad: norms ``[n, N]`` float64; NaN where nothing arrived.
        error: ‖∂loss/∂logits‖, ``[N]`` float64.
        sums: per kept direction the sum of the samples' gradients; None where none arrived.
        missing: indices of states of which something did not arrive.
        samples: N; None where some of the columns are empty, and ``count`` says how many are not.
        count: on the device.
        micro_batches: how many.
    """

    hidden: Tensor
    grad: Tensor
    error: Tensor
    sums: list[Tensor | None]
    missing: set[int]
    samples: int | None
    count: Tensor | None = None
    micro_batches: int = 1


class Observation:
    """The gradients that one backward pass brought to one forward pass.

    Attributes:
        finished: whether the backward pass came to its end.
    """

    __slots__ = ("finished", "grad_norms", "grads", "of", "sums")

    def __init__(self, of: Pass) -> None:
        size = len(of.settings.labels) + 1
        self.of = of
        self.grads: list[Tensor | None] = [None] * size
        self.grad_norms: list[Tensor | None] = [None] * size
        self.sums: dict[int, Tensor] = {}
        self.finished = False

    def has(self, l: int) -> bool:
        return self.grads[l] is not None or self.grad_norms[l] is not None

    def finish(self) -> None:
        """Note that the backward pass ended: torch does not call this after an error."""
        self.finished = True

    def forget(self) -> None:
        """Let go of the gradients, and of the circle of references."""
        self.grads = [None] * len(self.grads)
        self.of.drop(self)

    def figures(self) -> Figures | None:
        """Reduce what was kept, and let go of it; None if no state was reached at all."""
        settings, of = self.of.settings, self.of
        n = len(settings.labels)
        how = settings.reduction
        hidden: list[Tensor | None] = list(of.hidden_norms)
        grad: list[Tensor | None] = list(self.grad_norms[:n])
        error = self.grad_norms[n]
        pairs: list[tuple[Tensor, Tensor]] = []
        layers: list[int] = []
        for l in range(n):
            state, gradient = of.states[l], self.grads[l]
            if state is None:
                continue
            if state._version != of.versions[l]:
                # Written into after it was seen; from now on it is reduced before that.
                settings.passing.add(l)
                state = torch.full_like(state, torch.nan)
            reduced = how.of_hidden(by_sample(state, settings.batch_dim))
            if gradient is None:
                hidden[l] = sample_norms(reduced)
                continue
            layers.append(l)
            pairs.append((reduced, how.of_grad(by_sample(gradient, settings.batch_dim))))
        rows = {len(h) for h, _ in pairs} | {
            len(norms) for norms in (*hidden, *grad) if norms is not None
        }
        if len(rows) > 1:
            raise ValueError(
                f"StepProbe: reduction {how.kind}: expected the same number of samples in every "
                f"state, got {', '.join(map(str, sorted(rows)))}; name taps of one shape"
            )
        if not rows:
            return None
        samples = rows.pop()
        logits = self.grads[n]
        if logits is not None:
            logits = sample_rows(logits, of.samples, settings.batch_dim, settings.name)
            if logits.is_complex():
                logits = torch.view_as_real(logits)
            # One more layer in the same launch: its gradient's norm is the output error.
            if len(logits) == samples and pairs and logits.dtype == pairs[0][1].dtype:
                pairs.append((logits, logits))
            else:
                error, logits = sample_norms(logits), None
        if error is not None and len(error) != samples:
            error = error.repeat_interleave(samples // len(error))
        sums: dict[int, Tensor] = dict(self.sums)
        matrices: tuple[Tensor, Tensor] | None = None
        if pairs:
            found = ops.layer_statistics([h for h, _ in pairs], [g for _, g in pairs])
            hidden_norm, grad_norm = found.hidden_norm, found.grad_norm
            if logits is not None:
                error = grad_norm[-1]
            if layers == list(range(n)):
                matrices = (hidden_norm[:n], grad_norm[:n])
            else:
                for position, l in enumerate(layers):
                    hidden[l], grad[l] = hidden_norm[position], grad_norm[position]
            if settings.direction_layers:
                means = found.grad_mean
                for l in settings.direction_layers:
                    if l in layers:
                        sums[l] = means[layers.index(l)] * samples
        self.forget()
        if matrices is not None:
            missing: set[int] = set()
        else:
            missing = {l for l in range(n) if hidden[l] is None or grad[l] is None}
            empty = _empty_row(samples, [*hidden, *grad, error])
            matrices = (
                torch.stack([empty if row is None else row for row in hidden]),
                torch.stack([empty if row is None else row for row in grad]),
            )
        if error is None:
            error = torch.full_like(matrices[0][0], torch.nan)
        kept = [sums.get(l) for l in settings.direction_layers]
        return Figures(*matrices, error, kept, missing, samples)


def _empty_row(samples: int, rows: list[Tensor | None]) -> Tensor:
    like = next(row for row in rows if row is not None)
    return like.new_full((samples,), torch.nan)


class Pass:
    """One forward pass.

    Args:
        settings: see there.
        opened: is told of every new observation.

    Attributes:
        seconds: host time spent in the hooks.
    """

    def __init__(
        self, settings: Settings, opened: Callable[[Observation], None], autocast: str | None
    ) -> None:
        n = len(settings.labels)
        self.settings = settings
        self.autocast = autocast
        self.samples = 0
        self.states: list[Tensor | None] = [None] * n
        self.versions: list[int] = [0] * n
        self.hidden_norms: list[Tensor | None] = [None] * n
        self.counts: dict[int, int] = {}
        self.seconds = 0.0
        self.ended = False
        self._hooked = [False] * (n + 1)
        self._last: Observation | None = None
        self._opened = opened

    def see(self, l: int, state: Tensor) -> None:
        """Take note of a state; index n is the logits."""
        if self._hooked[l]:
            return
        started = time.perf_counter()
        settings = self.settings
        if l < len(settings.labels):
            if not self.samples:
                self.samples = state.shape[settings.batch_dim]
            if state.nbytes <= settings.kept_bytes and l not in settings.passing:
                kept = state.detach()
                self.states[l], self.versions[l] = kept, kept._version
            else:
                with torch.no_grad():
                    reduced = settings.reduction.of_hidden(by_sample(state, settings.batch_dim))
                    self.hidden_norms[l] = sample_norms(reduced)
        if state.requires_grad:
            # The closure must not hold the state: it would be kept alive by its own graph.
            state.register_hook(partial(self._arrived, l))
            self._hooked[l] = True
        self.seconds += time.perf_counter() - started

    def _arrived(self, l: int, grad: Tensor) -> None:
        started = time.perf_counter()
        last = self._last
        if last is None or last.has(l):
            # A gradient that came before: another backward through the same graph.
            last = self._last = Observation(self)
            _queue_callback(last.finish)
            self._opened(last)
        settings = self.settings
        n = len(settings.labels)
        small = self.states[l] is not None if l < n else grad.nbytes <= settings.kept_bytes
        if small:
            last.grads[l] = grad.detach() if grad.requires_grad else grad
        else:
            with torch.no_grad():
                self._reduce(last, l, grad)
        self.seconds += time.perf_counter() - started

    def drop(self, observation: Observation) -> None:
        if self._last is observation:
            self._last = None

    def _reduce(self, observation: Observation, l: int, grad: Tensor) -> None:
        settings = self.settings
        if l == len(settings.labels):
            rows = sample_rows(grad, self.samples, settings.batch_dim, settings.name)
            observation.grad_norms[l] = sample_norms(
                torch.view_as_real(rows) if rows.is_complex() else rows
            )
            return
        reduced = settings.reduction.of_grad(by_sample(grad, settings.batch_dim))
        observation.grad_norms[l] = sample_norms(reduced)
        if l in settings.direction_layers:
            wide = torch.float64 if reduced.dtype == torch.float64 else torch.float32
            observation.sums[l] = reduced.sum(0, dtype=wide)


def merged(parts: list[Figures]) -> Figures:
    """Put the samples of micro-batches together; their directions are summed."""
    if len(parts) == 1:
        return parts[0]
    sums: list[Tensor | None] = []
    for of_layer in zip(*(part.sums for part in parts), strict=True):
        present = [s for s in of_layer if s is not None]
        same = {s.shape for s in present}
        # Micro-batches padded to different lengths have no common direction.
        sums.append(_total(present) if len(same) == 1 else None)
    samples: int | None = None
    count: Tensor | None = None
    if all(part.samples is not None for part in parts):
        samples = sum(part.samples or 0 for part in parts)
    else:
        counts = [
            part.error.new_tensor(float(part.samples or 0)) if part.count is None else part.count
            for part in parts
        ]
        count = _total(counts)
    return Figures(
        torch.cat([part.hidden for part in parts], 1),
        torch.cat([part.grad for part in parts], 1),
        torch.cat([part.error for part in parts]),
        sums,
        set.intersection(*(part.missing for part in parts)),
        samples,
        count,
        sum(part.micro_batches for part in parts),
    )


def _total(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
