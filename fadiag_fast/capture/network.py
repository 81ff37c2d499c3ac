"""A network under observation: where it is tapped, what its output is, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batches import counts_samples, possible_samples
from .captured import Captured
from .isolation import check_model, is_sharded
from .outputs import (
    Loss,
    Output,
    by_sample,
    choose_output,
    classification_loss,
    loss_in,
    output_of,
    sample_rows,
)
from .plan import Unreached
from .points import Select, Tap, TapError, Taps, split_hidden
from .taps import find_taps
from .tracing import Trace, argument_state, call_model, clean_name, state_in, trace, watched


class ObservedNetwork:
    """What both ways of capturing need to know of a network.

    Args:
        model, select, loss, output, batch_dim, several: as for :class:`.Probe`.

    Attributes:
        name: the class of the network, for messages.
        reordered: whether a forward pass reached the taps in another order than the first one.
        has_output: whether the network has an output with a row for each sample.
    """

    def __init__(
        self,
        model: nn.Module,
        select: Select | None,
        loss: Loss | None,
        output: Output | None,
        batch_dim: int,
        several: bool,
    ) -> None:
        check_model(model)
        self.model = model
        self.name = type(model).__name__
        self.select = select
        self.loss = loss
        self.output = output
        self.batch_dim = batch_dim
        self.several = several
        self.reordered = False
        self.has_output = True
        self._order: list[int] = []
        self._taps: Taps | None = None
        self._modules: Mapping[str, nn.Module] = {
            clean_name(name): module for name, module in model.named_modules()
        }

    @property
    def taps(self) -> Taps:
        if self._taps is None:
            raise RuntimeError("Probe.taps: expected prepare or capture to be called first")
        return self._taps

    def trace(self, x: Any) -> Trace:
        """Run a forward pass without gradients; the first one also finds the taps."""
        if self._taps is None:
            self._taps, seen = find_taps(
                self.model,
                x,
                self.select,
                lambda state: counts_samples(x, state, self.batch_dim),
                batch_dim=self.batch_dim,
                several=self.several,
            )
            return seen
        options = {"return_hidden": True} if self.taps.hands_out else {}
        return trace(self.model, x, **options)

    def output_of(self, output: Any) -> Tensor | None:
        """Return the logits within what the model returns, None where there are none."""
        if self.taps.hands_out and not isinstance(output, Tensor):
            return split_hidden(output, self.name)[0]
        return output_of(output, self.output)

    def check_state(self, x: Any, tap: Tap, state: Tensor) -> None:
        """Raise TapError for a state that cannot be reduced to a row for each sample."""
        if state.layout is not torch.strided:
            raise TapError(f"{self.name}: {tap.where}: expected a dense state, got {state.layout}")
        if counts_samples(x, state, self.batch_dim):
            return
        counts = possible_samples(x, self.batch_dim)
        others = [i for i, size in enumerate(state.shape) if size in counts]
        hint = f"; batch_dim={others[0]} would fit" if others else ""
        raise TapError(
            f"{self.name}: {tap.where}: expected a state with "
            f"{' or '.join(map(str, sorted(counts)))} samples along dimension "
            f"{self.batch_dim}, got shape {list(state.shape)}{hint}"
        )

    def logits_of(self, output: Any) -> Tensor:
        """Return the part of the model's output that counts as its logits.

        Raises:
            TapError: there is none.
        """
        found = self.output_of(output)
        return choose_output(output, self.output) if found is None else found

    def for_loss(self, output: Any, logits: Tensor | None) -> Any:
        """Return what a loss function is given: a structured output as it is, else the logits."""
        whole = self.taps.hands_out or isinstance(output, Tensor)
        return logits if whole and logits is not None else output

    def loss_of(self, output: Any, logits: Tensor | None, y: Any) -> Tensor:
        """Return the scalar loss.

        Raises:
            TapError: there are no labels, no loss function, and the model returns no loss.
            ValueError: the loss is not a scalar.
        """
        found: Any
        if self.loss is not None:
            found = self.loss(output, y)
        elif y is not None and logits is not None:
            found = classification_loss(logits, y)
        else:
            found = loss_in(output)
            if found is None:
                raise TapError(
                    f"{self.name}: expected labels, a loss function, or a model that returns its "
                    f"loss, got {type(output).__name__} without one"
                )
        if not isinstance(found, Tensor):
            raise ValueError(f"loss: expected a scalar tensor, got {type(found).__name__}")
        if found.dim() != 0:
            raise ValueError(f"loss: expected a scalar, got shape {list(found.shape)}")
        return found

    def forward(self, x: Any, constants: Mapping[str, Tensor] | None) -> Any:
        """Run the model; ``constants`` replace its parameters and buffers by name."""
        options = {"return_hidden": True} if self.taps.hands_out else {}
        if constants is None:
            return call_model(self.model, x, **options)
        args = () if isinstance(x, Mapping) else tuple(x) if isinstance(x, tuple | list) else (x,)
        kwargs = {**x, **options} if isinstance(x, Mapping) else options
        return torch.func.functional_call(self.model, dict(constants), args, kwargs, strict=False)

    def watch(self, see: Callable[[int, Tensor | None], None]) -> Any:
        """Return a context in which ``see(l, tensor)`` is called at every tap's call."""
        counts: dict[str, int] = {}
        running: dict[str, list[int]] = {}  # a module may call itself
        wanted: dict[tuple[str, str, int], list[int]] = {}
        for l, tap in enumerate(self.taps.points):
            wanted.setdefault((tap.module, tap.at, tap.call), []).append(l)

        def entered(name: str, args: Any, kwargs: Any) -> None:
            counts[name] = counts.get(name, -1) + 1
            running.setdefault(name, []).append(counts[name])
            for l in wanted.get((name, "input", counts[name]), ()):
                see(l, argument_state(args, kwargs))

        def left(name: str, result: Any) -> None:
            for l in wanted.get((name, "output", running[name].pop()), ()):
                see(l, state_in(result))

        if self.taps.hands_out:
            return watched({}, entered, left)
        names = {tap.module for tap in self.taps.points}
        return watched({name: self._modules[name] for name in names}, entered, left)

    def note_order(self, met: list[int]) -> None:
        """Compare the order in which a pass reached the taps with the first pass's."""
        self._order = self._order or list(met)
        self.reordered |= met != self._order

    def changed(self, tap: Tap) -> TapError:
        """Return the error for a tap that a pass does not reach."""
        return TapError(
            f"{self.name}: {tap.where}: expected a call as in the first batch, got "
            f"none: the forward pass depends on its input"
        )

    def check_reached(self, reached: Sequence[bool]) -> None:
        """Raise Unreached unless the loss has a gradient at every tap."""
        lost = [tap.where for tap, yes in zip(self.taps.points, reached, strict=True) if not yes]
        parameters = list(self.model.parameters())
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if lost and frozen and is_sharded(self.model):
            raise Unreached(
                f"{self.name}: {', '.join(lost)}: expected a state that autograd "
                f"can reach, got one behind sharded parameters that are all frozen; unfreeze one "
                f"before the first tap"
            )
        if lost:
            raise Unreached(
                f"{self.name}: {', '.join(lost)}: expected a state that the loss "
                f"depends on, got one that is detached, unused or overwritten; name taps "
                f"without it"
            )

    def captured(
        self,
        hiddens: Sequence[Tensor],
        grads: Sequence[Tensor],
        logits: Tensor,
        logit_grads: Tensor,
        loss: Tensor,
    ) -> Captured:
        """Return what was captured, with the samples along the first dimension."""

        dim = self.batch_dim
        if hiddens and self.has_output:
            samples = by_sample(hiddens[0], dim).shape[0]
            logits, logit_grads = (
                sample_rows(t, samples, self.batch_dim, self.name) for t in (logits, logit_grads)
            )
        elif hiddens:
            logits, logit_grads = by_sample(logits, dim), by_sample(logit_grads, dim)
        return Captured(
            [by_sample(h, dim) for h in hiddens],
            [by_sample(g, dim) for g in grads],
            logits,
            logit_grads,
            loss,
        )

    def has_rows(self, logits: Tensor | None, states: Sequence[Tensor]) -> bool:
        """Return whether a network's output can be told apart by the samples of its states."""
        if logits is None or not states:
            return logits is not None
        try:
            samples = states[0].shape[self.batch_dim]
            sample_rows(logits, samples, self.batch_dim, self.name)
        except TapError:
            # What is asked for by name must fit.
            if self.output is not None:
                raise
            return False
        return True
