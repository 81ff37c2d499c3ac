"""What one forward pass of the training and the backward passes through it show.

The hooks replace nothing. A state whose bytes are few is kept, detached, until the step ends, and
all layers are reduced together by one launch of the operator. A larger one is reduced as it passes:
its norm in the forward, its gradient's in the backward, and nothing of it is kept.

A pass is held by the hooks in its graph and by nothing else until a gradient arrives: a forward
that is never differentiated is gone with its graph.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..capture import before_link, sample_rows
from ..capture.outputs import by_sample
from ..capture.points import TapError
from ..capture.reduction import SampleReduction
from ..ops.reference import sample_norm
from .figures import (
    HANDED_OUT,
    SECOND_ORDER,
    TRAINS,
    StepFigures,
    norms_and_mean,
    sample_norms,
)
from .gradients import Gradients, capturing
from .tensor_parallel import Part, TensorRanks, like_whole, plain_part

# Say whether a tensor belongs to a function transform: to vmap, say, where it stands for many.
_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor

# -1 outside of a backward pass.
_backward_task = torch._C._current_graph_task_id

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
        complex: whether a state may be of complex numbers.
        passing: states that must be reduced as they pass: something writes into them later.
        passing_grads: the same of gradients.
        first: states whose gradient has not been seen yet.
        tensor_ranks: that hold one copy of the model together.
        samples: only the first so many of a pass are observed; None observes all.
        gradients: says what a backward pass does with its gradients.
        remark: is told why a pass has no logits that gains could be relative to.
    """

    name: str
    labels: tuple[str, ...]
    reduction: SampleReduction
    batch_dim: int
    direction_layers: tuple[int, ...]
    gradients: Gradients
    kept_bytes: int
    complex: bool = False
    passing: set[int] = field(default_factory=set)
    passing_grads: set[int] = field(default_factory=set)
    tensor_ranks: TensorRanks | None = None
    samples: int | None = None
    remark: Callable[[str], None] = lambda reason: None

    def features_of(self, state: Tensor) -> int:
        """Return how many features a sample of a state ``[..., B, ...]`` has."""
        rows = by_sample(like_whole(state), self.batch_dim)
        return math.prod(self.reduction.of_hidden(rows).shape[1:])

    def whole_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the features of whole states, of which this rank may have parts."""
        if self.tensor_ranks is None:
            return tuple(sizes)
        shares = self.tensor_ranks.shares
        return tuple(round(size * shares.get(l, 1.0)) for l, size in enumerate(sizes))

    def __post_init__(self) -> None:
        self.first = set(range(len(self.labels) + 1))

    def observed(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return the samples along a dimension that are observed."""
        if self.samples is None or tensor.shape[dim] <= self.samples:
            return tensor
        return tensor.narrow(dim, 0, self.samples)

    def logit_rows(self, logits: Tensor, samples: int) -> Tensor | None:
        """Return logits or their gradients, a row for each observed sample; None without."""
        try:
            return self.observed(sample_rows(logits, samples, self.batch_dim, self.name))
        except TapError as error:
            self.remark(str(error))
            return None

    def part_of(self, l: int, tensor: Tensor, grad: bool = False) -> Part:
        """Return what this rank has of state l, n for the logits, or of its gradient."""
        ranks = self.tensor_ranks
        if ranks is None and type(tensor) is Tensor:
            return Part(tensor, True)
        logits = l == len(self.labels)
        label = "output" if logits else self.labels[l]
        with torch.no_grad():
            if ranks is None:
                return Part(plain_part(label, tensor, self.batch_dim), True)
            how = None if logits else self.reduction
            return ranks.part_of(l, label, tensor, how, self.batch_dim, grad)

    @property
    def plain(self) -> bool:
        """Whether a state is a sample's as it stands."""
        return self.batch_dim == 0 and self.reduction.kind == "flatten" and not self.complex


def _on_gradient(state: Tensor, hook: Callable[[Tensor | None], None]) -> None:
    """Do what ``state.register_hook(hook)`` does, at a third of its time where that is plain.

    There is no handle: nobody takes such a hook away.
    """
    node = state.grad_fn
    if node is None or state._backward_hooks is not None or type(state) is not Tensor:
        state.register_hook(hook)
        return
    # Under a number that no handle of torch's will have.
    state._backward_hooks = OrderedDict({-1: hook})
    node._register_hook_dict(state)


