"""Capture hidden states and the gradients of the loss with respect to them.

(parameters, x, y) → hiddens, grads, and the gradient at the logits: one forward and one backward
pass, no gradient of a parameter, no copy of a state; row b of a gradient is sample b's. A first
forward pass without gradients (:mod:`.tracing`) tells which torch call makes each tapped state.
There are two ways from there, and they give the same figures: :mod:`.functional`, which serves
stacks of checkpoints and tracing, and :mod:`.autograd`, which serves one model that runs eagerly.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._common.process import eager, own_warnings
from .._common.text import first_line
from .autograd import capture_by_autograd
from .captured import NO_GRADIENT, Captured
from .functional import capture_functional
from .isolation import is_sharded
from .network import ObservedNetwork
from .outputs import Loss, Output, sample_rows
from .plan import Calls, Mismatch, Path, Plan, changed_input
from .planning import Planner
from .points import Select, TapError, Taps
from .tracing import as_plain


class Probe:
    """Capture batch after batch of one model.

    Args:
        model: an unwrapped module in eval mode (see :func:`untouched`).
        select: what to observe, see :func:`fadiag_fast.capture.taps.find_taps`; None chooses.
        loss: (model output, y) → scalar; its reduction scales every gradient. None takes
            :func:`classification_loss`, or without labels the loss that the model returns.
        output: which part of a structured output counts as the logits, see :func:`choose_output`.
        batch_dim: the dimension of every state that counts samples.
        path: ``"torch.func"`` or ``"autograd"`` to force one; by default autograd for the model's
            own parameters and torch.func for given ones.
        several: whether more than one chain of blocks may be chosen.

    Attributes:
        taps: from the first batch on.
        loss: may be replaced between batches.
        path: the way taken, from the first batch on, and ``path_reason`` why not the other.
        reordered: whether a forward pass reached the taps in another order than the first one.
        has_output: whether the network has an output with a row for each sample.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        select: Select | None = None,
        loss: Loss | None = None,
        output: Output | None = None,
        batch_dim: int = 0,
        path: Path | None = None,
        several: bool = True,
    ) -> None:
        self._network = ObservedNetwork(model, select, loss, output, batch_dim, several)
        self._planner = Planner(self._network)
        self.model = model
        self.batch_dim = batch_dim
        self.path: Path | None = "autograd" if path is None and is_sharded(model) else path
        self.path_reason = ""
        self._captured_once = False

    @property
    def taps(self) -> Taps:
        return self._network.taps

    @property
    def loss(self) -> Loss | None:
        return self._network.loss

    @loss.setter
    def loss(self, loss: Loss | None) -> None:
        self._network.loss = loss

    @property
    def reordered(self) -> bool:
        return self._network.reordered

    @property
    def has_output(self) -> bool:
        return self._network.has_output

    def prepare(self, x: Any) -> Plan:
        """Find the taps, and how they are reached for inputs shaped like ``x``.

        Raises:
            TapError: see :func:`.find_taps`; and where a state does not count samples along
                ``batch_dim``, lies on another device than the first one, or is sparse.
        """
        return self._planner.plan_for(as_plain(x))

    def logits_of(self, output: Any) -> Tensor:
        """Return the part of the model's output that counts as its logits.

        Raises:
            TapError: there is none.
        """
        return self._network.logits_of(output)

    def capture(self, x: Any, y: Any, *, constants: Mapping[str, Tensor] | None = None) -> Captured:
        """Run one forward and one backward pass and return what :class:`Captured` lists.

        Args:
            x: input batch: a tensor, a tuple of arguments, or a dict of keywords.
            y: targets, passed to the loss.
            constants: parameters and buffers by name; None takes the model's own.

        Raises:
            TapError: a state cannot be observed, or the loss does not depend on it.
            ValueError: the loss is not a scalar.
        """
        x = as_plain(x)
        if self._captured_once:  # looking at warnings makes torch repeat the others
            return self._capture(x, y, constants)
        with self._gradients_required():
            captured = self._capture(x, y, constants)
        self._captured_once = True
        return captured

    def logits_with(self, x: Any, l: int | None, offset: Tensor | None) -> Tensor:
        """Return the logits, a row for each sample, of a forward pass with one state moved.

        Args:
            x: input batch, as for :meth:`capture`.
            l: index of the tap whose state is moved; every later use of it sees the moved state,
                a skip around the next block included. None moves nothing.
            offset: what is added to the state, ``[B, ...]`` with the samples first.

        Raises:
            TapError: the state is not what a torch call returned, and cannot be replaced.
        """
        x = as_plain(x)
        plan = self.prepare(x)
        index = None if l is None else plan.of_tap[l]
        if l is not None and index is None:
            raise TapError(
                f"{self._network.name}: {self.taps.points[l].where}: expected a state that "
                f"a torch call returned, got one that cannot be replaced in the forward pass"
            )
        moved = False

        def move(spot: int, tensor: Tensor) -> Tensor:
            nonlocal moved
            if spot != index or offset is None:
                return tensor
            moved = True
            by = offset if self.batch_dim == 0 else offset.movedim(0, self.batch_dim)
            return tensor + by

        with torch.inference_mode(False), torch.no_grad(), eager():
            x = changed_input(plan, x, move)
            with Calls(plan, move):
                output = self._network.forward(x, None)
        if l is not None and not moved:
            raise self._network.changed(self.taps.points[l])
        logits = self.logits_of(output)
        samples = logits.shape[0] if offset is None else offset.shape[0]
        return sample_rows(logits, samples, self.batch_dim, self._network.name)

    @contextmanager
    def _gradients_required(self) -> Iterator[None]:
        """Refuse operators without a gradient, of which torch only warns and passes nothing on."""
        with own_warnings():
            warnings.filterwarnings("error", message=f".*{NO_GRADIENT}")
            try:
                yield
            except UserWarning as warning:
                operator, found, _ = str(warning).partition(f": an {NO_GRADIENT}")
                if not found:
                    raise
                raise TapError(
                    f"{self._network.name}: expected operators that have a gradient, got "
                    f"{operator}, through which none passes; probe the model before it is "
                    f"quantised, or name taps behind it"
                ) from None

    def _capture(self, x: Any, y: Any, constants: Mapping[str, Tensor] | None) -> Captured:
        if constants is not None and self.path is None:
            self.path = "torch.func"
        if self.path == "autograd":
            return capture_by_autograd(self._network, self._planner, x, y, constants)
        if self.path == "torch.func":
            return self._by_func(x, y, constants)
        plan = self._planner.plan_for(x)
        try:
            captured = capture_by_autograd(self._network, self._planner, x, y, constants)
            self.path = "autograd"
            return captured
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if plan.unreachable:
                raise
            reason = first_line(error)
        captured = self._by_func(x, y, constants)
        self.path, self.path_reason = "torch.func", f"autograd: {reason}"
        return captured

    def _by_func(self, x: Any, y: Any, constants: Mapping[str, Tensor] | None) -> Captured:
        """Capture by torch.func; where the pass went another way, trace it once more."""
        plan = self._planner.plan_for(x)
        try:
            return capture_functional(self._network, plan, x, y, constants)
        except Mismatch:
            if plan.unreachable:
                raise
            plan = self._planner.plan_again(x)
        try:
            return capture_functional(self._network, plan, x, y, constants)
        except Mismatch as mismatch:
            raise TapError(
                f"{self._network.name}: expected a forward pass that goes the same way when it is "
                f"run again, got one in which {mismatch}"
            ) from None