class Observation:
    """The gradients that one backward pass brought to one forward pass.

    Attributes:
        finished: whether the backward pass came to its end.
    """

    __slots__ = (
        "copies",
        "counts",
        "errors",
        "finished",
        "grad_norms",
        "grads",
        "means",
        "of",
        "purpose",
        "versions",
    )

    def __init__(self, of: Pass, purpose: int) -> None:
        size = len(of.settings.labels) + 1
        self.of = of
        self.purpose = purpose
        self.grads: list[Tensor | None] = [None] * size
        self.versions = [0] * size
        self.copies: dict[int, Tensor] = {}
        self.grad_norms: list[Tensor | None] = [None] * size
        self.means: dict[int, Tensor] = {}
        self.counts = [True] * size  # False: another rank of tensor parallelism counts it
        # Of logits that come from several calls: per call the norms of its rows.
        self.errors: dict[int, Tensor] = {}
        self.finished = False

    def has(self, l: int, call: int = 0) -> bool:
        if self.grads[l] is not None or self.grad_norms[l] is not None:
            return True
        return bool(self.errors) and l == len(self.grads) - 1 and call in self.errors

    def keep(self, l: int, grad: Tensor) -> None:
        """Keep a gradient until the step ends, as autograd has it now.

        A hook that comes later may write into it. Of the first one there is a copy, to tell.
        """
        self.grads[l], self.versions[l] = grad, grad._version
        if l in self.of.settings.first:
            self.copies[l] = grad.clone()

    def _gradient(self, l: int) -> Tensor | None:
        """Return a gradient that was kept, as it was when it came."""
        grad, settings = self.grads[l], self.of.settings
        if grad is None:
            return None
        copy = self.copies.pop(l, None)
        settings.first.discard(l)
        same = grad._version == self.versions[l]
        if same and (copy is None or capturing(copy) or torch.equal(copy, grad)):
            return grad
        # From now on it is reduced before that.
        settings.passing_grads.add(l)
        return torch.full_like(grad, torch.nan) if copy is None else copy

    def finish(self) -> None:
        """Note that the backward pass ended: torch does not call this after an error."""
        self.finished = True
        if self.purpose != TRAINS:
            return
        self.of.settings.gradients.ended()
        for (l, call), differentiable in self.of.differentiated.items():
            if differentiable or not self.has(l, call):
                self.purpose = SECOND_ORDER

    def forget(self) -> None:
        """Let go of the gradients, and of the circle of references."""
        self.grads = [None] * len(self.grads)
        self.copies.clear()
        self.of.drop(self)

    def _kept(self) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """Return which states were kept with their gradients, and both."""
        states, versions = self.of.states, self.of.versions
        layers: list[int] = []
        hiddens: list[Tensor] = []
        gradients: list[Tensor] = []
        plainly = not self.copies
        for l, (state, version) in enumerate(zip(states, versions, strict=True)):
            grad = self.grads[l]
            if grad is None:
                continue
            if not plainly or grad._version != self.versions[l]:
                grad = self._gradient(l)
            if state is None or grad is None:
                continue
            layers.append(l)
            hiddens.append(state if state._version == version else self._as_seen(l, state, version))
            gradients.append(grad)
        settings = self.of.settings
        if not settings.plain:
            how, dim = settings.reduction, settings.batch_dim
            hiddens = [how.of_hidden(by_sample(h, dim)) for h in hiddens]
            gradients = [how.of_grad(by_sample(g, dim)) for g in gradients]
        return layers, hiddens, gradients

    def _as_seen(self, l: int, state: Tensor, version: int) -> Tensor:
        if state._version == version:
            return state
        # Written into after it was seen; from now on it is reduced before that.
        self.of.settings.passing.add(l)
        return torch.full_like(state, torch.nan)

    def whole(self) -> list[Tensor] | None:
        """Return all n states, their gradients and that of the logits; None unless all were kept.

        None too where a state must be made ready before it can be reduced.
        """
        settings, of = self.of.settings, self.of
        if not settings.plain or self.copies:
            return None
        found: list[Tensor] = []
        for state, version in zip(of.states, of.versions, strict=True):
            if state is None or state._version != version:
                return None
            found.append(state)
        for grad, version in zip(self.grads, self.versions, strict=True):
            if grad is None or grad._version != version:
                return None
            found.append(grad)
        rows = settings.logit_rows(found[-1], of.samples)
        if rows is None:
            return None
        found[-1] = rows
        return found

    def figures(self) -> StepFigures | None:
        """Reduce what was kept, and let go of it; None if no state was reached at all."""
        settings, of = self.of.settings, self.of
        n = len(settings.labels)
        layers, hiddens, gradients = self._kept()
        means = dict(self.means)
        error, logits = self.grad_norms[n], self._gradient(n)
        if self.errors:
            error = of.joined_errors(self.errors)
        self.forget()
        sizes = of.sizes
        for l, hidden in zip(layers, hiddens, strict=True):
            sizes[l] = sizes[l] or math.prod(hidden.shape[1:])
        if logits is not None:
            logits = settings.logit_rows(logits, of.samples)
            of.unusable = logits is None
        if logits is not None:
            if logits.is_complex():
                logits = torch.view_as_real(logits)
            # One more layer in the same launch: its gradient's norm is the output error.
            first = gradients[0] if gradients else None
            alike = first is not None and first.dtype == logits.dtype
            if first is not None and alike and first.shape[0] == logits.shape[0]:
                hiddens.append(logits)
                gradients.append(logits)
            else:
                error, logits = sample_norms(logits), None
        norms: Tensor | None = None
        if hiddens:
            self._check_rows([len(h) for h in hiddens])
            wanted = [layers.index(l) for l in settings.direction_layers if l in layers]
            found = ops.layer_statistics(hiddens, gradients, means=wanted)
            norms = (
                found.norms
                if isinstance(found, ops.PackedStatistics)
                else torch.stack([found.hidden_norm, found.grad_norm])
            )
            for l in settings.direction_layers:
                if l in layers:
                    at = layers.index(l)
                    means[l] = (
                        found.mean_of(at)
                        if isinstance(found, ops.PackedStatistics)
                        else found.grad_mean[at]
                    )
        missing: set[int] = set()
        if norms is None or norms.shape[1] != n + 1:
            rows = self._rows(layers, norms, error if logits is None else None)
            if rows is None:
                return None
            norms, missing = rows
        if settings.tensor_ranks is not None:
            counting = (of.counts[:n] + self.counts[n:], self.counts)
            norms = settings.tensor_ranks.masked(norms, counting)
            means = {l: m if self.counts[l] else m.new_empty(0) for l, m in means.items()}
        return StepFigures(
            norms,
            [means.get(l) for l in settings.direction_layers],
            missing,
            norms.shape[2],
            sizes=settings.whole_sizes(sizes),
            # Logits that the loss does not use have no gradient: that is no lack of logits.
            has_error=bool(of.logit_shapes) and not of.unusable,
            purpose=self.purpose,
        )

    def _check_rows(self, counts: list[int]) -> None:
        if len(set(counts)) > 1:
            raise ValueError(
                f"StepProbe: reduction {self.of.settings.reduction.kind}: expected the same number "
                f"of samples in every state, got {', '.join(map(str, sorted(set(counts))))}; name "
                f"taps of one shape"
            )

    def _rows(
        self, layers: list[int], norms: Tensor | None, error: Tensor | None
    ) -> tuple[Tensor, set[int]] | None:
        """Put norms that were taken together and as they passed into one matrix."""
        settings, of = self.of.settings, self.of
        n = len(settings.labels)
        hidden: list[Tensor | None] = list(of.hidden_norms)
        grad: list[Tensor | None] = list(self.grad_norms[:n])
        if norms is not None:
            for position, l in enumerate(layers):
                hidden[l], grad[l] = norms[0, position], norms[1, position]
            if norms.shape[1] > len(layers):
                error = norms[1, -1]
        for l, state in enumerate(of.states):
            if hidden[l] is None and state is not None:
                seen = by_sample(self._as_seen(l, state, of.versions[l]), settings.batch_dim)
                reduced = settings.reduction.of_hidden(seen)
                hidden[l] = sample_norms(reduced)
                of.sizes[l] = of.sizes[l] or math.prod(reduced.shape[1:])
        there = [row for row in (*hidden, *grad) if row is not None]
        if not there:
            return None
        self._check_rows([len(row) for row in there])
        empty = torch.full_like(there[0], torch.nan)
        if error is None:
            error = empty
        elif len(error) != len(empty):
            error = error.repeat_interleave(len(empty) // len(error))
        rows = [*hidden, error, *grad, error]
        matrix = torch.stack([empty if row is None else row for row in rows])
        missing = {l for l in range(n) if hidden[l] is None or grad[l] is None}
        return matrix.view(2, n + 1, len(empty)), missing


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
        self.counts = [True] * n  # as in Observation
        self.sizes = [0] * n
        self.calls: dict[int, int] = {}
        self.logit_shapes: list[torch.Size] = []  # of each call of what makes logits
        self.again: set[int] = (
            set()
        )  # states that came once more; in a backward pass of no interest
        self._recomputed = 0  # of these calls, inside of the backward pass
        self.unusable = False  # the logits: it cannot be told which sample a row belongs to
        self.seconds = 0.0
        self._hooked = [False] * (n + 1)
        self._last: Observation | None = None
        # Where a gradient that is to be differentiated again entered, and whether it depends on
        # what was computed there.
        self.differentiated: dict[tuple[int, int], bool] = {}
        self._task, self._purpose = -1, 0
        self._opened = opened

    def see(self, l: int, state: Tensor) -> None:
        """Take note of a state; index n is the logits."""
        if self._hooked[l]:
            self.again.add(l)
            return
        started = perf_counter()
        settings = self.settings
        if l < len(self.states):
            local = state
            if settings.tensor_ranks is not None or type(state) is not Tensor:
                local, self.counts[l] = settings.part_of(l, state)
                self.sizes[l] = settings.features_of(state)
            if not self.samples:
                self.samples = local.shape[settings.batch_dim]
            small = local.nbytes <= settings.kept_bytes and l not in settings.passing
            # An optimiser may step inside of the backward pass, into what is a view of a parameter.
            owner = state if state._base is None else state._base
            if owner.is_leaf and owner.requires_grad:
                small = False
            if settings.samples is not None:
                local = settings.observed(local, settings.batch_dim)
            if small:
                kept = local.detach()
                self.states[l], self.versions[l] = kept, kept._version
            else:
                with torch.no_grad():
                    reduced = settings.reduction.of_hidden(by_sample(local, settings.batch_dim))
                    self.hidden_norms[l] = sample_norms(reduced)
                self.sizes[l] = self.sizes[l] or math.prod(reduced.shape[1:])
        if state.requires_grad:
            # The closure must not hold the state: it would be kept alive by its own graph.
            _on_gradient(state, partial(self._arrived, l))
            self._hooked[l] = True
        self.seconds += perf_counter() - started

    def see_logits(self, logits: Tensor, again: bool = False) -> None:
        """Take note of logits, all of them or those of one call among several.

        Args:
            logits: as the model makes them, or behind a softmax or the like.
            again: the call is one of the forward pass that is run again in the backward pass.
        """
        n = len(self.states)
        if again:
            if self._hooked[n] or not logits.requires_grad:
                return
            self._recomputed += 1  # the last ones come first
            call = max(0, len(self.logit_shapes) - self._recomputed)
        else:
            call = len(self.logit_shapes)
            self.logit_shapes.append(logits.shape)
            if not logits.requires_grad:
                return
            self._hooked[n] = True
        started = perf_counter()
        hook = partial(self._arrived, n, call=call)
        edge = before_link(logits)
        if edge is None:
            _on_gradient(logits, hook)
        else:
            node, index = edge
            node.register_prehook(lambda grads: hook(grads[index]))
        self.seconds += perf_counter() - started

    def joined_errors(self, errors: Mapping[int, Tensor]) -> Tensor | None:
        """Return the norm of each sample's ∂loss/∂logits, of logits that several calls made."""
        shapes, how = self.logit_shapes, self._shared_out()
        if how == "positions":
            return sample_norm(torch.stack(list(errors.values()), 1))
        if how == "samples":
            one = next(iter(errors.values()))
            dim = 0 if self.settings.batch_dim >= len(shapes[0]) else self.settings.batch_dim
            rows = [
                errors[call] if call in errors else one.new_zeros(shape[dim])
                for call, shape in enumerate(shapes)
            ]
            return self.settings.observed(torch.cat(rows))
        return None

    def _shared_out(self) -> Literal["positions", "samples"] | None:
        """Say what the calls that make logits share out: by their shapes, None if unclear."""
        dim, samples, shapes = self.settings.batch_dim, self.samples, self.logit_shapes
        if all(len(shape) > dim and shape[dim] == samples for shape in shapes):
            return "positions"
        if dim and all(len(shape) == 2 and shape[0] == samples for shape in shapes):
            return "positions"
        sizes = [shape[dim] if len(shape) > dim else shape[0] if shape else 0 for shape in shapes]
        if sum(sizes) == samples and not self._recomputed:
            return "samples"
        self.unusable = True
        self.settings.remark(
            f"{self.settings.name}: output: expected logits of {len(shapes)} calls that share out "
            f"the positions or the {samples} samples of the states, got shapes "
            f"{', '.join(sorted({str(list(shape)) for shape in shapes}))}, of which it cannot be "
            f"told which sample a row belongs to"
        )
        return None

    def _take_call(self, observation: Observation, call: int, grad: Tensor) -> None:
        """Reduce the gradient of logits that one call among several has made."""
        settings, how = self.settings, self._shared_out()
        rows: Tensor | None = None
        with torch.no_grad():
            if how == "positions":
                rows = settings.logit_rows(grad, self.samples)
            elif how == "samples":
                rows = (
                    grad.movedim(settings.batch_dim, 0) if grad.dim() > settings.batch_dim else grad
                )
            if rows is not None:
                wide = torch.view_as_real(rows) if rows.is_complex() else rows
                observation.errors[call] = sample_norms(wide)

    def _purpose_of(self, task: int, l: int, grad: Tensor, call: int) -> int:
        """Look at a backward pass when its first gradient arrives here."""
        # A batch of gradients at once (``is_grads_batched``) is none of the training's.
        if _is_wrapped(grad) or _is_batched(grad):
            return 0
        purpose = self.settings.gradients.purpose(task)
        if purpose <= HANDED_OUT and torch.is_grad_enabled():
            self.differentiated[l, call] = grad.requires_grad
        if self._last is not None and (self._last.purpose == HANDED_OUT) != (purpose == HANDED_OUT):
            self._last = None
        return purpose

    def _arrived(self, l: int, grad: Tensor | None, call: int = 0) -> None:
        # None of an output of several, of which the loss uses others: it is not reached.
        if grad is None:
            return
        started = perf_counter()
        task = _backward_task()
        if task != self._task:
            self._task, self._purpose = task, self._purpose_of(task, l, grad, call)
        if not self._purpose:
            return
        last, settings = self._last, self.settings
        # A gradient that came before: another backward through the same graph.
        if (
            last is None
            or last.grads[l] is not None
            or last.grad_norms[l] is not None
            or (last.errors and last.has(l, call))
        ):
            last = self._last = Observation(self, self._purpose)
            _queue_callback(last.finish)
            self._opened(last)
        plain = settings.tensor_ranks is None and type(grad) is Tensor
        if not plain:
            grad, last.counts[l] = settings.part_of(l, grad, grad=True)
        if l == len(self.states):
            if len(self.logit_shapes) > 1:
                self._take_call(last, call, grad)
                self.seconds += perf_counter() - started
                return
            small = grad.nbytes <= settings.kept_bytes
        else:
            if settings.samples is not None:
                grad = settings.observed(grad, settings.batch_dim)
            state = self.states[l]
            # Of a state that is whole on each rank a part of the gradient may be, and the reverse.
            small = state is not None and (plain or state.shape == grad.shape)
        if small and l not in settings.passing_grads:
            last.keep(l, grad.detach() if grad.requires_grad else grad)
        else:
            with torch.no_grad():
                self._reduce(last, l, grad)
        self.seconds += perf_counter() - started

    def drop(self, observation: Observation) -> None:
        if self._last is observation:
            self._last = None

    def _reduce(self, observation: Observation, l: int, grad: Tensor) -> None:
        settings = self.settings
        if l == len(settings.labels):
            rows = settings.logit_rows(grad, self.samples)
            self.unusable = rows is None
            if rows is not None:
                observation.grad_norms[l] = sample_norms(
                    torch.view_as_real(rows) if rows.is_complex() else rows
                )
            return
        reduced = settings.reduction.of_grad(by_sample(grad, settings.batch_dim))
        if l in settings.direction_layers and reduced.dim() > 1:
            observation.grad_norms[l], observation.means[l] = norms_and_mean(reduced)
            return
        observation.grad_norms[l] = sample_norms(reduced)
        if l in settings.direction_layers:
            wide = torch.float64 if reduced.dtype == torch.float64 else torch.float32
            observation.means[l] = reduced.mean(0, dtype=wide)
